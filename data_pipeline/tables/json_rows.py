"""JSON: an object per line, a list, columns, COCO's captions, or captions by the names of pictures."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from data_pipeline.common.errors import BadSample
from data_pipeline.tables.base import FileLines, Rows, looks_like_picture, no_table, plain_name

logger = logging.getLogger(__name__)

_OF_A_PICTURE = {"path", "bytes", "file_name", "filename"}
"""Fields of an object that stands for a picture, as in the `datasets` library."""


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
        self._lines = FileLines(file)
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


def json_rows(file: IO[bytes], path: Path, known: Collection[str]) -> Rows:
    """Return the rows of a JSON file of any layout; for the arguments see `open_table`.

    Raises:
        DataError: it is not JSON.
    """
    first = b""
    for line in iter(file.readline, b""):
        first = line.removeprefix(b"\xef\xbb\xbf").strip()
        if first:
            break
    second = next((line for line in iter(file.readline, b"") if line.strip()), b"")
    if second.lstrip()[:1] == b"{" and _is_line(first):
        rows = JsonLineRows(file)
        if not rows.columns:
            try:
                rows.row(0)
            except BadSample as bad:
                raise no_table(path, f"none of its first lines is a JSON object; {bad.detail}") from bad
        return rows
    file.seek(0)
    text = file.read()
    try:
        return _rows_of_json(json.loads(text), path, known)
    except (ValueError, RecursionError) as error:
        values, rest = _values(text.decode("utf-8-sig", "replace"))
        if len(values) > 1:
            if rest:
                words = "%s: it cannot be parsed from line %d on; the rest is not read"
                logger.warning(words, path, 1 + text.count(b"\n") - rest.count("\n"))
            return ListRows(_objects(values, known))
        raise no_table(path, f"JSON: {error}") from error


def _is_line(text: bytes) -> bool:
    """Return whether text, the first of a file, is an object on a line of its own; it may be damaged inside."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return text.startswith(b"{") and text.endswith(b"}")


def _values(text: str) -> tuple[list[Any], str]:
    """Parse concatenated JSON values, over any number of lines, up to the first that cannot be parsed.

    Returns:
        The values, and the text that follows them.
    """
    decoder, at = json.JSONDecoder(), 0
    values: list[Any] = []
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return values, text[at:]
        values.append(value)


def _rows_of_json(value: Any, path: Path, known: Collection[str]) -> Rows:
    """Return the rows in a JSON value: a list of objects, COCO's captions, columns, or captions by picture name."""
    if isinstance(value, list):
        return ListRows(_objects(value, known))
    names, cells = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return ListRows([dict(zip(map(str, names), row, strict=False)) for row in cells])  # pandas, orient="split"
    if _is_row(value, known):
        return ListRows([value])
    numbered = [one for one in value.values() if isinstance(one, dict)]
    aligned = all(set(one) == set(numbered[0]) for one in numbered)
    if aligned and len(numbered) == len(value) > 1 and sum(plain_name(name) in known for name in value) > 1:
        rows = dict.fromkeys(number for one in numbered for number in one)  # pandas, orient="columns"
        return ListRows([{name: one.get(number) for name, one in value.items()} for number in rows])
    images, captions = value.get("images"), value.get("annotations")
    if isinstance(images, list) and isinstance(captions, list):
        return ListRows(_coco(images, captions, path))
    if value and all(map(looks_like_picture, value)):
        return _named_rows(value)
    lists = {name: one for name, one in value.items() if isinstance(one, list)}
    objects = [one for one in lists.values() if one and all(isinstance(item, dict) for item in one)]
    if objects:
        longest = max(objects, key=len)
        alike = {name: one for name, one in lists.items() if _alike(one, longest, known)}
        if len(alike) > 1:
            logger.warning("%s: it holds several lists of rows (%s); all are read", path, ", ".join(map(str, alike)))
        return ListRows([row for one in alike.values() for row in one])
    if len(lists) > 1 and len({len(one) for one in lists.values()}) == 1:
        return ListRows([dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)])
    columns = {name: len(one) for name, one in lists.items() if plain_name(name) in known and len(one) > 1}
    if len(set(columns.values())) > 1:
        found = ", ".join(f"{count} in {name}" for name, count in columns.items())
        raise ValueError(f"its columns have different numbers of entries ({found})")
    if value and sum(looks_like_picture(name) or isinstance(one, dict) for name, one in value.items()) == len(value):
        return _named_rows(value)
    if (
        len(value) > 1
        and all(isinstance(one, str) for one in value.values())
        and not {*map(plain_name, value)} & {*known}
    ):
        return ListRows([{"image": name, "caption": one} for name, one in value.items()])  # names without extensions
    return ListRows([value])


def _objects(rows: list[Any], known: Collection[str]) -> list[Any]:
    """Return rows that are lists as objects: their names are the first row's, or they are a picture and its caption."""
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) > 1 for row in rows):
        return rows
    first = rows[0]
    if all(isinstance(name, str) for name in first) and sum(plain_name(name) in known for name in first) > 1:
        return [dict(zip(first, row, strict=True)) for row in rows[1:]]
    if len(first) == 2 and looks_like_picture(first[0]):
        return [{"image": name, "caption": caption} for name, caption in rows]
    return rows


def _alike(rows: list[Any], longest: list[Any], known: Collection[str]) -> bool:
    """Return whether a list holds objects with the fields of the longest one, or also with a picture and a caption."""
    if not rows or not isinstance(rows[0], dict):
        return False
    both = all(sum(plain_name(name) in known for name in one[0]) > 1 for one in (rows, longest))
    return both or set(rows[0]) == set(longest[0])


def _is_row(value: dict[str, Any], known: Collection[str]) -> bool:
    """Return whether an object is itself a row: a known column holds the name of one picture, as text or as the `path`
    of an object, or the picture. All other layouts hold lists, or have rows' numbers or names for keys."""
    cells = (one for name, one in value.items() if plain_name(name) in known)
    return any(looks_like_picture(one) or (isinstance(one, dict) and bool(_OF_A_PICTURE & set(one))) for one in cells)


def _named_rows(value: dict[str, Any]) -> ListRows:
    """Return one row per name of a picture, with its captions or an object of facts."""
    facts = ({"image": name, **(one if isinstance(one, dict) else {"caption": one})} for name, one in value.items())
    return ListRows(list(facts))


def _coco(images: list[Any], annotations: list[Any], path: Path) -> list[dict[str, Any]]:
    """Return one row per picture, with its captions in order."""
    rows = [one for one in images if isinstance(one, dict)]
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for one in annotations:
        if isinstance(one, dict) and isinstance(one.get("caption"), str):
            captions[_id(one.get("image_id"))].append(one["caption"])
    if not captions:  # boxes or outlines of objects
        return rows
    if lost := sum(map(len, captions.values())) - sum(
        len(captions[name]) for name in {_id(one.get("id")) for one in rows}
    ):
        logger.warning("%s: captions whose image_id is not among the images are not used: %d", path, lost)
    return [{**one, "captions": captions[_id(one.get("id"))]} for one in rows]


def _id(value: Any) -> str:
    """Return an identifier as text; some programs write whole numbers as 7.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
