"""A folder of pictures as a source of `cascade prepare`, with what lies beside each: the layouts of shards."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.commands.prepare_item import Item, file_size, hash_lines, image_ending, read_file, refuse_unsupported
from data_pipeline.commands.prepare_table import TableSource
from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import MembersConfig
from data_pipeline.content.captions import json_caption, read_json_or_nothing
from data_pipeline.content.members import (
    CAPTION_ENDINGS,
    IMAGE_EXTENSIONS,
    Roles,
    kind_of,
    picture_kind,
    roles,
    split_samples,
    unsupported_hint,
)

logger = logging.getLogger(__name__)

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that `datasets` puts into a folder of pictures."""
_TABLES = ("csv", "tsv", "jsonl", "parquet", "json", "gz")


@dataclass(slots=True)
class _Entry:
    """A picture and what lies beside it."""

    path: Path
    captions: tuple[Path, ...] = ()
    """The preferred first."""
    facts: Path | None = None
    problem: BadSample | None = None
    row: tuple[TableSource, int] | None = None
    """Of a metadata table."""


class FolderSource:
    """Every picture below a folder, in the order of their paths, with the caption and .json of the same name beside it,
    or those that a `metadata.jsonl` (.csv, .parquet) gives. Names as in `members.split_samples`."""

    def __init__(self, folder: str, names: MembersConfig | None = None) -> None:
        self.folder, self.names = Path(os.path.expanduser(folder)), names or MembersConfig()
        if not self.folder.is_dir():
            raise DataError(f"prepare.source={folder}: there is no such directory; name the folder of your pictures")
        self._endings: Counter[str] = Counter()
        """Of the files that are neither pictures nor used beside one."""
        found = list(self._entries())
        found.sort(key=lambda one: (_is_unsupported(one), one.path.relative_to(self.folder).parts))
        self.entries = found
        if not self.entries:
            shards = any(name.endswith(".tar") for name in os.listdir(self.folder))
            raise DataError(
                f"prepare.source={folder}: no pictures ({', '.join(IMAGE_EXTENSIONS)}) lie below it"
                f"{'; for shards set prepare.kind=shards' if shards else ''}{self._tables_hint()}"
            )
        self.tables = list(self._metadata())
        looks = (f"{self.name(i)} {_look(entry)}" for i, entry in enumerate(self.entries))
        self.identity = hash_lines([*looks, *(table.identity for table in self.tables)])

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, number: int) -> str:
        """Path below the folder, with forward slashes."""
        return self.entries[number].path.relative_to(self.folder).as_posix()

    def read(self, number: int) -> Item:
        """The picture with the caption and the metadata beside it."""
        entry = self.entries[number]
        if entry.problem is not None:
            raise BadSample(entry.problem.reason, entry.problem.detail)
        meta = read_json_or_nothing(read_file(entry.facts)) if entry.facts is not None else {}
        caption = next((data for path in entry.captions if (data := read_file(path)).strip()), None)
        if entry.row is not None and caption is None and json_caption(meta) is None:
            table, row = entry.row
            _, texts, facts = table.row(row)
            meta = {**facts, **meta}
            first = texts[0] if texts else b""
            caption = first.encode("utf-8", "surrogateescape") if isinstance(first, str) else first
        meta.setdefault("source", self.name(number))
        data = read_file(entry.path)
        refuse_unsupported(data)
        return Item(self.name(number), f"{number:09d}", image_ending(entry.path.name, data), data, caption, meta)

    # ---------------------------------------------------------------------------------------------------- files

    def _entries(self) -> Iterator[_Entry]:
        groups: dict[tuple[Path, str], dict[str, Path]] = {}
        again: list[Path] = []
        for path in sorted(self.folder.rglob("*")):
            stem, dot, ending = path.name.partition(".")
            if not stem or not path.is_file():
                continue
            group = groups.setdefault((path.parent, stem), {})
            if ending.lower() in group:
                again.append(path)  # a.jpg and a.JPG
            else:
                group[ending.lower() if dot else ""] = path
        for (_, stem), group in groups.items():
            kinds = {ending: kind_of(ending, _content(ending, path), self.names) for ending, path in group.items()}
            if not any(kind in ("image", "unsupported") for kind in kinds.values()):
                self._endings.update(name.rpartition(".")[2] or name for name in group)
                continue
            for _, parts in split_samples(stem, kinds, self.names):
                yield from self._of_sample(
                    {name: group[whole] for name, whole in parts.items()},
                    {name: kinds[whole] for name, whole in parts.items()},
                )
        for path in again:
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS:
                beside = groups[path.parent, path.name.partition(".")[0]]
                kinds = {name: kind_of(name, None, self.names) for name in beside}
                yield self._of(path, roles(kinds, self.names), beside)

    def _of_sample(self, files: dict[str, Path], kinds: dict[str, str | None]) -> Iterator[_Entry]:
        used = roles(kinds, self.names)
        pictures = [name for name, kind in kinds.items() if kind == "image" or name == used.image]
        for name, kind in kinds.items():
            if kind is None and name != used.image:
                self._endings[name.rpartition(".")[2] or name] += 1
        if used.image is None and not pictures:
            other = next((name for name, kind in kinds.items() if kind == "unsupported"), None)
            if other is not None:
                ending = other.rpartition(".")[2]
                words = f".{ending}: {unsupported_hint(_content(ending, files[other]) or ending)}"
                yield _Entry(files[other], problem=BadSample("unsupported_image", words))
            return
        for name in pictures:
            if used.image is None:
                words = f"one of {', '.join(f'.{one}' for one in pictures)}; data.members.image chooses"
                yield _Entry(files[name], problem=BadSample(used.problem or "ambiguous_image", words))
            elif name == used.image or "." not in name:  # a.png beside a.jpg is a picture of its own
                yield self._of(files[name], used, files)
            else:
                words = f"beside {files[used.image].name}; data.members.image chooses"
                yield _Entry(files[name], problem=BadSample("unused_image", words))

    def _of(self, picture: Path, used: Roles, files: dict[str, Path]) -> _Entry:
        facts = files[used.json] if used.json is not None else None
        return _Entry(picture, tuple(files[name] for name in used.captions), facts)

    # ------------------------------------------------------------------------------------------------- metadata

    def _metadata(self) -> Iterator[TableSource]:
        """Joins the rows of metadata tables to the pictures that they name."""
        by_path: dict[Path, _Entry] | None = None
        for place in sorted(path for name in _METADATA for path in self.folder.rglob(name)):
            try:
                table = TableSource(str(place), self.names)
            except DataError as error:
                logger.warning("%s; it is not used", error)
                continue
            if by_path is None:
                by_path = {entry.path: entry for entry in self.entries}
            for number in range(len(table)):
                with suppress(BadSample):
                    entry = by_path.get(table.find(table.name(number)))
                    if entry is not None:
                        entry.row = table, number
            yield table

    def _tables_hint(self) -> str:
        tables = sorted(path for path in self.folder.iterdir() if path.suffix[1:].lower() in _TABLES)
        return f"; a table is there: prepare.kind=table prepare.source={tables[0]}" if tables else ""

    def advice(self, reason: str) -> str:
        """What would help where most samples were dropped for `reason`; may be empty."""
        if reason == "missing_caption":
            beside = ", ".join(f"{count} .{name}" for name, count in self._endings.most_common(6)) or "nothing else"
            looked = ", ".join(f".{name}" for name in CAPTION_ENDINGS)
            return (
                f"captions are looked for as {looked} and in the .json; there lie {beside}; data.members.caption names "
                f"other endings{self._tables_hint()}"
            )
        first = next((one.problem.detail for one in self.entries if one.problem and one.problem.reason == reason), "")
        return first

    def remarks(self) -> list[str]:
        return [remark for table in self.tables for remark in table.remarks()]


def _content(ending: str, path: Path) -> str | None:
    """What a file is whose name does not say it; the others are not opened."""
    last = ending.rpartition(".")[2]
    if last in (*IMAGE_EXTENSIONS, *CAPTION_ENDINGS, *_TABLES):
        return None
    try:
        with open(path, "rb") as file:
            return picture_kind(file.read(4096))
    except OSError:
        return None


def _is_unsupported(entry: _Entry) -> bool:
    return entry.problem is not None and entry.problem.reason == "unsupported_image"


def _look(entry: _Entry) -> str:
    """What shows that a picture or a text beside it is another one: a corrected caption may be as long as before."""
    texts = [*entry.captions[:1], *([entry.facts] if entry.facts else []), *entry.captions[1:]]
    return " ".join([str(file_size(entry.path)), *(f"{file_size(text)} {text.stat().st_mtime_ns}" for text in texts)])
