"""Delimited text: CSV and its relatives, as spreadsheets, scripts and people write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

from data_pipeline.common.errors import BadSample
from data_pipeline.content.members import IMAGE_EXTENSIONS
from data_pipeline.tables.base import FileLines, looks_like_picture, plain_name

_LONGEST_QUOTED = 200
"""Most lines that a quoted cell may span; a quote that stays open longer is treated as an ordinary character."""
_LONGEST_PREAMBLE = 64
"""Most lines above the header that are searched for it."""
WIDE = {"caption", "captions", "text", "txt", "prompt", "description", "comment", "sentence", "title"}
"""Columns whose cells may contain unquoted separators."""
_SEPARATORS = (",", "\t", ";", "|")
_PICTURE_CELL = re.compile(
    rf'(?P<quote>["\']?)[^"\']{{0,300}}?\.({"|".join(IMAGE_EXTENSIONS)})(#\d+)?(?P=quote)\s*'.encode(), re.IGNORECASE
)
csv.field_size_limit(max(csv.field_size_limit(), 1 << 27))  # of the whole process: threads could not each set their own
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,3})?")


class DelimitedRows:
    """Delimited text, with or without a header; quoted cells may contain separators and line ends.

    An unquoted caption that contains the separator is put back together if a header tells the number of cells.
    """

    def __init__(self, file: IO[bytes], known: Collection[str], encoding: str | None = None) -> None:
        self._lines, self._literal = FileLines(file), set[int]()
        self.first_line, self.has_preamble, header = _find_header(file, known)
        self.columns, self._separator, self._quote, self._headless = header
        self._wide = next((i for i, name in enumerate(self.columns) if plain_name(name) in WIDE), len(self.columns) - 1)
        self.joined: set[int] = set()
        """Number of rows read so far whose caption contains the separator unquoted."""
        self._encoding, self._otherwise = "utf-8", encoding
        self._find_rows(file, self.first_line, skip=0 if self._headless else 1)

    def __len__(self) -> int:
        return len(self._lines.starts)

    def _find_rows(self, file: IO[bytes], first: int, skip: int) -> None:
        """Record the offset of each row from line `first` on, but not of the first `skip`, and detect the encoding."""
        wide_good = wide_bad = False
        file.seek(0)
        marks = self._separator.encode(), self._quote.encode()
        for start, line, content, literal in _records(file, *marks, len(self.columns)):
            if line < first:
                continue
            if not content.strip():
                continue
            if skip:
                skip -= 1
                continue
            if not content.isascii():
                try:
                    content.decode()
                    wide_good = True
                except UnicodeDecodeError:
                    wide_bad = True
            if literal:
                self._literal.add(len(self))
            self._lines.add(start, len(content), line)
        if wide_bad and not wide_good:
            self._encoding = self._otherwise or "cp1252"

    @property
    def encoding(self) -> str:
        """`utf-8`; `cp1252` if there are non-ASCII rows and none of them is valid UTF-8."""
        return self._encoding

    def row(self, number: int) -> dict[str, Any]:
        raw = self._lines.read(number)
        errors = "surrogateescape" if self._encoding == "utf-8" else "replace"
        text = raw.decode(self._encoding, errors).lstrip("\ufeff")
        quote = self._quote
        literal = number in self._literal or (self._headless and quote in text and not text.rstrip().endswith(quote))
        cells = _cells(text, self._separator, quote, literal, len(self.columns) if self._headless else 0)
        if not self._headless and not literal:
            if "\r" in text.rstrip("\r\n") and _ends_inside(text, self._separator, quote):
                words = "a row ends inside it with a carriage return: save the table with one kind of line ends"
                raise BadSample("bad_row", f"line {self._lines.lines[number]}: {words}")
            if f"\\{quote}" in text:
                cells = _escaped(text, self._separator, quote, len(self.columns)) or cells
        extra = len(cells) - len(self.columns)
        if extra < 0:
            words = (
                f"it has {len(cells)} cells, but the table has {len(self.columns)} columns ({', '.join(self.columns)})"
            )
            raise BadSample("bad_row", f"line {self._lines.lines[number]}: {words}")
        if extra and any(cells[len(self.columns) :]):
            end = self._wide + extra + 1
            cells[self._wide : end] = [
                _between(text, cells, self._separator, self._wide, extra, literal or quote not in text)
            ]
            self.joined.add(number)
        return dict(zip(self.columns, cells, strict=False))


def typed(cell: Any) -> Any:
    """Convert a cell of a text table to a JSON value: a number, true, false, null, or the text unchanged."""
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if not text:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    match = _NUMBER.fullmatch(text)
    if not match:
        return cell
    return float(text) if match[2] or match[3] else int(text)


def _cells(text: str, separator: str, quote: str, literal: bool, most: int) -> list[str]:
    line = text.rstrip("\r\n")
    if most:  # without a header there are two cells: the name of the picture and the caption
        parts = line.split(separator, most - 1) if separator != " " else line.split(None, most - 1)
        return [_unquoted(part.strip(), quote) for part in parts]
    source = io.StringIO(line, newline="")
    try:
        rows = csv.reader(
            source,
            delimiter=separator,
            quotechar=quote,
            skipinitialspace=True,
            quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL,
        )
        return next(rows, [])
    except csv.Error:
        return line.split(separator)


def _ends_inside(text: str, separator: str, quote: str) -> bool:
    """Return whether the CSV module sees more than one row in a row."""
    try:
        lines = io.StringIO(text.rstrip("\r\n"), newline="")
        return sum(1 for _ in csv.reader(lines, delimiter=separator, quotechar=quote)) > 1
    except csv.Error:
        return False


def _escaped(text: str, separator: str, quote: str, columns: int) -> list[str]:
    """Return the cells of a row in which quotes are escaped by backslashes; empty if they are not."""

    def parse(escape: str | None) -> list[str]:
        source = io.StringIO(text.rstrip("\r\n"), newline="")
        with suppress(csv.Error):
            return next(
                csv.reader(
                    source,
                    delimiter=separator,
                    quotechar=quote,
                    skipinitialspace=True,
                    strict=True,
                    escapechar=escape,
                ),
                [],
            )
        return []

    cells = [] if parse(None) else parse("\\")
    return cells if len(cells) == columns else []


def _unquoted(cell: str, quote: str) -> str:
    return cell[1:-1].replace(2 * quote, quote) if len(cell) > 1 and cell[0] == cell[-1] == quote else cell


def _between(text: str, cells: Sequence[str], separator: str, wide: int, extra: int, literal: bool) -> str:
    """Rejoin cells split at unquoted separators, with separators and spaces as in the original if possible."""
    if literal:
        raw = text.rstrip("\r\n").split(separator)
        if len(raw) == len(cells):
            return separator.join(raw[wide : wide + extra + 1]).strip()
    return f"{separator} ".join(cells[wide : wide + extra + 1])


_Header = tuple[list[str], str, str, bool]
"""Columns, separator, quotation mark, and whether the header is missing."""


def _find_header(file: IO[bytes], known: Collection[str]) -> tuple[int, bool, _Header]:
    """Return the line of the header or first row, from 1, whether text stands above it, and what `_header` says of it.

    Above it may stand blank lines, Excel's `sep=;`, comments, or a title.
    """
    separator, lines = "", list[tuple[int, bytes]]()
    file.seek(0)
    for number, line in enumerate(iter(lambda: file.readline(1 << 20), b""), 1):
        line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
        if not lines and re.fullmatch(rb"(?i)sep=.", line):
            separator = line[-1:].decode()
        elif line.strip():
            lines.append((number, line))
            found = _header(line.lstrip(b"# "), separator, known)
            if not found[-1] and sum(plain_name(name) in known for name in found[0]) > 1:
                following = next((more for more in file if more.strip()), b"")
                return number, len(lines) > 1, (*found[:2], _quote_of(line, following, found[1]), False)
            if len(lines) == _LONGEST_PREAMBLE:
                break
    own = (one for one in lines if not one[1].lstrip(b' "').startswith((b"#", b"//")))
    number, line = next(own, lines[0] if lines else (1, b""))
    return number, bool(lines) and number > lines[0][0], _header(line, separator, known)


def _quote_of(header: bytes, first: bytes, separator: str) -> str:
    """Return the quotation mark of a table: `'` if its header or the picture in its first row is in such, else `"`."""
    names = [name.strip() for name in header.decode("utf-8", "replace").lstrip("# ").split(separator)]
    cells = [cell.strip() for cell in first.decode("utf-8", "replace").split(separator)]
    if any(cell.startswith('"') for cell in cells):
        return '"'
    single = all(_in_single(name) for name in names) or any(
        looks_like_picture(cell[1:-1]) for cell in cells if _in_single(cell)
    )
    return "'" if single else '"'


def _in_single(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == "'"


def _header(first: bytes, separator: str, known: Collection[str]) -> _Header:
    text = first.decode("utf-8", "replace")
    best: tuple[tuple[int, int], list[str], str] | None = None
    for one in [separator] if separator else _SEPARATORS:
        cells = _cells(text, one, '"', False, 0)
        names = [
            name.strip() for name in (cells if not all(map(_in_single, cells)) else _cells(text, one, "'", False, 0))
        ]
        score = sum(plain_name(name) in known for name in names), len(names)
        if best is None or score > best[0]:
            best = score, names, one
    assert best is not None
    if best[0][0] == 0:
        for one in [separator] if separator else ("\t", "|", ",", ";", " "):
            for quote in ('"', "'"):
                cells = _cells(text, one, quote, False, 2)
                if len(cells) == 2 and looks_like_picture(cells[0]):
                    return ["image", "caption"], one, quote, True
    names = [name or f"column {i + 1}" for i, name in enumerate(best[1])]
    names = [name if name not in names[:i] else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)]
    while len(names) > 1 and best[1][len(names) - 1] == "" and len(names) > best[0][0] + 1:
        names.pop()  # the header ends with separators
    return names, best[2], '"', False


def _records(file: IO[bytes], separator: bytes, quote: bytes, columns: int) -> Iterator[tuple[int, int, bytes, bool]]:
    """Yield (first byte, line number, content, whether quotes are ordinary characters) of each row."""
    position, number = 0, 0
    waiting: list[bytes] = []

    def next_line() -> bytes:
        return waiting.pop(0) if waiting else file.readline()

    first = file.read(3)
    position = 3 if first == b"\xef\xbb\xbf" else 0
    file.seek(position)
    while line := next_line():
        number += 1
        start, literal, content = position, False, line
        if quote in line and _is_open(line, separator, quote):
            ahead: list[bytes] = []
            while True:
                more = next_line()
                if more:
                    ahead.append(more)
                first_cell = more.split(separator, 1)[0]
                begins_a_row = more.count(separator) >= max(columns - 1, 1) and _PICTURE_CELL.fullmatch(first_cell)
                if not more or begins_a_row or len(ahead) > _LONGEST_QUOTED:
                    waiting[:0] = ahead
                    literal = True
                    break
                if quote in more and not _is_open(line + b"".join(ahead), separator, quote):
                    content = line + b"".join(ahead)
                    break
        yield start, number, content, literal
        number += content.count(b"\n") - 1 if content.endswith(b"\n") else content.count(b"\n")
        position += len(content)


def _is_open(row: bytes, separator: bytes, quote: bytes) -> bool:
    """Return whether the row ends inside a quoted cell."""
    at = 0
    while at < len(row):
        while row[at : at + 1] == b" ":
            at += 1
        if row[at : at + 1] == quote:
            at += 1
            while True:
                end = row.find(quote, at)
                if end < 0:
                    return True
                if row[end + 1 : end + 2] != quote:
                    break
                at = end + 2
            at = end + 1
        following = row.find(separator, at)
        if following < 0:
            return False
        at = following + 1
    return False
