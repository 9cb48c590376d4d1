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
        if not isinstance(path, (str, os.PathLike)) or not str(path):
            raise DataError(f"ShardWriter: path={path!r}: give the path of the shard, for example 00000.tar")
        self.path = str(path) if store.is_remote(str(path)) else store.local_path(str(path))
        self._place = scratch() if store.is_remote(self.path) else self.path
        self.samples = 0
        self._index: ShardIndex | None = None
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
            members: bytes by extension, at least one.

        Raises:
            DataError: the key, after its last slash, is empty or has a dot, or an extension is empty or has a slash, or
                one of them contains NUL: readers would find another key. Or a member is not bytes. Nothing of the
                sample is written.
        """
        stem = str(key).rpartition("/")[2]
        names = [f"{key}.{extension}" for extension in members]
        if not stem or "." in stem or any("/" in name or not name for name in members) or "\0" in "".join(names):
            raise DataError(
                f"{self.path}: key {key!r} with {list(members)}: readers split a name at the first dot after its last "
                "slash, so the key must end in a name without dots, and extensions must have no slash; nor may there "
                "be a NUL"
            )
        if not members:
            raise DataError(f"{self.path}: key {key!r}: give at least one member")
        for extension, data in members.items():
            if not isinstance(data, (bytes, bytearray, memoryview)):
                kind = type(data).__name__
                raise DataError(f"{self.path}: key {key!r}: member .{extension} is {kind}; give bytes (TEXT.encode())")
        for name, data in zip(names, members.values(), strict=True):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = memoryview(data).nbytes, 0o444, 0
            with naming(self._place):
                self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    def close(self) -> ShardIndex:
        """Finish the shard, store its index and return it, also when called again. If writing fails, as on a full disk,
        nothing is left behind.

        Raises:
            OSError: the disk (or TMPDIR) is full, or the like; the error names the file.
            DataError, StoreError: the store refuses the shard, or kept failing until the deadline.
        """
        if self._index is not None:
            return self._index
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
        self._index = index_shard(self.path)
        store_index(self._index)
        return self._index

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
