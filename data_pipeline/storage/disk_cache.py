"""A disk cache for pieces of remote shards, shared by all processes of a node, that never exceeds its limit.

Pieces of a few megabytes are named by the object's etag and size, so that objects never mix and an outdated piece is
never found. A piece is written to a temporary file and renamed. Room is reserved before anything is written: a counter
under a lock tracks what pieces and temporary files may take together. When it would exceed the limit, the directory is
recounted, files left by killed processes are removed, and then the least recently used pieces are evicted.
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
"""Fraction of the limit down to which a full cache is emptied."""

Fetch = Callable[[int, int], bytes]
"""(first byte, end byte) -> these bytes of the object; may raise."""


class DiskCache:
    """A cache of pieces of objects in a directory.

    Args:
        folder: `data.cache_dir`, created if needed.
        limit: most bytes that the cache may take.
        piece: bytes per piece.

    Raises:
        ConfigError: the folder cannot be created or written.
    """

    def __init__(self, folder: str, limit: int, piece: int = PIECE) -> None:
        self.folder, self.limit, self.piece = Path(folder).expanduser(), limit, piece
        try:
            self._make_folders()
        except OSError as error:
            words = f"{error.strerror or error}; give a directory that can be written"
            raise ConfigError(f"data.cache_dir={folder}: {words}") from error

    def _make_folders(self) -> None:
        for name in ("pieces", "partial", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "total").touch()

    def read(self, etag: str, size: int, begin: int, end: int, fetch: Fetch, fresh: bool = False) -> bytes:
        """Return bytes [begin, end) of the object with this etag and size, from disk if cached.

        Args:
            fetch: gets missing bytes; what it raises is passed on.
            fresh: ignore and replace cached pieces, because they did not verify.
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
        """Return a whole small object, from disk if cached; None if it does not exist (`fetch` raised DataError).

        The caller verifies the content.

        Args:
            name: a name that changes with the content.
            fetch: gets the object.
            fresh: ignore and replace the cached copy.
        """
        path = self.folder / "pieces" / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}-whole"
        found = None if fresh else _read(path)
        if found is not None:
            return found
        try:
            return self._bring_whole(path, fetch, fresh)
        except DataError:
            return None

    def _bring_whole(self, path: Path, fetch: Callable[[], bytes], fresh: bool) -> bytes:
        """Fetch and cache a whole object, or do without the cache if it has become unusable."""
        try:
            with self._locked(_lock_of(path)):
                found = None if fresh else _read(path)
                if found is None:
                    found, partial = fetch(), self._new_partial()
                    if self._reserve(len(found), partial):
                        self._keep(found, partial, path)
                return found
        except OSError as error:  # from the cache itself: stores raise other errors
            self._say(error)
        return fetch()

    def _bring_or_pass(self, path: Path, low: int, high: int, fetch: Fetch, fresh: bool) -> bytes:
        """Like `_bring`, but recreate the folder if it was deleted, and do without it if it has become unusable."""
        for _ in range(2):
            try:
                return self._bring(path, low, high, fetch, fresh)
            except OSError as error:  # from the cache itself: stores raise other errors
                self._say(error)
                with contextlib.suppress(OSError):
                    self._make_folders()
        return fetch(low, high)

    def _bring(self, path: Path, low: int, high: int, fetch: Fetch, fresh: bool) -> bytes:
        """Fetch and cache a piece. If several processes want the same one, one fetches it while the others wait."""
        with self._locked(_lock_of(path)):
            found = None if fresh else _read(path, size=high - low)
            if found is not None:
                return found
            partial = self._new_partial()
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

    def _new_partial(self) -> Path:
        return self.folder / "partial" / f"{os.getpid()}-{uuid.uuid4().hex}"

    def _keep(self, data: bytes, partial: Path, path: Path) -> None:
        """Store a piece; on a full disk it is just not cached."""
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
        """Reserve `size` bytes and create the temporary file, evicting pieces as needed; False if there is no room."""
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
        """Release a reservation and remove the temporary file."""
        with self._locked("total") as total:
            partial.unlink(missing_ok=True)
            taken = _count(total)
            if taken is not None:
                _write_count(total, max(taken - size, 0))

    def _make_room(self, target: int) -> int:
        """Remove abandoned files, then the least recently used pieces, until the cache takes at most `target` bytes.

        Returns the bytes still taken, counting a whole piece for every file being written.
        """
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
        """Hold an exclusive lock among processes and threads; yields the descriptor of the locked file."""
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked in the meantime also has the file open
            os.close(handle)


def _lock_of(path: Path) -> str:
    """Return the name of the lock of a cached file, which it shares with some others."""
    return f"locks/{zlib.crc32(path.name.encode()) % _LOCKS:03d}"


def _read(path: Path, begin: int = 0, end: int | None = None, size: int | None = None) -> bytes | None:
    """Return bytes [begin, end) of a cached file and mark it as used.

    None: it is not cached, its size is not `size`, or its disk is broken.
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.fstat(handle).st_size
            if size not in (None, there):
                return None
            count = (there if end is None else end) - begin
            data = os.pread(handle, count, begin)
            os.utime(handle)
        finally:
            os.close(handle)
        return data if len(data) == count else None
    return None


def _count(handle: int) -> int | None:
    text = os.pread(handle, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write_count(handle: int, value: int) -> None:
    os.pwrite(handle, b"%020d" % value, 0)


def _is_abandoned(path: Path) -> bool:
    """Return whether a temporary file's process is dead, or nobody has touched the file for an hour."""
    try:
        os.kill(int(path.name.partition("-")[0]), 0)
        return time.time() - path.stat().st_mtime > _ABANDONED_S
    except ProcessLookupError:
        return True
    except (PermissionError, FileNotFoundError, ValueError):
        return False
