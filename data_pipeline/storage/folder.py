"""A directory on disk or a prefix in an object store, with the few operations that checkpoints need."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.storage import store
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import Patience
from data_pipeline.storage.s3 import Missing

PATIENCE = Patience(hurry=True)
"""Once a signal has come, a failing store does not keep the process for long."""
PREFIX = "cascade-checkpoint-"
"""Of directories for copies, below TMPDIR."""
PIECE = 1 << 22
POLL_S = 0.02


class NoRoom(UserError):
    """The directory of temporary files is full or cannot be written; says nothing about the checkpoint."""


_shared: Path | None = None
"""Where the processes of this machine keep their copies together, while they do."""


def share_copies(directory: Path | None) -> None:
    """From now on `fetch` downloads into this directory, each file once for all processes that name it; None: each
    process for itself again."""
    global _shared
    _shared = directory


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process and thread at a time; a holder that dies lets go."""
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
        yield


class LocalFolder:
    """Files are on disk when `write` returns (fsync), and appear under their name only when complete (rename)."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def sub(self, name: str) -> LocalFolder:
        """The folder `name` below this one; nothing is created."""
        return LocalFolder(str(self.path / name))

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Writes a file; it appears under its name only when complete."""
        with replacing(self.path / name) as file:
            for chunk in chunks:
                file.write(chunk)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file unless its name is taken; returns whether it did."""
        self.path.mkdir(parents=True, exist_ok=True)
        return store.create(str(self.path / name), data)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when it is not there."""
        return (self.path / name).read_bytes()

    def fetch(self, name: str) -> Path:
        """A local path with the file's content."""
        return self.path / name

    def names(self) -> list[str]:
        """Names of what lies directly below, sorted; empty when the folder does not exist."""
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def sizes(self) -> dict[str, int]:
        """Name -> bytes, -1 for a directory; empty when it does not exist."""
        found = {}
        try:
            for entry in os.scandir(self.path):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    found[entry.name] = entry.stat().st_size if entry.is_file() else -1
        except FileNotFoundError:
            return {}
        return found

    def size(self, name: str) -> int | None:
        """Bytes; None when it is not there."""
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        """Removes a file; no error when it is not there."""
        (self.path / name).unlink(missing_ok=True)

    def remove_files(self, names: Sequence[str]) -> None:
        """Missing ones are no error; the folder goes with its last file."""
        for name in names:
            self.remove(name)
        with suppress(OSError):
            self.path.rmdir()


class RemoteFolder:
    """A prefix of an object store (`s3://bucket/prefix`), through data_pipeline/storage/store.py."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._cache: Path | None = None
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.url

    def sub(self, name: str) -> RemoteFolder:
        """The folder `name` below this one; nothing is created."""
        return RemoteFolder(f"{self.url}/{name}")

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Writes a file; it appears under its name only when complete."""
        store.write_bytes(f"{self.url}/{name}", b"".join(chunks), PATIENCE)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file unless its name is taken; returns whether it did."""
        return store.create(f"{self.url}/{name}", data, PATIENCE)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when it is not there."""
        try:
            return store.read_bytes(f"{self.url}/{name}", PATIENCE)
        except Missing as error:
            raise FileNotFoundError(f"{self.url}/{name}") from error

    def fetch(self, name: str) -> Path:
        """Downloads once: for all processes that share their copies, else for this object. The copy lives as long.

        Raises:
            NoRoom: the directory of temporary files cannot take it.
        """
        path = self._place() / name
        if not path.exists():
            try:
                with _locked(path.with_name(f"{name}.lock")):
                    if not path.exists():
                        self._download(name, path)
            except OSError as error:
                if isinstance(error, FileNotFoundError) or error.errno is None:
                    raise
                raise NoRoom(
                    f"TMPDIR={tempfile.gettempdir()}: no room for a copy of {self.url}/{name} ({error.strerror}); "
                    f"point TMPDIR at a disk with room for a whole checkpoint"
                ) from error
        return path

    def _place(self) -> Path:
        """Where copies go."""
        with self._lock:
            if _shared is not None:
                place = _shared / hashlib.sha256(self.url.encode()).hexdigest()[:16]
                place.mkdir(exist_ok=True)
                return place
            if self._cache is None:
                self._cache = Path(tempfile.mkdtemp(prefix=PREFIX))
                weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)
            return self._cache

    def _download(self, name: str, path: Path) -> None:
        partial = path.with_name(f"{name}.partial")
        try:
            with store.open_stream(f"{self.url}/{name}", patience=PATIENCE) as stream, open(partial, "wb") as file:
                while piece := stream.read(PIECE):
                    file.write(piece)
            partial.replace(path)
        except Missing as error:
            raise FileNotFoundError(errno.ENOENT, "it is missing", f"{self.url}/{name}") from error
        finally:
            partial.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Names of what lies directly below, sorted; empty when the folder does not exist."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Name -> bytes, -1 for a directory; empty when it does not exist."""
        return store.sizes(self.url, PATIENCE)

    def size(self, name: str) -> int | None:
        """Bytes; None when it is not there."""
        url = f"{self.url}/{name}"
        return store.size(url, PATIENCE) if store.exists(url, PATIENCE) else None

    def remove(self, name: str) -> None:
        """Removes a file; no error when it is not there."""
        self.remove_files([name])

    def remove_files(self, names: Sequence[str]) -> None:
        """Missing ones are no error."""
        store.remove_files(self.url, names, PATIENCE)


Folder = LocalFolder | RemoteFolder


def open_folder(path: str) -> Folder:
    """`s3://...` or a directory (created by the first write)."""
    return RemoteFolder(path) if "://" in path else LocalFolder(path)


def in_cache(path: str, index: str) -> str:
    """The snapshot directory of `owner/name` in the Hugging Face cache, or of a `models--owner--name` directory of such
    a cache, if there is one (and the path itself holds no `index`); else the path itself."""
    snapshots = Path(path) / "snapshots"
    if snapshots.is_dir() and not (Path(path) / index).exists():
        named = Path(path) / "refs" / "main"
        found = [snapshots / named.read_text().strip()] if named.is_file() else sorted(snapshots.iterdir())
        return str(found[-1]) if found else path
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, local_files_only=True)
    except Exception:  # not cached, or no such name: either way there is nothing to read, which `read` reports
        return path
