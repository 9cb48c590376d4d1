"""A stream wrapped as a file object."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class OneWay(io.RawIOBase):
    """A file that can only be read once, front to back.

    Args:
        read: returns at most that many bytes; none only at the end.
        end: called once, when the file is closed.
    """

    def __init__(self, read: Callable[[int], bytes], end: Callable[[], object]) -> None:
        self._read, self._end = read, end

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and return the number of bytes read; 0 at the end."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """End the stream; further calls do nothing."""
        if not self.closed:
            self._end()
        super().close()
