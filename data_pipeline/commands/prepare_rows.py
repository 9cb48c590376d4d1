"""Reads the rows of a table in any format: Parquet, Arrow, delimited text, JSON, JSON lines; compressed or not.

The format is detected from the content. Rows are read by number, from several threads, with little memory: Parquet
keeps a few batches, text the offsets of its rows. JSON that is a single value (COCO's captions, an array) is loaded as
a whole.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import re
import shutil
import tempfile
import threading
import zipfile
from array import array
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from data_pipeline.common.errors import BadSample, DataError, system_words
from data_pipeline.common.one_way import OneWay
from data_pipeline.content.members import IMAGE_EXTENSIONS, instead
from data_pipeline.storage.atomic import naming, scratch

logger = logging.getLogger(__name__)

_HEAD = 1 << 16
_LONGEST_QUOTED, _LONGEST_PREAMBLE = 200, 64
"""Most lines that a quoted cell may span; a quote that stays open longer is treated as an ordinary character."""
_BATCH_BYTES, _BATCHES_KEPT, _LEAST_ROWS = 16 << 20, 3, 32
WIDE = {"caption", "captions", "text", "txt", "prompt", "description", "comment", "sentence", "title"}
"""Columns whose cells may contain unquoted separators."""
_SEPARATORS = (",", "\t", ";", "|")
_PICTURE_NAME = re.compile(rf"\.({'|'.join(IMAGE_EXTENSIONS)})(#\d+)?$", re.IGNORECASE)
_PICTURE_CELL = re.compile(rf'"?[^"]{{0,300}}?\.({"|".join(IMAGE_EXTENSIONS)})(#\d+)?"?\s*'.encode(), re.IGNORECASE)
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,3})?")
_OTHERS = (
    (b"ORC", "it is an ORC file: export the table as .parquet"),
    (b"Obj\x01", "it is an Avro file: export the table as .parquet"),
    (b"\x89HDF", "it is an HDF5 file: export the table as .parquet, or the pictures as files"),
    (b"\x93NUMPY", "it is a NumPy array: save the pictures as files"),
    (b"SQLite format 3", "it is a SQLite database: export the table as .csv"),
    (b"\xd0\xcf\x11\xe0", "it is an Excel file: save it as .csv"),
    (b"version https://git-lfs", instead(b"version https://git-lfs")),
    (b"\x80\x04\x95", "it is a pickle, which is a program: save it as .csv or .parquet"),
    (b"<", "it is HTML or XML, possibly an error page: download or export the table again"),
)


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


def open_table(path: Path, known: Collection[str] = (), encoding: str | None = None) -> Rows:
    """Open a table.

    Args:
        path: the file.
        known: names of columns, normalized by `plain_name`, by which a header and its separator are recognized.
        encoding: of text that is not UTF-8; None: Windows-1252.

    Raises:
        DataError: it is not a readable table, or there is no room in TMPDIR to unpack it.
    """
    import pyarrow as pa

    try:
        with open(path, "rb") as file:
            head = file.read(8)
        if head[:4] == b"PAR1":
            return ParquetRows(path)
        if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
            return _arrow_rows(path, head)
        return _text_rows(_plain(path), path, known, encoding)
    except (pa.ArrowException, OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, UnicodeError) as error:
        if isinstance(error, OSError) and error.filename == scratch():
            raise DataError(f"{scratch()}: {system_words(error)}; {path} is unpacked there") from error
        raise _no_table(path, str(error) or type(error).__name__) from error


def plain_name(column: str) -> str:
    """Normalize a column's name for comparison: lower case, no surrounding quotes, `_` for white space, `-` and `.`."""
    return re.sub(r"[\s\-.]+", "_", column.strip().strip("\"'").strip().lower())


def looks_like_picture(value: Any) -> bool:
    """Return whether a cell is the name of a picture file."""
    return isinstance(value, str) and _PICTURE_NAME.search(value.strip()) is not None


def _no_table(path: Path, why: str) -> DataError:
    return DataError(f"prepare.source={path}: not a readable table ({why})")


# ----------------------------------------------------------------------------------------------------------- bytes


def _compressed(file: IO[bytes], codec: str) -> OneWay:
    """Return a file of what pyarrow decompresses (zstd, lz4)."""
    import pyarrow as pa

    return OneWay(pa.CompressedInputStream(pa.PythonFile(file), codec).read, file.close)


def _plain(path: Path) -> IO[bytes]:
    """Return a file with the decompressed content in UTF-8 or another superset of ASCII, with line feeds as line ends.

    Raises:
        DataError: it is a format that is not a table.
    """
    file: IO[bytes] = open(path, "rb")  # noqa: SIM115
    head = file.read(_HEAD)
    file.seek(0)
    for signature, words in _OTHERS:
        if head.removeprefix(b"\xef\xbb\xbf").startswith(signature):
            raise _no_table(path, words)
    if head[:4] == b"PK\x03\x04":
        file = _unpacked(_only_member(file, path))
    else:
        for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
            if head.startswith(magic):
                file = _unpacked(opener(file))
        for magic, codec in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
            if head.startswith(magic):
                file = _unpacked(_compressed(file, codec))
    head = file.read(_HEAD)
    file.seek(0)
    encoding = _wide_encoding(head)
    if encoding or (b"\r" in head and b"\n" not in head):
        text = io.TextIOWrapper(file, encoding or "latin-1", newline=None)
        file = tempfile.TemporaryFile()  # noqa: SIM115
        with naming(scratch()):
            for piece in iter(lambda: text.read(1 << 20), ""):
                file.write(piece.removeprefix("\ufeff").encode("utf-8" if encoding else "latin-1"))
            file.seek(0)
    return file


def _unpacked(packed: IO[bytes] | Any) -> IO[bytes]:
    out = tempfile.TemporaryFile()  # noqa: SIM115
    with packed, naming(scratch()):
        shutil.copyfileobj(packed, out, 1 << 20)
        out.seek(0)
    return out


def _only_member(file: IO[bytes], path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
    if any(name.startswith("xl/") for name in names):
        raise _no_table(path, "it is an Excel file: save it as .csv")
    if len(names) != 1:
        words = "give the table, or for pictures the folder with prepare.kind=folder"
        raise _no_table(path, f"the archive holds {len(names)} files: unpack it and {words}")
    return archive.open(names[0])


def _wide_encoding(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if 5 * max(even, odd) > len(head):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


# ------------------------------------------------------------------------------------------------------------ text


def _text_rows(file: IO[bytes], path: Path, known: Collection[str], encoding: str | None) -> Rows:
    head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    file.seek(0)
    start = head.lstrip()[:1]
    if not start:
        raise _no_table(path, "it is empty")
    if start in (b"{", b"["):
        return _json_rows(file, path, known)
    for signature, words in _OTHERS:
        if head.startswith(signature):
            raise _no_table(path, words)
    if path.suffix.lower() == ".parquet" or 8 * head.count(0) > len(head):
        raise _no_table(path, "neither Parquet nor text")
    if re.match(rb"(?:\s*(?:#|//).*\n)+\s*[{\[]", head):
        raise _no_table(path, "lines that begin with # or // stand above the JSON: remove them")
    rows = DelimitedRows(file, known, encoding)
    if rows.has_preamble:
        logger.warning("%s: the table begins at line %d; the lines above it are skipped", path, rows.first_line)
    return rows


class _Lines:
    """Reads pieces of a file by number. Thread-safe."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.starts, self.sizes, self.lines = array("q"), array("q"), array("q")

    def add(self, start: int, size: int, line: int) -> None:
        self.starts.append(start)
        self.sizes.append(size)
        self.lines.append(line)

    def read(self, number: int) -> bytes:
        return os.pread(self._file.fileno(), self.sizes[number], self.starts[number])


class DelimitedRows:
    """Delimited text, with or without a header; quoted cells may contain separators and line ends.

    An unquoted caption that contains the separator is put back together if a header tells the number of cells.
    """

    def __init__(self, file: IO[bytes], known: Collection[str], encoding: str | None = None) -> None:
        self._lines, self._literal = _Lines(file), set[int]()
        self.first_line, self.has_preamble, header = _find_header(file, known)
        self.columns, self._separator, self._headless = header
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
        separator = self._separator.encode()
        for start, line, content, literal in _records(file, separator, len(self.columns)):
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
        literal = number in self._literal or (self._headless and '"' in text and not text.rstrip().endswith('"'))
        cells = _cells(text, self._separator, literal, len(self.columns) if self._headless else 0)
        extra = len(cells) - len(self.columns)
        if extra < 0:
            words = f"it has {len(cells)} cells, the table {len(self.columns)} columns ({', '.join(self.columns)})"
            raise BadSample("bad_row", f"line {self._lines.lines[number]}: {words}")
        if extra and any(cells[len(self.columns) :]):
            end = self._wide + extra + 1
            cells[self._wide : end] = [_between(text, cells, self._separator, self._wide, extra, literal)]
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


def _cells(text: str, separator: str, literal: bool, most: int) -> list[str]:
    line = text.rstrip("\r\n")
    if most:  # without a header there are two cells: the name of the picture and the caption
        parts = line.split(separator, most - 1) if separator != " " else line.split(None, most - 1)
        return [_unquoted(part.strip()) for part in parts]
    limit = csv.field_size_limit(1 << 27)
    try:
        source = io.StringIO(line, newline="")
        if literal:
            return next(csv.reader(source, delimiter=separator, skipinitialspace=True, quoting=csv.QUOTE_NONE), [])
        return next(csv.reader(source, delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return line.split(separator)
    finally:
        csv.field_size_limit(limit)


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _between(text: str, cells: Sequence[str], separator: str, wide: int, extra: int, literal: bool) -> str:
    """Rejoin cells split at unquoted separators, with separators and spaces as in the original if possible."""
    if literal or '"' not in text:
        raw = text.rstrip("\r\n").split(separator)
        if len(raw) == len(cells):
            return separator.join(raw[wide : wide + extra + 1]).strip()
    return f"{separator} ".join(cells[wide : wide + extra + 1])


def _find_header(file: IO[bytes], known: Collection[str]) -> tuple[int, bool, tuple[list[str], str, bool]]:
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
            if not found[2] and sum(plain_name(name) in known for name in found[0]) > 1:
                return number, len(lines) > 1, found
            if len(lines) == _LONGEST_PREAMBLE:
                break
    own = (one for one in lines if not one[1].lstrip(b' "').startswith((b"#", b"//")))
    number, line = next(own, lines[0] if lines else (1, b""))
    return number, bool(lines) and number > lines[0][0], _header(line, separator, known)


def _header(first: bytes, separator: str, known: Collection[str]) -> tuple[list[str], str, bool]:
    """Return (columns, separator, whether the header is missing)."""
    text = first.decode("utf-8", "replace")
    best: tuple[tuple[int, int], list[str], str] | None = None
    for one in [separator] if separator else _SEPARATORS:
        names = [name.strip() for name in _cells(text, one, False, 0)]
        score = sum(plain_name(name) in known for name in names), len(names)
        if best is None or score > best[0]:
            best = score, names, one
    assert best is not None
    if best[0][0] == 0:
        for one in [separator] if separator else ("\t", "|", ",", ";", " "):
            cells = _cells(text, one, False, 2)
            if len(cells) == 2 and looks_like_picture(cells[0]):
                return ["image", "caption"], one, True
    names = [name or f"column {i + 1}" for i, name in enumerate(best[1])]
    while len(names) > 1 and best[1][len(names) - 1] == "" and len(names) > best[0][0] + 1:
        names.pop()  # the header ends with separators
    return names, best[2], False


def _records(file: IO[bytes], separator: bytes, columns: int) -> Iterator[tuple[int, int, bytes, bool]]:
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
        if b'"' in line and _is_open(line, separator):
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
                if b'"' in more and not _is_open(line + b"".join(ahead), separator):
                    content = line + b"".join(ahead)
                    break
        yield start, number, content, literal
        number += content.count(b"\n") - 1 if content.endswith(b"\n") else content.count(b"\n")
        position += len(content)


def _is_open(row: bytes, separator: bytes) -> bool:
    """Return whether the row ends inside a quoted cell."""
    at = 0
    while at < len(row):
        while row[at : at + 1] == b" ":
            at += 1
        if row[at : at + 1] == b'"':
            at += 1
            while True:
                end = row.find(b'"', at)
                if end < 0:
                    return True
                if row[end + 1 : end + 2] != b'"':
                    break
                at = end + 2
            at = end + 1
        following = row.find(separator, at)
        if following < 0:
            return False
        at = following + 1
    return False


# ------------------------------------------------------------------------------------------------------------ JSON


class ListRows:
    """Rows held in memory."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows
        self.columns = _columns(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        found = self._rows[number]
        if not isinstance(found, dict):
            raise BadSample("bad_row", f"entry {number + 1}: not an object")
        return found


class JsonLineRows:
    """One JSON object per line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._lines = _Lines(file)
        file.seek(0)
        start = 0
        for number, line in enumerate(iter(file.readline, b""), 1):
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                self._lines.add(start, len(line), number)
            start += len(line)
        some = []
        for number in range(min(len(self), 100)):
            try:
                some.append(self.row(number))
            except BadSample:
                continue
        self.columns = _columns(some)

    def __len__(self) -> int:
        return len(self._lines.starts)

    def row(self, number: int) -> dict[str, Any]:
        raw = self._lines.read(number).removeprefix(b"\xef\xbb\xbf")
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad_row", f"line {self._lines.lines[number]}: {error}") from error
        if not isinstance(value, dict):
            raise BadSample("bad_row", f"line {self._lines.lines[number]}: not a JSON object")
        return value


def _columns(rows: list[Any]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows[:100] if isinstance(row, dict) for name in row))


def _json_rows(file: IO[bytes], path: Path, known: Collection[str]) -> Rows:
    first = b""
    for line in iter(file.readline, b""):
        first = line.removeprefix(b"\xef\xbb\xbf").strip()
        if first:
            break
    second = next((line for line in iter(file.readline, b"") if line.strip()), b"")
    try:
        if isinstance(json.loads(first), dict) and second.lstrip()[:1] == b"{":
            return JsonLineRows(file)
    except (ValueError, RecursionError):
        if first.startswith(b"{") and first.endswith(b"}") and second.lstrip()[:1] == b"{":
            return JsonLineRows(file)  # only the first line is damaged
    file.seek(0)
    text = file.read()
    try:
        return _rows_of_json(json.loads(text), known)
    except (ValueError, RecursionError) as error:
        values = _values(text.decode("utf-8-sig", "replace"))
        if len(values) > 1:
            return ListRows(values)
        raise _no_table(path, f"JSON: {error}") from error


def _values(text: str) -> list[Any]:
    """Parse concatenated JSON values, over any number of lines, up to the first that cannot be parsed."""
    decoder, at = json.JSONDecoder(), 0
    values: list[Any] = []
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return values
        values.append(value)


def _rows_of_json(value: Any, known: Collection[str]) -> Rows:
    """Return the rows in a JSON value: a list of objects, COCO's captions, columns, or captions by picture name."""
    if isinstance(value, list):
        return ListRows(value)
    names, cells = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return ListRows([dict(zip(map(str, names), row, strict=False)) for row in cells])  # pandas, orient="split"
    numbered = [one for one in value.values() if isinstance(one, dict)]
    if len(numbered) == len(value) > 1 and sum(plain_name(name) in known for name in value) > 1:
        rows = dict.fromkeys(number for one in numbered for number in one)  # pandas, orient="columns"
        return ListRows([{name: one.get(number) for name, one in value.items()} for number in rows])
    images, captions = value.get("images"), value.get("annotations")
    if isinstance(images, list) and isinstance(captions, list):
        return ListRows(_coco(images, captions))
    if value and all(map(looks_like_picture, value)):
        return _named_rows(value)
    lists = {name: one for name, one in value.items() if isinstance(one, list)}
    objects = [one for one in lists.values() if one and all(isinstance(item, dict) for item in one)]
    if objects:
        return ListRows(max(objects, key=len))
    if len(lists) > 1 and len({len(one) for one in lists.values()}) == 1:
        return ListRows([dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)])
    if value and sum(looks_like_picture(name) or isinstance(one, dict) for name, one in value.items()) == len(value):
        return _named_rows(value)
    if (
        len(value) > 1
        and all(isinstance(one, str) for one in value.values())
        and not {*map(plain_name, value)} & {*known}
    ):
        return ListRows([{"image": name, "caption": one} for name, one in value.items()])  # names without extensions
    return ListRows([value])


def _named_rows(value: dict[str, Any]) -> ListRows:
    """Return one row per name of a picture, with its captions or an object of facts."""
    facts = ({"image": name, **(one if isinstance(one, dict) else {"caption": one})} for name, one in value.items())
    return ListRows(list(facts))


def _coco(images: list[Any], annotations: list[Any]) -> list[dict[str, Any]]:
    """Return one row per picture, with its captions in order."""
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    for one in annotations:
        if isinstance(one, dict) and isinstance(one.get("caption"), str):
            captions[str(one.get("image_id"))].append(one["caption"])
    if not captions:  # boxes or outlines of objects
        return [one for one in images if isinstance(one, dict)]
    return [{**one, "captions": captions[str(one.get("id"))]} for one in images if isinstance(one, dict)]


# ----------------------------------------------------------------------------------------------------------- Arrow


def _arrow_rows(path: Path, head: bytes) -> Rows:
    import pyarrow as pa

    source = pa.memory_map(str(path))
    table = (pa.ipc.open_file if head[:6] == b"ARROW1" else pa.ipc.open_stream)(source).read_all()
    return ArrowRows(table)


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
    from pyarrow import ArrowException

    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, NotImplementedError):
        with suppress(ArrowException):
            return cell.cast("string").as_py()
        return None


class ArrowRows:
    """A memory-mapped Arrow table, as saved by the `datasets` library."""

    def __init__(self, table: Any) -> None:
        self._table, self.columns = table, list(table.column_names)
        self.classes = class_names(table.schema)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, number: int) -> dict[str, Any]:
        cells = ((name, self._table.column(place)) for place, name in enumerate(self.columns))
        return dict(reversed([(name, _value(column[number])) for name, column in cells]))


class ParquetRows:
    """A Parquet file, read in batches of about 16 MB; fast if rows are requested roughly in order."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
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

    def __len__(self) -> int:
        return int(self._starts[-1])

    def use(self, columns: Collection[str]) -> None:
        """Read only these columns from now on."""
        self._wanted = [name for name in self.columns if name in columns]

    def row(self, number: int) -> dict[str, Any]:
        with self._lock:
            start, batch = self._batch(number)
        cells = ((name, batch.column(place)) for place, name in enumerate(batch.schema.names))
        try:  # reversed: of several columns with the same name, the first is used
            return dict(reversed([(name, _value(column[number - start])) for name, column in cells]))
        except UnicodeDecodeError as error:
            raise BadSample("bad_row", f"row {number + 1}: {error}") from error

    def _batch(self, number: int) -> tuple[int, Any]:
        while True:
            for start, batch in self._kept:
                if start <= number < start + len(batch):
                    return start, batch
            if not self._next <= number or self._next < 0 or self._is_far(number):
                group = next(i for i in range(len(self._row_bytes)) if number < self._starts[i + 1])
                self._open(group)
            batch = next(self._batches, None)
            if batch is None:
                self._open(next(i for i, start in enumerate(self._starts) if start >= self._next))
                continue
            self._kept.append((self._next, batch))
            self._next += len(batch)

    def _is_far(self, number: int) -> bool:
        """Return whether the row is in a later row group, so that the rows before it can be skipped."""
        return any(self._next < start <= number for start in self._starts)

    def _open(self, group: int) -> None:
        rows = min(max(_BATCH_BYTES // self._row_bytes[group], _LEAST_ROWS), 1 << 14)
        self._next = self._starts[group]
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=self._wanted, use_threads=False)
