"""The rows of a table, whatever its format: the contract, and what the formats share."""

from __future__ import annotations

import os
import re
from array import array
from pathlib import Path
from typing import IO, Any, Protocol

from data_pipeline.common.errors import PASSING, DataError
from data_pipeline.content.members import IMAGE_EXTENSIONS
from data_pipeline.storage import store
from data_pipeline.storage.retry import persist

_PICTURE_NAME = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)})(#\d+)?$", re.IGNORECASE)


class Rows(Protocol):
    """A table whose rows are read by number. Thread-safe."""

    columns: list[str]

    def __len__(self) -> int: ...

    def row(self, number: int) -> dict[str, Any]:
        """Return the cells of row `number` by column.

        Raises:
            BadSample: `bad_row`, it cannot be parsed; the detail names the line.
        """
        ...


class FileLines:
    """Reads pieces of a file by number; if its file system fails for a while, it is opened again. Thread-safe.

    A file without a name, to which a table was unpacked, is not: its bytes are nowhere else.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._path = file.name if isinstance(file.name, str) else ""
        self._stamp = store.stamp(os.fstat(file.fileno()))
        self.starts, self.sizes, self.lines = array("q"), array("q"), array("q")

    def add(self, start: int, size: int, line: int) -> None:
        """Add a piece: its first byte, its bytes, and its line, from 1."""
        self.starts.append(start)
        self.sizes.append(size)
        self.lines.append(line)

    def read(self, number: int) -> bytes:
        """Return the piece with this number, from 0.

        Raises:
            DataError: the file had to be opened again, and has changed.
            StoreError: its file system kept failing.
        """
        try:
            return self._read(number)
        except OSError as error:
            if error.errno not in PASSING or not self._path:
                raise
            return persist(self._path, lambda: self._read_again(number))

    def _read(self, number: int) -> bytes:
        return os.pread(self._file.fileno(), self.sizes[number], self.starts[number])

    def _read_again(self, number: int) -> bytes:
        store.reopen(self._path, self._file.fileno(), self._stamp)
        return self._read(number)


def plain_name(column: str) -> str:
    """Normalize a column's name for comparison: lower case, no surrounding quotes, `_` for white space, `-` and `.`."""
    return re.sub(r"[\s\-.]+", "_", column.strip().strip("\"'").strip().lower())


def looks_like_picture(value: Any) -> bool:
    """Return whether a cell is the name of a picture file."""
    return isinstance(value, str) and _PICTURE_NAME.search(value.strip()) is not None


def no_table(path: Path, why: str) -> DataError:
    """Return the error about a file that is not a table; `why`, which may quote a library, is put on one line."""
    return DataError(f"prepare.source={path}: not a readable table ({' '.join(why.split())})")
