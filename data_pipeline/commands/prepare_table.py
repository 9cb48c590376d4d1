"""A table as a source of `cascade prepare`: finds the columns of pictures and captions, and reads samples from rows."""

from __future__ import annotations

import ast
import base64
import binascii
import glob
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.commands.prepare_files import NamedFiles
from data_pipeline.commands.prepare_item import (
    Item,
    caption_bytes,
    file_size,
    hash_file,
    hash_lines,
    image_ending,
    plain,
    read_file,
    refuse_unsupported,
    several_captions,
    splits_among,
)
from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import MembersConfig
from data_pipeline.content.captions import is_blank, is_no_value, texts_in, value_at
from data_pipeline.content.members import instead, picture_kind
from data_pipeline.storage.retry import persist
from data_pipeline.tables.arrow import ParquetRows
from data_pipeline.tables.base import Rows, looks_like_picture, plain_name
from data_pipeline.tables.delimited import DelimitedRows, typed
from data_pipeline.tables.table import open_table

logger = logging.getLogger(__name__)

PATH_COLUMNS = (
    *("path", "image_path", "file_path", "filepath", "file_name", "filename", "file", "image"),
    *("image_name", "image_file", "img", "img_path", "image_filename", "imagepath"),
    *("images", "picture", "photo", "pic"),
    *("jpg", "jpeg", "png", "webp", "image_jpg", "image_bytes", "img_bytes", "image_data", "bytes"),
)
"""Names of columns of pictures, as paths or as bytes; preferred ones first."""
CAPTION_COLUMNS = (
    *("caption", "text", "txt", "prompt", "description", "captions", "texts", "prompts", "sentences", "sentence"),
    *("caption_text", "image_caption", "comment", "comments", "alt", "alt_text", "title", "raw", "en"),
    *("conversations", "conversation", "messages"),
)
_NUMBERED = re.compile(r"(.+?)_?\d+")
_ID_COLUMNS = ("image_id", "img_id", "imageid", "image_key", "key", "id")
"""Columns used as names of pictures if files with these names exist."""
_URL_COLUMNS = ("url", "image_url", "img_url", "image_urls")
_LONGEST_TEXT = 1 << 20
_LONGEST_PATH, _HEAD = 4096, 64
_PARTS = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".ndjson", ".gz")
"""Extensions of files that may be one of several parts of a table."""
_KNOWN = {*PATH_COLUMNS, *CAPTION_COLUMNS}


class TableSource:
    """A table with one row per picture: a column of paths or pictures, one of captions, and others for the .json.

    Args:
        table: a file, a pattern of files with the same columns, or a directory of Parquet or Arrow files.
        names: `data.members`; its names take precedence when choosing columns.
        images: folder that paths are relative to; None: the table's own folder and its subfolders.
        encoding: `data.captions.encoding`, of a text table that is not UTF-8; None: Windows-1252.

    Raises:
        DataError: a file or folder does not exist, a file is not a table, it has no rows, or there is no column of
            pictures or captions.
    """

    def __init__(
        self,
        table: str,
        names: MembersConfig | None = None,
        images: str | None = None,
        encoding: str | None = None,
    ) -> None:
        self.names, self.table = names or MembersConfig(), table
        self.paths = persist(table, partial(_files, table))
        known = {*_KNOWN, *map(plain_name, (*self.names.image, *self.names.caption))}
        self.parts = [open_table(path, known, encoding) for path in self.paths]
        self._ends = np.cumsum([len(part) for part in self.parts])
        if images is not None and not os.path.isdir(os.path.expanduser(images)):
            raise DataError(f"prepare.images={images}: there is no such directory")
        self._pictures = NamedFiles(Path(os.path.expanduser(images)) if images else self.paths[0].parent)
        if not len(self):
            raise DataError(f"prepare.source={table}: it has no rows")
        self.path_column, self.caption_columns = self._columns()
        for part in self.parts:
            if isinstance(part, ParquetRows):
                part.use(self._read_columns(part))
        self._lock, self._several, self._said = threading.Lock(), set[int](), set[str]()
        self._more_pictures = set[int]()
        """Rows read so far that hold several pictures."""
        if encoding is None:
            self._tell_encoding()
        whole = ",".join(map(hash_file, self.paths))
        self.identity = hash_lines([whole, *map(file_size, self._places())])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    # -------------------------------------------------------------------------------------------------- columns

    def _columns(self) -> tuple[str, tuple[str, ...]]:
        """Return the column of pictures and those of captions; `data.caption` is a field of an object."""
        first = self.parts[0]
        example = _with_fields(self._example(first))
        columns = list(dict.fromkeys([*map(str, first.columns), *example]))
        by_name = {plain_name(name.replace(".", "\0")).replace("\0", "."): name for name in reversed(columns)}
        for name in reversed(columns):
            by_name.setdefault(plain_name(name.rpartition(".")[2]), name)
        pictures = [by_name[name] for name in (*map(plain_name, self.names.image), *PATH_COLUMNS) if name in by_name]
        captions = self._caption_columns(first, by_name)
        if not self.names.image:
            pictures = pictures or [name for name in columns if _is_picture_value(example.get(name))]
            pictures = [name for name in pictures if name not in captions[:1]]
            pictures.sort(key=lambda name: not _is_picture_value(example.get(name)))
            pointing = [by_name[name] for name in (*_ID_COLUMNS, *_URL_COLUMNS) if name in by_name]
            pictures = pictures or [name for name in pointing if self._leads_to_a_file(example.get(name))]
        if pictures and captions:
            return pictures[0], captions
        found = ", ".join(map(str, first.columns[:30]))
        urls = next((name for name in first.columns if plain_name(name) in _URL_COLUMNS), None)
        if urls and not pictures:
            raise DataError(
                f"prepare.source={self.table}: its column {urls} contains URLs; download the pictures with img2dataset"
            )
        raise DataError(
            f"prepare.source={self.table}: it needs a column of paths or pictures ({', '.join(PATH_COLUMNS[:9])}, ...) "
            f"and one of captions ({', '.join(CAPTION_COLUMNS[:8])}, ...); it has {found}; name them with "
            "'data.members={image: [NAME], caption: [NAME]}'"
        )

    def _caption_columns(self, first: Rows, by_name: dict[str, str]) -> tuple[str, ...]:
        """Return the preferred column of captions with those that are numbered like it (`caption_1`, `caption_2`)."""
        stems: dict[str, list[str]] = {}
        for name in map(str, first.columns):
            found = _NUMBERED.fullmatch(plain_name(name))
            if found and found[1] in CAPTION_COLUMNS:
                stems.setdefault(found[1], []).append(name)
        for name in map(plain_name, self.names.caption):
            if name in by_name:
                return (by_name[name],)
        for name in CAPTION_COLUMNS:
            if name in by_name:
                return (by_name[name], *(one for one in stems.get(name, []) if one != by_name[name]))
        if stems:
            return tuple(min(stems.items(), key=lambda one: CAPTION_COLUMNS.index(one[0]))[1])
        return tuple(getattr(first, "classes", {}))[:1]

    def _leads_to_a_file(self, value: Any) -> bool:
        with suppress(BadSample):
            return os.path.isfile(self._pictures.find(_path_of(value) or "None")[0])
        return False

    def _example(self, part: Rows) -> dict[str, Any]:
        """Return the first non-empty cell of each column."""
        example: dict[str, Any] = {}
        for number in range(min(len(part), 20)):
            with suppress(BadSample):
                for name, value in part.row(number).items():
                    if value not in (None, "", [], {}):
                        example.setdefault(str(name), value)
        return example

    def _read_columns(self, part: ParquetRows) -> set[str]:
        """Return the columns to read: all except other pictures and binary data, which are not put into the .json."""
        example = self._example(part)
        wanted = {name for name in part.columns if _top(self.path_column, *self.caption_columns) & {name}}
        binary = [name for name in part.columns if name not in wanted and _holds_bytes(example.get(name))]
        if binary:
            logger.warning("%s: columns of binary data are not used: %s", self.table, ", ".join(binary))
        return {name for name in part.columns if name not in binary}

    def _tell_encoding(self) -> None:
        for path, part in zip(self.paths, self.parts, strict=True):
            if isinstance(part, DelimitedRows) and part.encoding != "utf-8":
                logger.warning(
                    "%s: it is not UTF-8; reading it as %s (to change that, set data.captions.encoding)",
                    path,
                    part.encoding,
                )

    # ----------------------------------------------------------------------------------------------------- rows

    def _part(self, number: int) -> tuple[Rows, int, Path]:
        which = int(self._ends.searchsorted(number, side="right"))
        return self.parts[which], number - int(self._ends[which] - len(self.parts[which])), self.paths[which]

    def _cell(self, number: int) -> Any:
        """Return the cell in the column of pictures; None if the row cannot be read."""
        part, row, _ = self._part(number)
        with suppress(BadSample):
            return _cell(part.row(row), self.path_column)
        return None

    def name(self, number: int) -> str:
        _, row, path = self._part(number)
        given = _path_of(self._cell(number))
        return given or f"{path.name}#{row + 1}"

    def row(self, number: int) -> tuple[Any, list[str | bytes], dict[str, Any]]:
        """Return (the picture's cell, captions, metadata) of a row. Raises `BadSample`."""
        part, local, path = self._part(number)
        row = {str(name): value for name, value in part.row(local).items()}
        cell = _cell(row, self.path_column)
        caption = [self._named(part, name, _cell(row, name)) for name in self.caption_columns]
        for name in (self.path_column, *self.caption_columns, _top(self.path_column).pop()):
            row.pop(name, None)
        convert = typed if isinstance(part, DelimitedRows) else plain
        facts = {name: convert(value) for name, value in row.items() if not self._is_binary(name, value)}
        captions = texts_of(caption)
        if len(captions) > 1:
            facts["captions"] = [one for one in captions if isinstance(one, str)]
            self._several.add(number)
        name = _path_of(cell) or f"{path.name}#{local + 1}"
        return cell, captions, {"source": name, **facts}

    def _named(self, part: Rows, column: str, value: Any) -> Any:
        """Return the name of a class given by number, if the file has class names; otherwise the value."""
        names = getattr(part, "classes", {}).get(column, [])
        known = isinstance(value, int) and 0 <= value < len(names)
        return names[value].replace("_", " ") if known else value

    def _is_binary(self, name: str, value: Any) -> bool:
        if not _holds_bytes(value):
            return False
        with self._lock:
            if name not in self._said:
                self._said.add(name)
                logger.warning("%s: binary data in the column %s is not used", self.table, name)
        return True

    def picture(self, cell: Any) -> bytes:
        """Return the encoded picture that a cell contains or names. Raises `BadSample` (`missing_image`)."""
        data = _bytes_of(cell)
        if data is not None:
            return data
        given = _path_of(cell)
        if not given:
            raise BadSample("missing_image", "the row has neither a path nor a picture")
        place, _ = self._pictures.find(given)
        if "://" in given and not os.path.isfile(place):  # unlike Path.is_file, no error for a long URL
            raise BadSample("missing_image", "only local paths are read; download URLs with img2dataset first")
        return read_file(place)

    # ---------------------------------------------------------------------------------------------------- files

    def find(self, number: int) -> tuple[Path, bool]:
        """Return the file that a row names, which need not exist, and whether that is certain, see `NamedFiles.find`.

        Raises:
            BadSample: `missing_image`, see `NamedFiles.find`.
        """
        return self._pictures.find(self.name(number))

    def _places(self) -> Iterator[Path]:
        """Yield the files of the pictures; none if the table contains the pictures."""
        yield from self._pictures.survey(self._paths)

    def _paths(self) -> Iterator[str]:
        """Yield the path in each row, except those of tables that contain the pictures."""
        for part in self.parts:
            if _bytes_of(_cell(self._example(part), self.path_column)) is not None:
                continue
            if isinstance(part, ParquetRows):
                part.use(_top(self.path_column) if self.path_column not in part.columns else {self.path_column})
            for number in range(len(part)):
                given = None
                with suppress(BadSample):
                    given = _path_of(_cell(part.row(number), self.path_column))
                yield given or "None"
            if isinstance(part, ParquetRows):
                part.use(self._read_columns(part))

    # --------------------------------------------------------------------------------------------------- sample

    def read(self, number: int) -> Item:
        cell, captions, meta = self.row(number)
        if (
            isinstance(cell, (list, tuple))
            and not isinstance(next(iter(cell), 0), int)
            and sum(map(_holds_picture, cell)) > 1
        ):
            self._more_pictures.add(number)
        data = self.picture(cell)
        refuse_unsupported(data, _path_of(cell) or "")
        first = captions[0] if captions else None
        text = None if first is None else caption_bytes(first)
        return Item(str(meta["source"]), f"{number:09d}", image_ending(_path_of(cell) or "", data), data, text, meta)

    def advice(self, reason: str) -> str:
        if reason == "missing_image" and "://" in self.name(0):
            return "only local paths are read: copy the pictures first, and set prepare.images to their folder"
        if reason == "missing_image":
            root = self._pictures.root
            return f"paths are searched for in {root} and its subfolders; set prepare.images for another folder"
        if reason == "missing_caption":
            return (
                f"captions come from the column {', '.join(self.caption_columns)}; set data.members.caption for another"
            )
        return ""

    def remarks(self) -> list[str]:
        said = several_captions(len(self._several))
        if self._more_pictures:
            said.append(f"{len(self._more_pictures)} rows hold several pictures, of which the first is used")
        joined = sum(len(part.joined) for part in self.parts if isinstance(part, DelimitedRows))
        if joined:
            said.append(f"{joined} captions contain unquoted separators, which were kept as part of the captions")
        return said


def _files(table: str) -> list[Path]:
    """Return the files that `table` names: a file, a pattern, or the Parquet (or Arrow) files of a directory.

    Raises:
        DataError: there are none.
    """
    path = Path(os.path.expanduser(table))
    if path.is_file():
        return [path]
    if path.is_dir():
        parts = (one for one in path.rglob("*") if one.suffix in _PARTS and not _is_passed_over(one.relative_to(path)))
        below = sorted(one for one in parts if one.is_file())
        found = [one for one in below if one.suffix == ".parquet"] or [
            one
            for one in below
            if one.suffix == ".arrow" and not one.name.startswith(("cache-", "tmp"))  # written by datasets' map()
        ]
        if not found:
            ending = next((one.suffix for one in below if one.suffix != ".arrow"), "")
            words = f"; {str(path / '**' / f'*{ending}')!r} names all its {ending} files" if ending else ""
            raise DataError(
                f"prepare.source={table}: it is a directory without .parquet or .arrow files; give one of its tables"
                f"{words}"
            )
        if remark := splits_among(found, path):
            logger.warning("%s", remark)
        return found
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        words = "only local tables are read: copy it first" if "://" in table else "there is no such file"
        raise DataError(f"prepare.source={table}: {words}")
    return found


def _is_passed_over(path: Path) -> bool:
    """Return whether a path below a directory of tables is none of them: macOS' `._x`, or what Spark, Delta Lake and
    Hive keep beside them (`_delta_log`, `_temporary`)."""
    return any(part.startswith((".", "_")) for part in path.parts)


def texts_of(cell: Any) -> list[str | bytes]:
    """Return the captions in a cell: those `texts_in` finds, a list written out as text, bytes, or a number."""
    if isinstance(cell, bytes):
        return [cell] if cell.strip() else []
    if isinstance(cell, str):
        written = _written(cell)
        if written is None:
            return [] if is_blank(cell) or is_no_value(cell) else [cell]
        return list(written)
    if isinstance(cell, dict) or (isinstance(cell, (list, tuple)) and any(isinstance(one, dict) for one in cell)):
        return list(texts_in(cell))
    if isinstance(cell, (list, tuple)):
        return [text for one in cell for text in texts_of(one)]
    return [] if cell is None or cell != cell else [str(cell)]  # NaN is not a caption


def _top(*columns: str) -> set[str]:
    """Return the columns that contain these fields, and the columns with the full names."""
    return {name for column in columns for name in (column, column.partition(".")[0])}


def _cell(row: dict[str, Any], column: str) -> Any:
    """Return a cell, or a field of a cell."""
    return row[column] if column in row else value_at(row, column)


def _with_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the fields of its objects added as `column.field`; pictures do not count as objects."""
    found = dict(row)
    for name, value in row.items():
        if isinstance(value, dict) and not _is_picture_value(value):
            found.update({f"{name}.{key}": one for key, one in value.items() if one not in (None, "", [], {})})
    return found


def _written(text: str) -> list[str] | None:
    """Return the captions in a value written as `["a", "b"]`, `['a', 'b']`, `[]` or `{"text": "a"}`; None: others."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}") or len(text) >= _LONGEST_TEXT:
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(text)
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                return value
            objects = value if isinstance(value, list) else [value]
            if all(isinstance(one, dict) for one in objects) and (found := texts_in(value)):
                return found
    return None


def _bytes_of(cell: Any) -> bytes | None:
    """Return the encoded picture in a cell: bytes, also as a list of numbers, an object with bytes (as in `datasets`),
    a list of these, or a text that holds them.

    None if there is none.
    """
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return None if _is_path(bytes(cell)) else bytes(cell)
    if isinstance(cell, dict):
        data = cell.get("bytes")
        return bytes(data) if isinstance(data, (bytes, bytearray)) else _bytes_of(data)
    if isinstance(cell, (list, tuple)):
        if cell and all(isinstance(one, int) and 0 <= one < 256 for one in cell[:_HEAD]):
            return bytes(cell) if picture_kind(bytes(cell[:_HEAD])) else None  # an array of numbers, as of NumPy
        return next((data for one in cell if (data := _bytes_of(one)) is not None), None)
    return _bytes_in(cell) if isinstance(cell, str) and len(cell) > 64 else None


def _bytes_in(text: str) -> bytes | None:
    """Return the encoded picture that a text holds as base64 (also for URLs), as hexadecimal, or as Python writes
    bytes; None if it holds none."""
    encoded = text.partition("base64,")[2] if text.startswith("data:") else text.strip()
    code = encoded.replace("-", "+").replace("_", "/")
    with suppress(binascii.Error, ValueError):
        if picture_kind(base64.b64decode(code[:64])):
            return base64.b64decode(code + "=" * (-len(code) % 4))
    digits = encoded.removeprefix("\\x")
    with suppress(ValueError):
        if picture_kind(bytes.fromhex(digits[:64])):
            return bytes.fromhex(digits)
    if encoded[:2] in ("b'", 'b"'):
        with suppress(ValueError, SyntaxError, MemoryError):
            value = ast.literal_eval(encoded)
            return value if picture_kind(value) else None
    return None


def _path_of(cell: Any) -> str | None:
    """Return the path in a cell, that of an object or the first of a list; None if there is none."""
    if isinstance(cell, bytes):
        return os.fsdecode(cell) if _is_path(cell) else None
    if isinstance(cell, dict):
        return _path_of(next((cell[name] for name in ("path", "file_name", "filename") if cell.get(name)), None))
    if isinstance(cell, (list, tuple)):
        named = (one for one in cell if not isinstance(one, (int, float)))  # numbers are pixels
        return next((path for one in named if (path := _path_of(one))), None)
    if cell is None or _bytes_of(cell) is not None:
        return None
    return str(cell) or None


def _is_path(cell: bytes) -> bool:
    """Return whether bytes are the path of a picture rather than a picture, possibly a broken one or an error page."""
    return 0 < len(cell) <= _LONGEST_PATH and b"\0" not in cell and not picture_kind(cell) and not instead(cell)


def _holds_picture(cell: Any) -> bool:
    return _bytes_of(cell) is not None or _path_of(cell) is not None


def _is_picture_value(cell: Any) -> bool:
    path, data = _path_of(cell), _bytes_of(cell)
    if data is not None:
        return not data or len(data) > _LONGEST_PATH or b"\0" not in data or picture_kind(data) is not None
    return looks_like_picture(path) and "://" not in str(path)


def _holds_bytes(value: Any) -> bool:
    """Return whether a cell is or contains binary data; short bytes that are text do not count."""
    if isinstance(value, bytes):
        return len(value) > _LONGEST_TEXT or picture_kind(value[:4096]) is not None or b"\0" in value
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_bytes, value))
