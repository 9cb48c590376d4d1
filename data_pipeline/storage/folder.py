"""Directories on disk and prefixes in an object store, with the few operations that checkpoints need."""

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
from functools import partial
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.storage import store
from data_pipeline.storage.atomic import replacing, scratch
from data_pipeline.storage.retry import PATIENCE, persist
from data_pipeline.storage.s3 import Missing

PREFIX = "cascade-checkpoint-"
"""Prefix of the directories for copies, below TMPDIR."""
OWNER = ".owner"
"""File in such a directory that the process which made it keeps locked for as long as it lives."""
PIECE = 1 << 22
POLL_S = 0.02


class NoRoom(UserError):
    """The directory of temporary files is full or not writable; this says nothing about the checkpoint."""


class _Gone(OSError):
    """An object does not exist; unlike a missing directory of temporary files."""


_shared: Path | None = None
"""Directory in which the processes of this machine currently share their copies, if they do."""


def share_copies(directory: Path | None) -> None:
    """Make `fetch` download into this directory from now on, each file once for all processes that share it.

    None: each process downloads for itself again.
    """
    global _shared
    _shared = directory


def copies_place(name: str) -> Path:
    """Return the path of the directory for copies of this name."""
    return Path(tempfile.gettempdir(), f"{PREFIX}{name}")


class TemporaryCopies:
    """A new directory for copies, at `copies_place(name)`, until `close`; without a name, it gets a random one.

    Directories that killed processes have left there are removed first: they may hold whole checkpoints.
    """

    def __init__(self, name: str = "") -> None:
        _remove_abandoned()
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # not found by others before it is locked
        self._owned = open(hidden / OWNER, "w")  # noqa: SIM115
        fcntl.flock(self._owned, fcntl.LOCK_EX)
        self.path = hidden.rename(copies_place(name or hidden.name.removeprefix(f".{PREFIX}")))

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._owned.close()


def _remove_abandoned() -> None:
    for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError), open(owner, "r+") as file:  # locked by a living process, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes and threads; it is released if the holder dies."""
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_S)
        yield


class LocalFolder:
    """A directory. Files are on disk when `write` returns (fsync), and get their name only when complete (rename)."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def sub(self, name: str) -> LocalFolder:
        """Return the folder `name` in this one, without creating it."""
        return LocalFolder(str(self.path / name))

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file atomically. Raises `OSError`, which names it."""
        with replacing(self.path / name) as file:
            for chunk in chunks:
                file.write(chunk)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless its name is taken; return whether it was written."""
        self.path.mkdir(parents=True, exist_ok=True)
        return store.create(str(self.path / name), data)

    def read(self, name: str) -> bytes:
        """Read a file. Raises `FileNotFoundError` if it does not exist."""
        return persist(str(self.path / name), (self.path / name).read_bytes, PATIENCE)

    def fetch(self, name: str) -> Path:
        """Return a local path with the file's content, whether or not it exists."""
        return self.path / name

    def names(self) -> list[str]:
        """Return the names of files and folders in this one, sorted; empty if it does not exist."""
        return persist(str(self.path), lambda: sorted(os.listdir(self.path)) if self.path.is_dir() else [], PATIENCE)

    def sizes(self) -> dict[str, int]:
        """Return name -> bytes, or -1 for a directory; empty if the folder does not exist."""
        return store.local_sizes(str(self.path), PATIENCE)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        try:
            return persist(str(self.path / name), lambda: (self.path / name).stat().st_size, PATIENCE)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        """Remove a file; a missing one is no error."""
        (self.path / name).unlink(missing_ok=True)

    def remove_files(self, names: Sequence[str]) -> None:
        """Remove files, and the folder if it is then empty; missing files are no error."""
        for name in names:
            self.remove(name)
        with suppress(OSError):
            self.path.rmdir()


class RemoteFolder:
    """A prefix in an object store (`s3://bucket/prefix`)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._cache: Path | None = None
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.url

    def sub(self, name: str) -> RemoteFolder:
        """Return the folder `name` in this one, without creating it."""
        return RemoteFolder(f"{self.url}/{name}")

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file atomically. Raises `DataError` or `StoreError`."""
        store.write_bytes(f"{self.url}/{name}", b"".join(chunks), PATIENCE)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless its name is taken; return whether it was written."""
        return store.create(f"{self.url}/{name}", data, PATIENCE)

    def read(self, name: str) -> bytes:
        """Read a file. Raises `FileNotFoundError` if it does not exist."""
        try:
            return store.read_bytes(f"{self.url}/{name}", PATIENCE)
        except Missing as error:
            raise FileNotFoundError(f"{self.url}/{name}") from error

    def fetch(self, name: str) -> Path:
        """Download a file once, and return the path of the copy.

        The copy belongs to the processes that share copies (see `share_copies`), or else to this object, and lasts as
        long as they do.

        Raises:
            FileNotFoundError: the file does not exist.
            NoRoom: the directory of temporary files is full or not writable.
        """
        try:
            path = self._place() / name
            if not path.exists():
                with _locked(path.with_name(f"{name}.lock")):
                    if not path.exists():
                        self._download(name, path)
        except _Gone as error:
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from error
        except OSError as error:
            if error.errno is None:
                raise
            raise NoRoom(
                f"{scratch()}: no room for a copy of {self.url}/{name} ({error.strerror}); "
                f"point TMPDIR at a disk with room for a whole checkpoint"
            ) from error
        return path

    def _place(self) -> Path:
        """Return the directory for copies."""
        with self._lock:
            if _shared is not None:
                place = _shared / hashlib.sha256(self.url.encode()).hexdigest()[:16]
                place.mkdir(exist_ok=True)
                return place
            if self._cache is None:
                copies = TemporaryCopies()
                weakref.finalize(self, copies.close)
                self._cache = copies.path
            return self._cache

    def _download(self, name: str, path: Path) -> None:
        partial = path.with_name(f"{name}.partial")
        try:
            with store.open_stream(f"{self.url}/{name}", patience=PATIENCE) as stream, open(partial, "wb") as file:
                while piece := stream.read(PIECE):
                    file.write(piece)
            partial.replace(path)
        except Missing as error:
            raise _Gone(errno.ENOENT, "it is missing", f"{self.url}/{name}") from error
        finally:
            partial.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of files and folders in this one, sorted; empty if it does not exist."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Return name -> bytes, or -1 for a directory; empty if the folder does not exist."""
        return store.sizes(self.url, PATIENCE)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        url = f"{self.url}/{name}"
        return store.size(url, PATIENCE) if store.exists(url, PATIENCE) else None

    def remove(self, name: str) -> None:
        """Remove a file; a missing one is no error."""
        self.remove_files([name])

    def remove_files(self, names: Sequence[str]) -> None:
        """Remove files; missing ones are no error."""
        store.remove_files(self.url, names, PATIENCE)


Folder = LocalFolder | RemoteFolder


def open_folder(path: str) -> Folder:
    """Return the folder at a URL (`s3://...`) or path; nothing is created before the first write.

    Raises:
        DataError: it is almost a URL, such as `s3:/bucket/x`.
    """
    return RemoteFolder(path) if "://" in path else LocalFolder(store.local_path(path))


def in_cache(path: str, index: str) -> str:
    """Resolve a name in the Hugging Face cache to its snapshot directory.

    Args:
        path: `owner/name`, or a `models--owner--name` directory of such a cache that has no `index` itself.
        index: name of the file that marks a bundle.

    Returns:
        The snapshot directory; `path` unchanged if there is none.
    """
    return persist(path, partial(_in_cache, path, index), PATIENCE)


def _in_cache(path: str, index: str) -> str:
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
    except Exception:  # not cached or no such name; reading `path` then reports the error
        return path
