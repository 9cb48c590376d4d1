"""A directory on disk or a prefix in an object store, with the few operations that checkpoints need."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.storage import store


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
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when it is not there."""
        return (self.path / name).read_bytes()

    def fetch(self, name: str) -> Path:
        """A local path with the file's content."""
        return self.path / name

    def names(self) -> list[str]:
        """Names of what lies directly below, sorted; empty when the folder does not exist."""
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def size(self, name: str) -> int | None:
        """Bytes; None when it is not there."""
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        """Removes a file; no error when it is not there."""
        (self.path / name).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Removes everything below."""
        shutil.rmtree(self.path, ignore_errors=True)


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
        store.write_bytes(f"{self.url}/{name}", b"".join(chunks))

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError when it is not there."""
        if not store.exists(f"{self.url}/{name}"):
            raise FileNotFoundError(f"{self.url}/{name}")
        return store.read_bytes(f"{self.url}/{name}")

    def fetch(self, name: str) -> Path:
        """Downloads once; the copy lives as long as this object."""
        with self._lock:
            if self._cache is None:
                self._cache = Path(tempfile.mkdtemp(prefix="cascade-checkpoint-"))
                weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)
        path = self._cache / name
        if not path.exists():
            partial = path.with_name(f"{name}.partial-{threading.get_ident()}")
            partial.write_bytes(self.read(name))
            partial.replace(path)
        return path

    def names(self) -> list[str]:
        """Names of what lies directly below, sorted; empty when the folder does not exist."""
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in store.list_dir(self.url)})

    def size(self, name: str) -> int | None:
        """Bytes; None when it is not there."""
        url = f"{self.url}/{name}"
        return store.size(url) if store.exists(url) else None

    def remove(self, name: str) -> None:
        """Removes a file; no error when it is not there."""
        store.remove(f"{self.url}/{name}")

    def remove_all(self) -> None:
        """Removes everything below."""
        for name in self.names():
            self.remove(name)


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
