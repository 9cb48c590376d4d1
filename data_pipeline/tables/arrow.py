"""Parquet and Arrow, also as the `datasets` library writes them."""

from __future__ import annotations

import json
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.common.errors import PASSING, BadSample
from data_pipeline.storage import store
from data_pipeline.storage.retry import persist
from data_pipeline.tables.base import Rows, no_table

T = TypeVar("T")

_BATCH_BYTES, _BATCHES_KEPT, _LEAST_ROWS = 16 << 20, 3, 32
_ROWS_KEPT = 256
"""Threads read rows in about their order: of a stream, a row before those that are kept costs reading it again."""


class ArrowRows:
    """An Arrow file or stream, as saved by the `datasets` library; fast if rows are requested roughly in order.

    It is not memory-mapped: a disk that fails under a mapping ends the process instead of raising an error.

    Args:
        path: the file.
        stream: whether it is a stream, whose batches can only be read one after the other.
    """

    def __init__(self, path: Path, stream: bool) -> None:
        self._path, self._stamp, self._stream = path, store.stamp(os.stat(path)), stream
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, Any]] = deque()
        """The last batches, each with its number: a few, or as many as have `_ROWS_KEPT` rows."""
        self._starts = [0]
        for _, batch in self._opened(0):
            self._starts.append(self._starts[-1] + batch.num_rows)
        self.columns, self.classes = [str(name) for name in self._schema.names], class_names(self._schema)
        self._batches: Iterator[tuple[int, Any]] = iter(())
        self._next = -1

    def _opened(self, first: int) -> Iterator[tuple[int, Any]]:
        """Open the file and yield its batches from number `first` on, each with its number."""
        import pyarrow as pa

        source = pa.OSFile(str(self._path))
        if self._stream:
            reader = pa.ipc.open_stream(source)
            self._schema = reader.schema
            yield from ((number, batch) for number, batch in enumerate(reader) if number >= first)
        else:
            reader = pa.ipc.open_file(source)
            self._schema = reader.schema
            yield from ((number, reader.get_batch(number)) for number in range(first, reader.num_record_batches))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, number: int) -> dict[str, Any]:
        which = self._batch_of(number)
        with self._lock:
            batch = self._found(which)
        return _row(batch, self._starts[which], number)

    def _found(self, which: int) -> Any:
        """Return a batch; the file is opened again if its file system fails.

        Raises:
            DataError: it had to be opened again, and has changed.
            StoreError: its file system kept failing.
        """
        return _retried(self._path, lambda: self._batch(which), lambda: self._batch_again(which))

    def _batch_of(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1

    def _rows_after(self, batch: int, last: int) -> int:
        return self._starts[last + 1] - self._starts[batch + 1]

    def _batch_again(self, which: int) -> Any:
        store.check_unchanged(str(self._path), os.stat(self._path), self._stamp)
        self._next = -1
        return self._batch(which)

    def _batch(self, which: int) -> Any:
        from pyarrow import ArrowException

        for number, batch in self._kept:
            if number == which:
                return batch
        far = not self._stream and 0 <= self._next <= which and self._rows_after(self._next, which) > _ROWS_KEPT
        if not 0 <= self._next <= which or far:
            first = which if far else self._batch_of(max(self._starts[which] - _ROWS_KEPT, 0))
            self._batches, self._next = self._opened(first), first
            self._kept.clear()
        words = "it has become shorter"
        try:
            for number, batch in self._batches:
                self._kept.append((number, batch))
                self._next = number + 1
                while len(self._kept) > _BATCHES_KEPT and self._rows_after(self._kept[0][0], number) > _ROWS_KEPT:
                    self._kept.popleft()
                if number == which:
                    return batch
        except (ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's fault, not the file's
                raise
            words = str(error)
        raise no_table(self._path, f"it was readable when it was opened, but no longer: {words}")


class ParquetRows:
    """A Parquet file, read in batches of about 16 MB; fast if rows are requested roughly in order."""

    def __init__(self, path: Path) -> None:
        self._path, self._stamp = path, store.stamp(os.stat(path))
        self._file = self._opened()
        self.columns = [str(name) for name in self._file.schema_arrow.names]
        self.classes = class_names(self._file.schema_arrow)
        self._wanted: list[str] | None = None
        groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + group.num_rows)
        self._row_bytes = [max(group.total_byte_size // max(group.num_rows, 1), 1) for group in groups]
        self._kept: deque[tuple[int, Any]] = deque(maxlen=_BATCHES_KEPT)
        """The last batches, each with its first row's number."""
        self._batches: Iterator[Any] = iter(())
        self._next = -1
        self._lock = threading.Lock()

    def _opened(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self._path, pre_buffer=False, buffer_size=1 << 20)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def use(self, columns: Collection[str]) -> None:
        """Read only these columns from now on."""
        self._wanted = [name for name in self.columns if name in columns]

    def row(self, number: int) -> dict[str, Any]:
        with self._lock:
            start, batch = self._found(number)
        return _row(batch, start, number)

    def _found(self, number: int) -> tuple[int, Any]:
        """Return the batch that contains a row, and its first row; the file is opened again if its file system fails.

        Raises:
            DataError: it had to be opened again, and has changed.
            StoreError: its file system kept failing.
        """
        return _retried(self._path, lambda: self._batch(number), lambda: self._batch_again(number))

    def _batch_again(self, number: int) -> tuple[int, Any]:
        store.check_unchanged(str(self._path), os.stat(self._path), self._stamp)
        self._file, self._next = self._opened(), -1
        return self._batch(number)

    def _batch(self, number: int) -> tuple[int, Any]:
        while True:
            for start, batch in self._kept:
                if start <= number < start + len(batch):
                    return start, batch
            if not self._next <= number or self._next < 0 or self._is_far(number):
                self._open(number)
            batch = self._following()
            if batch is None:
                self._open(self._next)
                continue
            self._kept.append((self._next, batch))
            self._next += len(batch)

    def _following(self) -> Any:
        """Return the next batch; None at the end of a row group."""
        from pyarrow import ArrowException

        try:
            return next(self._batches, None)
        except (ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's fault, not the file's
                raise
            words = f"it is damaged at or after row {self._next + 1}: {error}; download or export the table again"
            raise no_table(self._path, words) from error

    def _is_far(self, number: int) -> bool:
        """Return whether the row is in a later row group, so that the rows before it can be skipped."""
        return self._starts[bisect_right(self._starts, number) - 1] > self._next

    def _open(self, number: int) -> None:
        """Begin to read at the row group that contains this row; row groups may be empty."""
        group = bisect_right(self._starts, number) - 1
        rows = min(max(_BATCH_BYTES // self._row_bytes[group], _LEAST_ROWS), 1 << 14)
        self._next = self._starts[group]
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=self._wanted, use_threads=False)


def _row(batch: Any, start: int, number: int) -> dict[str, Any]:
    """Return a row of a batch, whose first row is number `start`. Raises `BadSample` for text that is not UTF-8."""
    cells = ((name, batch.column(place)) for place, name in enumerate(batch.schema.names))
    try:  # reversed: of several columns with the same name, the first is used
        return dict(reversed([(name, _value(column[number - start])) for name, column in cells]))
    except UnicodeDecodeError as error:
        raise BadSample("bad_row", f"row {number + 1}: {error}") from error


def _retried(path: Path, read: Callable[[], T], read_again: Callable[[], T]) -> T:
    """Return what `read` does; if the file system fails in a way that passes, what `read_again` does, until the
    deadline."""
    try:
        return read()
    except OSError as error:
        if error.errno not in PASSING:
            raise
        return persist(str(path), read_again)


def arrow_rows(path: Path, head: bytes) -> Rows:
    """Open an Arrow file or stream, whose first bytes are `head`."""
    return ArrowRows(path, stream=head[:6] != b"ARROW1")


def class_names(schema: Any) -> dict[str, list[str]]:
    """Return the class names of columns with class numbers, as stored in the schema by the `datasets` library."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said["info"]["features"]
        found = {name: one.get("names") for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {str(name): [str(one) for one in names] for name, names in found.items() if isinstance(names, list)}


def _value(cell: Any) -> Any:
    """Convert a cell to a Python value, or to text if Python has no such type (nanoseconds)."""
    from pyarrow import ArrowException, types

    try:
        value = cell.as_py()
        return dict(value) if types.is_map(cell.type) and value is not None else value
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, NotImplementedError):
        with suppress(ArrowException):
            return cell.cast("string").as_py()
        return None
