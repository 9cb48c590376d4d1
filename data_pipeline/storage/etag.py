"""Checks downloaded bytes against an object's ETag, as far as an ETag can tell."""

from __future__ import annotations

import hashlib
import re

_MIB = 1 << 20
PARTS = (5, 6, 7, 8, 10, 12, 15, 16, 20, 24, 25, 32, 48, 50, 64, 96, 100, 128, 200, 250, 256, 500, 512, 1000, 1024)
"""Part sizes that uploaders use, MiB."""


class EtagCheck:
    """Computes the ETag of an object, assuming that it was uploaded as a whole (its MD5) or in parts of a usual size.

    Args:
        etag: the ETag from the store. An ETag of another form, as of some encrypted objects, confirms nothing.
        size: size of the object, bytes.
    """

    def __init__(self, etag: str, size: int) -> None:
        form = re.fullmatch(r"([0-9a-f]{32})(?:-([0-9]{1,5}))?", etag)
        count = int(form[2] or 0) if form else -1  # -1: no number of parts fits
        whole = max(size, 1)
        parts = {min(part * _MIB, whole) for part in PARTS if -(-size // (part * _MIB)) == count}
        self._etag, self._in_parts = etag, count > 0
        self._tries = [_Parts(part) for part in ([whole] if count == 0 else parts)]

    def update(self, data: bytes) -> None:
        """Add the next bytes of the object."""
        for one in self._tries:
            one.update(data)

    def confirmed(self) -> bool:
        """Return whether the ETag confirms the bytes; False if they differ or the ETag cannot tell."""
        return any(one.etag(self._in_parts) == self._etag for one in self._tries)


class _Parts:
    """The MD5s of an object's parts, for one part size."""

    def __init__(self, size: int) -> None:
        self._size, self._left = size, size
        self._part = hashlib.md5(usedforsecurity=False)
        self._done: list[bytes] = []

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not self._left:
                self._next()
            piece, view = view[: self._left], view[self._left :]
            self._part.update(piece)
            self._left -= len(piece)

    def _next(self) -> None:
        self._done.append(self._part.digest())
        self._part, self._left = hashlib.md5(usedforsecurity=False), self._size

    def etag(self, in_parts: bool) -> str:
        if not in_parts:
            return self._part.hexdigest()
        parts = [*self._done, self._part.digest()]
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
