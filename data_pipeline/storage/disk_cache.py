"""A disk cache of pieces of remote shards, shared by all processes of a node, that never grows beyond its limit.

Pieces of some megabytes lie under a name made of the object's etag and size, so that two objects never mix and a
changed one is not found. A piece is written to a temporary file and renamed. Room is reserved before a byte is
written: a counter under a lock holds what pieces and temporary files may take together; when it would pass the limit,
the directory is counted afresh, what a killed process left is removed, and then the pieces that were not used for
longest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.common.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PIECE = 8 << 20
_LOCKS = 256
_ABANDONED_S = 3600.0
_REFILL = 0.9
"""Share of the limit to which a full cache is emptied."""

Fetch = Callable[[int, int], bytes]
"""(first byte, end byte) -> those bytes of the object, or an exception."""


class DiskCache:
    """Pieces of objects under `folder`, together never more than `limit` bytes.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, limit: int, piece: int = PIECE) -> None:
        self.folder, self.limit, self.piece = Path(folder).expanduser(), limit, piece
        try:
            self._make_folders()
        except OSError as error:
            raise ConfigError(f"data.cache_dir={folder}: {error.strerror or error}") from error

    def _make_folders(self) -> None:
        for name in ("pieces", "partial", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "total").touch()

    def read(self, etag: str, size: int, begin: int, end: int, fetch: Fetch, fresh: bool = False) -> bytes:
        """Bytes [begin, end) of the object with this etag and size, from disk where they are there.

        Args:
            fetch: brings what is missing.
            fresh: do not trust what is there: it did not verify.
        """
        name = hashlib.blake2b(f"{etag}/{size}/{self.piece}".encode(), digest_size=12).hexdigest()
        parts = []
        for number in range(begin // self.piece, -(-end // self.piece)):
            low, high = number * self.piece, min((number + 1) * self.piece, size)
            first, last = max(begin, low), min(end, high)
            path = self.folder / "pieces" / f"{name}-{number:06d}"
            part = None if fresh else _read(path, first - low, last - low, high - low)
            if part is None:
                part = self._bring_or_pass(path, low, high, fetch, fresh)[first - low : last - low]
            parts.append(part)
        return b"".join(parts)

    def whole(self, name: str, fetch: Callable[[], bytes], fresh: bool = False) -> bytes | None:
        """A small object that the caller verifies, under a name that is another when its content is; None: there is
        none (`fetch` raised DataError).

        Args:
            fetch: brings it.
            fresh: do not take what is there.
        """
        path = self.folder / "pieces" / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}-whole"
        try:
            if not fresh and path.exists():
                os.utime(path)
                return path.read_bytes()
            with self._locked(f"locks/{zlib.crc32(path.name.encode()) % _LOCKS:03d}"):
                if not fresh and path.exists():
                    return path.read_bytes()
                data = fetch()
                partial = self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"
                if self._reserve(len(data), partial):
                    self._keep(data, partial, path)
                return data
        except DataError:
            return None
        except OSError as error:  # the cache's own: a store fails with other kinds
            self._say(error)
        try:
            return fetch()
        except DataError:
            return None

    def _bring_or_pass(self, path: Path, low: int, high: int, fetch: Fetch, fresh: bool) -> bytes:
        """The same as `_bring`; a folder that was deleted meanwhile is made again, and one that cannot be used any more
        costs speed, not the run."""
        for _ in range(2):
            try:
                return self._bring(path, low, high, fetch, fresh)
            except OSError as error:  # the cache's own: a store fails with other kinds
                self._say(error)
                with contextlib.suppress(OSError):
                    self._make_folders()
        return fetch(low, high)

    def _bring(self, path: Path, low: int, high: int, fetch: Fetch, fresh: bool) -> bytes:
        """A piece that is not there; of several that want the same one, one fetches and the others wait for it."""
        with self._locked(f"locks/{zlib.crc32(path.name.encode()) % _LOCKS:03d}"):
            found = None if fresh else _read(path, 0, high - low, high - low)
            if found is not None:
                return found
            partial = self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"
            reserved = False
            try:
                reserved = self._reserve(high - low, partial)
                data = fetch(low, high)
                if reserved:
                    self._keep(data, partial, path)
                return data
            except BaseException:
                if reserved:
                    self._release(partial, high - low)
                raise

    def _keep(self, data: bytes, partial: Path, path: Path) -> None:
        """Puts a piece in its place; a full disk only means that it is not kept."""
        try:
            replaces = path.exists()
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            self._say(error)
            replaces = True
        if replaces:
            self._release(partial, len(data))

    def _say(self, error: OSError) -> None:
        logger.warning("data.cache_dir=%s: %s; this piece is not cached", self.folder, error.strerror or error)

    def _reserve(self, size: int, partial: Path) -> bool:
        """Takes `size` bytes of the limit for a file that it begins, emptying the cache as needed; False when others
        hold too much of it."""
        with self._locked("total") as total:
            taken = _count(total)
            if taken is None or taken + size > self.limit:
                taken = self._make_room(int(self.limit * _REFILL) - size)
            fits = taken + size <= self.limit
            try:
                if fits:
                    partial.touch()
                _write_count(total, taken + size * fits)
            except OSError as error:
                self._say(error)
                partial.unlink(missing_ok=True)
                return False
            return fits

    def _release(self, partial: Path, size: int) -> None:
        """Gives a reservation back."""
        with self._locked("total") as total:
            partial.unlink(missing_ok=True)
            taken = _count(total)
            if taken is not None:
                _write_count(total, max(taken - size, 0))

    def _make_room(self, target: int) -> int:
        """Removes abandoned files, then the least recently used pieces, until they take `target` bytes; returns what
        the rest takes, with a whole piece for every file that is being written."""
        writing = 0
        for path in (self.folder / "partial").iterdir():
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
            else:
                writing += self.piece
        pieces = []
        with os.scandir(self.folder / "pieces") as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    pieces.append((status.st_mtime_ns, status.st_size, entry.path))
        taken = writing + sum(size for _, size, _ in pieces)
        for _, size, path_name in sorted(pieces):
            if taken <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path_name)
            taken -= size
        return taken

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """An exclusive lock between processes and threads; gives the locked file's descriptor."""
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has the file open as well
            os.close(handle)


def _read(path: Path, begin: int, end: int, size: int) -> bytes | None:
    """Bytes [begin, end) of a cached piece, which counts as used now; None when it is not there whole."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # not there, or the disk is broken
        return None
    try:
        if os.fstat(handle).st_size != size:
            return None
        data = os.pread(handle, end - begin, begin)
        os.utime(handle)
    finally:
        os.close(handle)
    return data if len(data) == end - begin else None


def _count(handle: int) -> int | None:
    text = os.pread(handle, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write_count(handle: int, value: int) -> None:
    os.pwrite(handle, b"%020d" % value, 0)


def _is_abandoned(path: Path) -> bool:
    """A temporary file whose process is dead, or that nobody has touched for an hour."""
    try:
        os.kill(int(path.name.partition("-")[0]), 0)
        return time.time() - path.stat().st_mtime > _ABANDONED_S
    except ProcessLookupError:
        return True
    except (PermissionError, FileNotFoundError, ValueError):
        return False
