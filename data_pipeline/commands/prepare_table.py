"""A table as a source of `cascade prepare`: which column is the picture, which the caption, and what a row gives."""

from __future__ import annotations

import ast
import base64
import binascii
import glob
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.commands.prepare_item import (
    Item,
    file_size,
    hash_file,
    hash_lines,
    image_ending,
    plain,
    read_file,
    refuse_unsupported,
)
from data_pipeline.commands.prepare_rows import (
    DelimitedRows,
    ParquetRows,
    Rows,
    looks_like_picture,
    open_table,
    plain_name,
    typed,
)
from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import MembersConfig
from data_pipeline.content.members import IMAGE_EXTENSIONS, is_unsupported, picture_kind

logger = logging.getLogger(__name__)

PATH_COLUMNS = (
    *("path", "image_path", "file_path", "filepath", "file_name", "filename", "file", "image"),
    *(
        "image_name",
        "image_file",
        "img",
        "img_path",
        "image_filename",
        "imagepath",
        "images",
        "picture",
        "photo",
        "pic",
    ),
    *("jpg", "jpeg", "png", "webp", "image_jpg", "image_bytes", "img_bytes", "image_data", "bytes"),
)
"""Columns of pictures, as paths or as bytes, the preferred first."""
CAPTION_COLUMNS = (
    *("caption", "text", "txt", "prompt", "description", "captions", "texts", "prompts", "sentences", "sentence"),
    *("caption_text", "image_caption", "comment", "comments", "alt", "alt_text", "title", "raw", "en"),
)
_RAW = ("raw", "caption", "text", "sentence", "en")
"""Fields of an object that stands for one caption."""
_URL_COLUMNS = ("url", "image_url", "img_url", "image_urls")
_LONGEST_TEXT = 1 << 20
_KNOWN = {*PATH_COLUMNS, *CAPTION_COLUMNS}


class TableSource:
    """One row per picture: a column of paths or of pictures, a column of captions, more for the .json.

    Args:
        table: a file, or a pattern of several with the same columns.
        names: `data.members`, whose names are looked for among the columns first.
        images: folder that paths are relative to; None: the table's own, and the folders below it.
    """

    def __init__(self, table: str, names: MembersConfig | None = None, images: str | None = None) -> None:
        self.names, self.table = names or MembersConfig(), table
        self.paths = _files(table)
        known = {*_KNOWN, *map(plain_name, (*self.names.image, *self.names.caption))}
        self.parts = [open_table(path, known) for path in self.paths]
        self._ends = np.cumsum([len(part) for part in self.parts])
        if images is not None and not os.path.isdir(os.path.expanduser(images)):
            raise DataError(f"prepare.images={images}: there is no such directory")
        self._images = Path(os.path.expanduser(images)) if images else None
        if not len(self):
            raise DataError(f"prepare.source={table}: it has no rows")
        self.path_column, self.caption_column = self._columns()
        for part in self.parts:
            if isinstance(part, ParquetRows):
                part.use(self._read_columns(part))
        self._lock, self._several, self._said = threading.Lock(), 0, set[str]()
        self._tell_encoding()
        whole = ",".join(map(hash_file, self.paths))
        self.identity = hash_lines([whole, *map(file_size, self._places())])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    # -------------------------------------------------------------------------------------------------- columns

    def _columns(self) -> tuple[str, str]:
        """The names of the columns of pictures and of captions."""
        first = self.parts[0]
        by_name = {plain_name(str(name)): str(name) for name in reversed(first.columns)}
        example = self._example(first)
        pictures = [by_name[name] for name in (*map(plain_name, self.names.image), *PATH_COLUMNS) if name in by_name]
        captions = [name for name in (*map(plain_name, self.names.caption), *CAPTION_COLUMNS) if name in by_name]
        if not self.names.image:
            pictures = pictures or [name for name in first.columns if _is_picture_value(example.get(name))]
            pictures = [name for name in pictures if name not in [by_name[one] for one in captions[:1]]]
            pictures.sort(key=lambda name: not _is_picture_value(example.get(name)))
        if pictures and captions:
            return pictures[0], by_name[captions[0]]
        found = ", ".join(map(str, first.columns[:30]))
        urls = next((name for name in first.columns if plain_name(name) in _URL_COLUMNS), None)
        if urls and not pictures:
            raise DataError(
                f"prepare.source={self.table}: its column {urls} holds addresses; fetch the pictures with img2dataset"
            )
        raise DataError(
            f"prepare.source={self.table}: it needs a column of paths or pictures ({', '.join(PATH_COLUMNS[:9])}, ...) "
            f"and one of captions ({', '.join(CAPTION_COLUMNS[:8])}, ...); it has {found}; name them with "
            "'data.members={image: [NAME], caption: [NAME]}'"
        )

    def _example(self, part: Rows) -> dict[str, Any]:
        """The first cell with something in it, of each column."""
        example: dict[str, Any] = {}
        for number in range(min(len(part), 20)):
            with suppress(BadSample):
                for name, value in part.row(number).items():
                    if value not in (None, "", [], {}):
                        example.setdefault(str(name), value)
        return example

    def _read_columns(self, part: ParquetRows) -> set[str]:
        """All but those that hold other pictures or binary data, which are left out of the .json as well."""
        example = self._example(part)
        wanted = {self.path_column, self.caption_column}
        binary = [name for name in part.columns if name not in wanted and _holds_bytes(example.get(name))]
        if binary:
            logger.warning("%s: columns of binary data are not used: %s", self.table, ", ".join(binary))
        return {name for name in part.columns if name not in binary}

    def _tell_encoding(self) -> None:
        for path, part in zip(self.paths, self.parts, strict=True):
            if isinstance(part, DelimitedRows) and part.encoding != "utf-8":
                logger.warning("%s: it is not UTF-8; it is read as %s", path, part.encoding)

    # ----------------------------------------------------------------------------------------------------- rows

    def _part(self, number: int) -> tuple[Rows, int, Path]:
        which = int(self._ends.searchsorted(number, side="right"))
        return self.parts[which], number - int(self._ends[which] - len(self.parts[which])), self.paths[which]

    def _cell(self, number: int) -> Any:
        """What the column of pictures says; None where the row cannot be read."""
        part, row, _ = self._part(number)
        with suppress(BadSample):
            return part.row(row).get(self.path_column)
        return None

    def name(self, number: int) -> str:
        _, row, path = self._part(number)
        given = _path_of(self._cell(number))
        return given or f"{path.name}#{row + 1}"

    def row(self, number: int) -> tuple[Any, list[str | bytes], dict[str, Any]]:
        """(the picture's cell, captions, facts) of a row. Raises `BadSample`."""
        part, local, path = self._part(number)
        row = {str(name): value for name, value in part.row(local).items()}
        cell, caption = row.pop(self.path_column, None), row.pop(self.caption_column, None)
        convert = typed if isinstance(part, DelimitedRows) else plain
        facts = {name: convert(value) for name, value in row.items() if not self._is_binary(name, value)}
        captions = texts_of(caption)
        if len(captions) > 1:
            facts["captions"] = [one for one in captions if isinstance(one, str)]
            with self._lock:
                self._several += 1
        name = _path_of(cell) or f"{path.name}#{local + 1}"
        return cell, captions, {"source": name, **facts}

    def _is_binary(self, name: str, value: Any) -> bool:
        if not _holds_bytes(value):
            return False
        with self._lock:
            if name not in self._said:
                self._said.add(name)
                logger.warning("%s: binary data in the column %s is not used", self.table, name)
        return True

    def picture(self, cell: Any) -> bytes:
        """The encoded picture that a cell holds or names. Raises `BadSample("missing_image")`."""
        data = _bytes_of(cell)
        if data is not None:
            return data
        given = _path_of(cell)
        if not given:
            raise BadSample("missing_image", "the row has neither a path nor a picture")
        if "://" in given:
            raise BadSample("missing_image", "only local paths are read; download URLs with img2dataset first")
        return read_file(self.find(given))

    # ---------------------------------------------------------------------------------------------------- files

    def find(self, given: str) -> Path:
        """The file that a path in the table means: below `prepare.images` or the table's folder; else, where there is
        none, the one of this name in a folder below."""
        root = self._images or self.paths[0].parent
        for form in dict.fromkeys((given, given.strip(), given.replace("\\", "/").strip(), given.partition("#")[0])):
            place = root / form
            with suppress(OSError, ValueError):
                if place.is_file():
                    return place
        name = given.replace("\\", "/").strip().rpartition("/")[2]
        for form in dict.fromkeys((name, name.partition("#")[0])):
            places = self._below.get(form.lower(), [])
            if len(places) > 1:
                ending = Path(given.replace("\\", "/")).parts[-2:]
                places = [place for place in places if place.parts[-len(ending) :] == ending] or places
            if len(places) == 1:
                return places[0]
            if places:
                some = ", ".join(map(str, places[:3]))
                raise BadSample("missing_image", f"{given}: several files have this name ({some}); set prepare.images")
        return root / given

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        """Pictures below the folder by name, with and without their ending; looked for when a path leads nowhere."""
        root = self._images or self.paths[0].parent
        if root.name.lower().startswith("annotation"):
            root = root.parent  # COCO's layout
        found: dict[str, list[Path]] = {}
        for folder, _, names in os.walk(root):
            for name in names:
                stem, _, ending = name.rpartition(".")
                if ending.lower() in IMAGE_EXTENSIONS or is_unsupported(ending.lower()):
                    found.setdefault(name.lower(), []).append(Path(folder, name))
                    found.setdefault(stem.lower(), []).append(Path(folder, name))
        return found

    def _places(self) -> Iterator[Path]:
        """The files of the pictures; none for pictures in the table itself."""
        for part in self.parts:
            if _bytes_of(self._example(part).get(self.path_column)) is not None:
                continue
            if isinstance(part, ParquetRows):
                part.use({self.path_column})
            for number in range(len(part)):
                given = None
                with suppress(BadSample):
                    given = _path_of(part.row(number).get(self.path_column))
                try:
                    yield self.find(given or "None")
                except BadSample:
                    yield self.paths[0].parent / str(given)
            if isinstance(part, ParquetRows):
                part.use(self._read_columns(part))

    # --------------------------------------------------------------------------------------------------- sample

    def read(self, number: int) -> Item:
        cell, captions, meta = self.row(number)
        data = self.picture(cell)
        refuse_unsupported(data)
        first = captions[0] if captions else None
        text = first.encode("utf-8", "surrogateescape") if isinstance(first, str) else first
        return Item(str(meta["source"]), f"{number:09d}", image_ending(_path_of(cell) or "", data), data, text, meta)

    def advice(self, reason: str) -> str:
        if reason == "missing_image":
            root = self._images or self.paths[0].parent
            return f"paths are looked for in {root} and the folders below it; prepare.images names another folder"
        if reason == "missing_caption":
            return f"captions come from the column {self.caption_column}; data.members.caption names another"
        return ""

    def remarks(self) -> list[str]:
        said = []
        if self._several:
            said.append(
                f"{self._several} samples have several captions: the .txt has the first, and "
                "'data.captions.sources={json:captions: 1}' trains with all"
            )
        joined = sum(part.joined for part in self.parts if isinstance(part, DelimitedRows))
        if joined:
            said.append(f"{joined} captions held the separator without quotes; it was taken as a part of them")
        return said


def _files(table: str) -> list[Path]:
    """The file, the files of a pattern, or the Parquet files of a directory."""
    path = Path(os.path.expanduser(table))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(path.rglob("*.parquet"))
        if not found:
            raise DataError(f"prepare.source={table}: it is a directory without .parquet files; name the table in it")
        return found
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise DataError(f"prepare.source={table}: there is no such file")
    return found


def texts_of(cell: Any) -> list[str | bytes]:
    """The captions in a cell: a text, a list of texts (also one that was written out as text), objects with a text."""
    if isinstance(cell, bytes):
        return [cell] if cell.strip() else []
    if isinstance(cell, str):
        listed = _written_list(cell)
        return texts_of(listed) if listed is not None else [cell] if cell.strip() else []
    if isinstance(cell, dict):
        return texts_of(next((cell[name] for name in _RAW if cell.get(name)), None))
    if isinstance(cell, (list, tuple)):
        return [text for one in cell for text in texts_of(one)]
    return [] if cell is None else [str(cell)]


def _written_list(text: str) -> list[str] | None:
    """The list behind `["a", "b"]` or `['a', 'b']`; None for other texts."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and len(text) < _LONGEST_TEXT):
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(text)
            if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
                return value
    return None


def _bytes_of(cell: Any) -> bytes | None:
    """The encoded picture in a cell: bytes, an object with bytes as `datasets` has them, a list of such, base64."""
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell) if len(cell) == 0 or picture_kind(bytes(cell[:4096])) or len(cell) > 4096 else None
    if isinstance(cell, dict):
        data = cell.get("bytes")
        return bytes(data) if isinstance(data, (bytes, bytearray)) else _bytes_of(data)
    if isinstance(cell, (list, tuple)):
        return next((data for one in cell if (data := _bytes_of(one)) is not None), None)
    if isinstance(cell, str) and len(cell) > 64:
        encoded = cell.partition("base64,")[2] if cell.startswith("data:image/") else cell
        with suppress(binascii.Error, ValueError):
            if picture_kind(base64.b64decode(encoded[:64])):
                return base64.b64decode(encoded)
    return None


def _path_of(cell: Any) -> str | None:
    """The path in a cell; of an object its `path`, of a list the first."""
    if isinstance(cell, bytes):
        return None if picture_kind(cell[:4096]) or len(cell) > 4096 or b"\0" in cell else os.fsdecode(cell)
    if isinstance(cell, dict):
        return _path_of(next((cell[name] for name in ("path", "file_name", "filename") if cell.get(name)), None))
    if isinstance(cell, (list, tuple)):
        return next((path for one in cell if (path := _path_of(one))), None)
    if cell is None or _bytes_of(cell) is not None:
        return None
    return str(cell) or None


def _is_picture_value(cell: Any) -> bool:
    path = _path_of(cell)
    return _bytes_of(cell) is not None or (looks_like_picture(path) and "://" not in str(path))


def _holds_bytes(value: Any) -> bool:
    """Whether a cell is binary data or holds some; short bytes that are text do not count."""
    if isinstance(value, bytes):
        return len(value) > _LONGEST_TEXT or picture_kind(value[:4096]) is not None or b"\0" in value
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_bytes, value))
