"""Divides an evaluation into parts that are done once, so that preempted jobs resume and any number of ranks share
them.

A part contains the features of some samples and of as many reference pictures. Its file is in a directory named by a
fingerprint of everything that the pictures depend on, so parts of another evaluation are never mixed in. The rank that
makes a part does not matter: noise depends on (seed, prompt, number), and batches never cross parts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import PATIENCE, load_files, persist

FOLDER = "parts"
LARGE = ("x/", "y/", "text", "shown/", "original")
"""Prefixes of arrays whose rows are read on demand, so that memory does not grow with the number of pictures."""


class Span(NamedTuple):
    """Consecutive rows in one file."""

    file: Path
    offset: int
    """Offset of the first row in bytes."""
    rows: int


class StoredRows:
    """Rows of one array in several files; indexing by a slice, a number or a sequence of numbers reads them."""

    def __init__(self, spans: Sequence[Span], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """`shape` and `dtype` are those of a single row."""
        self._spans, self._row, self.dtype = [span for span in spans if span.rows], shape, dtype
        self._ends = np.cumsum([span.rows for span in self._spans])
        self._items = int(np.prod(shape, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return (len(self), *self._row)

    def first(self, count: int) -> StoredRows:
        """Return the first rows, up to `count`, without reading them."""
        before = [0, *(int(end) for end in self._ends)]
        spans = [
            Span(s.file, s.offset, min(s.rows, max(0, count - at))) for s, at in zip(self._spans, before, strict=False)
        ]
        return StoredRows(spans, self._row, self.dtype)

    def __getitem__(self, which: slice | int | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            return self._read(start, max(start, stop))[::step] if step > 0 else self[:][which]
        if isinstance(which, (int, np.integer)):
            place = range(len(self))[which]
            return self._read(place, place + 1)[0]
        rows = [self[int(place)] for place in which]
        return np.stack(rows) if rows else np.zeros((0, *self._row), self.dtype)

    def _read(self, start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, *self._row), self.dtype)
        flat = found.reshape(stop - start, self._items)
        first = int(np.searchsorted(self._ends, start, side="right"))
        at = start
        for span, end in zip(self._spans[first:], self._ends[first:], strict=True):
            if at >= stop:
                break
            begin, count = at - (int(end) - span.rows), min(stop, int(end)) - at
            place = span.offset + begin * self._items * self.dtype.itemsize
            rows = flat[at - start : at - start + count]
            persist(str(span.file), partial(_read_at, span.file, place, rows), PATIENCE)
            at += count
        return found


class Parts:
    """The files of one evaluation in OUTPUT/parts/FINGERPRINT."""

    def __init__(self, output: Path, protocol: Mapping[str, Any], count: int) -> None:
        self.root = output / FOLDER
        self.folder = self.root / settings_sha256(protocol)
        self.count = count
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"{number:05d}.npz"

    def done(self, number: int) -> bool:
        """Return whether a part is done."""
        return persist(str(self.folder), self.file(number).exists, PATIENCE)

    def done_count(self) -> int:
        """Return the number of parts that are done."""
        return sum(self.done(number) for number in range(self.count))

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a part atomically."""
        with replacing(self.file(number), durable=False) as file:
            np.savez(file, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]

    def read(self) -> dict[str, Any]:
        """Return the arrays of all parts, concatenated in order; `LARGE` ones as `StoredRows`.

        Raises:
            DataError: a file is damaged.
        """
        small: dict[str, list[np.ndarray]] = {}
        large: dict[str, list[tuple[Span, tuple[int, ...], np.dtype[Any]]]] = {}
        for number in range(self.count):
            try:
                file = self.file(number)
                for name, value in load_files(str(file), partial(_open, file)).items():
                    if isinstance(value, tuple):
                        large.setdefault(name, []).append(value)
                    else:
                        small.setdefault(name, []).append(value)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(f"{self.file(number)}: damaged ({error}); delete it and repeat the command") from error
        found: dict[str, Any] = {name: np.concatenate(arrays) for name, arrays in small.items()}
        return found | {
            name: StoredRows([span for span, _, _ in parts], parts[0][1], parts[0][2]) for name, parts in large.items()
        }

    def forget_others(self) -> None:
        """Delete the parts of earlier evaluations in the same directory."""
        for folder in self.root.iterdir():
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)


def _read_at(file: Path, place: int, into: np.ndarray) -> None:
    """Fill an array with the bytes from `place` on. Raises OSError, or DataError if there are fewer."""
    with open(file, "rb") as stream:
        stream.seek(place)
        if stream.readinto(into.data.cast("B")) < into.nbytes:
            raise DataError(f"{file}: it ends too early; delete it and repeat the command")


def _open(file: Path) -> dict[str, Any]:
    """Read the small arrays of an npz file; for large ones, return the span of their rows, and the shape and dtype of a
    row.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: the file is damaged.
    """
    found: dict[str, Any] = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        if (wrong := archive.testzip()) is not None:
            raise ValueError(f"{wrong} does not match its checksum")
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if not name.startswith(LARGE):
                with archive.open(entry) as member:
                    found[name] = np.lib.format.read_array(member)
                continue
            raw.seek(entry.header_offset + 26)
            lengths = int.from_bytes(raw.read(2), "little") + int.from_bytes(raw.read(2), "little")
            raw.seek(lengths, 1)
            version = np.lib.format.read_magic(raw)
            reads = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = reads(raw)
            found[name] = (Span(file, raw.tell(), shape[0]), tuple(shape[1:]), dtype)
    return found


def settings_sha256(facts: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@contextmanager
def spilled(folder: Path, widths: Mapping[str, int]) -> Iterator[Spilled]:
    """Inside the context, collect features (N, d) of an unknown number of pictures in temporary files.

    Args:
        folder: directory for the files.
        widths: width d of the features, by extractor.
    """
    with tempfile.TemporaryDirectory(prefix=".features-", dir=folder) as place:
        yield Spilled(Path(place), widths)


class Spilled:
    """Features in files that grow; see `spilled`."""

    def __init__(self, folder: Path, widths: Mapping[str, int]) -> None:
        self._folder, self._widths = folder, dict(widths)
        self._counts = dict.fromkeys(widths, 0)

    def _file(self, name: str) -> Path:
        return self._folder / f"{list(self._widths).index(name)}"

    def add(self, name: str, features: np.ndarray) -> None:
        """Append features (B, d)."""
        with open(self._file(name), "ab") as file:
            file.write(np.ascontiguousarray(features, dtype=np.float32).data)
        self._counts[name] += len(features)

    def rows(self) -> dict[str, StoredRows]:
        """Return the features added so far, float32 (N, d) by extractor, read on demand."""
        return {
            name: StoredRows([Span(self._file(name), 0, self._counts[name])], (width,), np.dtype(np.float32))
            for name, width in self._widths.items()
        }
