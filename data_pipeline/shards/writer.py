"""Writes tar shards; also exports the public names of `tar.py`, `index.py` and `dataset.py`."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from data_pipeline.common.errors import DataError
from data_pipeline.shards.dataset import Dataset, load_or_build
from data_pipeline.shards.index import ShardIndex, index_shard, load_index, store_index
from data_pipeline.shards.tar import Member, Problem, walk
from data_pipeline.storage import store
from data_pipeline.storage.atomic import naming, scratch

__all__ = [
    "Dataset",
    "Member",
    "Problem",
    "ShardIndex",
    "ShardWriter",
    "index_shard",
    "load_index",
    "load_or_build",
    "store_index",
    "walk",
]


class ShardWriter:
    """Writes one shard and its index, atomically, on `close`. The same samples always give the same bytes.

        with ShardWriter("00000.tar") as shard:
            shard.write("000000000", {"jpg": picture, "txt": caption, "json": facts})

    If the block raises, nothing is written. The path may be an s3:// URL.
    """

    def __init__(self, path: str) -> None:
        self.path = str(path) if store.is_remote(str(path)) else store.local_path(str(path))
        self._place = scratch() if store.is_remote(self.path) else self.path
        self.samples = 0
        self._temporary = ""  # a remote shard has no name before it is uploaded
        if store.is_remote(self.path):
            self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            folder, prefix = store.parent(self.path), f".{store.basename(self.path)}."
            os.makedirs(folder, exist_ok=True)
            descriptor, self._temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
            self._file = open(descriptor, "wb")  # noqa: SIM115
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample, with its members in the given order.

        Args:
            key: name of the sample, without dots after the last slash.
            members: bytes by extension.

        Raises:
            DataError: the key, after its last slash, is empty or has a dot, or an extension is empty or has a slash:
                readers would find another key.
        """
        stem = key.rpartition("/")[2]
        if not stem or "." in stem or any("/" in name or not name for name in members):
            raise DataError(
                f"{self.path}: key {key!r} with {list(members)}: readers split a name at the first dot after its last "
                "slash, so the key must end in a name without dots, and extensions must have no slash"
            )
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode, info.mtime = len(data), 0o444, 0
            with naming(self._place):
                self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    def close(self) -> ShardIndex:
        """Finish the shard, store its index and return it. If writing fails, as on a full disk, nothing is left behind.

        Raises:
            OSError: the disk (or TMPDIR) is full, or the like; the error names the file.
            DataError, StoreError: the store refuses the shard, or kept failing until the deadline.
        """
        try:
            with naming(self._place):
                self._tar.close()
                self._file.flush()
            if store.is_remote(self.path):
                store.upload(self.path, self._file)
            else:
                os.fsync(self._file.fileno())
                self._file.close()
                os.chmod(self._temporary, 0o644)
                os.replace(self._temporary, self.path)
        finally:
            self.abort()
        index = index_shard(self.path)
        store_index(index)
        return index

    def abort(self) -> None:
        """Discard what was written."""
        with suppress(OSError):  # closing flushes the buffer, which fails on a full disk
            self._file.close()
        if self._temporary:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
