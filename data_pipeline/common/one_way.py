"""A stream as a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class OneWay(io.RawIOBase):
    """A file that can be read once, from the front.

    Args:
        read: at most so many bytes, fewer than one at the end only.
        end: called when the file is closed.
    """

    def __init__(self, read: Callable[[int], bytes], end: Callable[[], object]) -> None:
        self._read, self._end = read, end

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes read into the buffer; 0 at the end."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Ends the stream, once."""
        if not self.closed:
            self._end()
        super().close()
