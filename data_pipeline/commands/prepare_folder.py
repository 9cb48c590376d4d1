"""A folder of pictures as a source of `cascade prepare`. Files beside a picture are grouped as in shards."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.commands.prepare_item import (
    RECORDS,
    Item,
    caption_bytes,
    file_size,
    files_below,
    hash_lines,
    image_ending,
    nfc,
    read_file,
    refuse_unsupported,
    several_captions,
    splits_among,
)
from data_pipeline.commands.prepare_table import TableSource
from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import MembersConfig
from data_pipeline.content.captions import (
    BOXES,
    decode_text,
    holds_boxes,
    json_caption,
    no_caption,
    read_json_or_nothing,
)
from data_pipeline.content.members import (
    CAPTION_ENDINGS,
    IMAGE_EXTENSIONS,
    NOT_READ,
    UNFINISHED,
    UNSUPPORTED_IMAGE,
    Roles,
    is_unsupported,
    kind_of,
    picture_kind,
    roles,
    split_samples,
    unfinished_hint,
    unsupported_hint,
)
from data_pipeline.storage.retry import persist
from data_pipeline.tables.base import looks_like_picture

logger = logging.getLogger(__name__)

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that the `datasets` library puts into a folder of pictures."""
_TABLES = ("csv", "tsv", "jsonl", "parquet", "json")
_ARCHIVES = ("zip", "rar", "7z", "tar", "tgz")
_CAPTION_NAMES = ("caption", "captions", "text", "prompt", "label", "description")
"""Names of the caption beside the only picture of a folder, as in `DIR/caption.txt`."""


@dataclass(slots=True)
class _Entry:
    """A picture and the files that belong to it."""

    path: Path
    captions: tuple[Path, ...] = ()
    """Preferred ones first."""
    facts: Path | None = None
    problem: BadSample | None = None
    rows: list[tuple[TableSource, int]] = field(default_factory=list)
    """The rows of its metadata, each a table and a row of it."""


class FolderSource:
    """The pictures below a folder, in the order of their paths, with their captions and metadata.

    These come from files with the same name (see `members.split_samples`), or from a `metadata.jsonl` (.csv, .parquet).

    Args:
        folder: the folder.
        names: `data.members`.
        captions: `prepare.captions`.

    Raises:
        DataError: the folder does not exist, is an archive, or has no pictures below it.
    """

    def __init__(
        self,
        folder: str,
        names: MembersConfig | None = None,
        captions: str = "files",
        encoding: str | None = None,
    ) -> None:
        self.encoding = encoding
        self.folder, self.names, self.captions = Path(os.path.expanduser(folder)), names or MembersConfig(), captions
        if self.folder.is_file() and _is_archive(self.folder):
            tars = "; tar shards are read with prepare.kind=shards" if _ending(self.folder) in ("tar", "tgz") else ""
            raise DataError(f"prepare.source={folder}: it is an archive: unpack it and give the folder{tars}")
        if not self.folder.is_dir():
            raise DataError(f"prepare.source={folder}: {_no_folder(self.folder, folder)}")
        self._endings: Counter[str] = Counter()
        """Extensions of files that are neither pictures nor used with one."""
        self._alone: dict[tuple[Path, str], dict[str, Path]] = {}
        """Captions and metadata without a picture of the same name, by folder and name."""
        self._joined = 0
        """Number of pictures whose caption is in another folder or has another name."""
        self._hidden = list[Path]()
        """Pictures whose names begin with a dot, which are passed over."""
        self._archives = list[Path]()
        """Archives without a picture of the same name."""
        self._several = set[int]()
        """Pictures read so far that have several captions."""
        self._boxes = set[int]()
        """Pictures read so far beside which lies a text with boxes of objects."""
        self._files, passed_over = files_below(self.folder, strict=True)
        if passed_over:
            logger.warning("%s", _passed_over(passed_over))
        found = list(self._entries())
        self._join_alone(found)
        found.sort(key=lambda one: (_is_unsupported(one), one.path.relative_to(self.folder).parts))
        self.entries = found
        if not self.entries:
            raise DataError(f"prepare.source={folder}: {self._no_pictures()}")
        if remark := splits_among((entry.path.parent for entry in found), self.folder):
            logger.warning("%s", remark)
        self.tables = list(self._metadata())
        looks = (f"{self.name(i)} {_look(entry)}" for i, entry in enumerate(self.entries))
        self.identity = hash_lines([*looks, *(table.identity for table in self.tables)])

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, number: int) -> str:
        """Return the path of picture `number` relative to the folder, with forward slashes."""
        return self.entries[number].path.relative_to(self.folder).as_posix()

    def read(self, number: int) -> Item:
        """Read picture `number` with its caption and metadata. Raises `BadSample`."""
        entry = self.entries[number]
        if entry.problem is not None:
            raise BadSample(entry.problem.reason, entry.problem.detail)
        meta = read_json_or_nothing(read_file(entry.facts)) if entry.facts is not None else {}
        beside = list(dict.fromkeys(data for path in entry.captions if (data := read_file(path)).strip()))
        texts = [text for text in beside if not _is_no_caption(text)]
        caption = texts[0] if texts else None
        if any(map(_is_boxes, beside)):
            self._boxes.add(number)
        if len(texts) > 1 and not self.names.caption and "captions" not in meta:
            meta["captions"] = [decode_text(text, self.encoding) for text in texts]
            self._several.add(number)
        if self.captions != "files" and caption is None:
            place = entry.path.relative_to(self.folder)
            if self.captions == "folder" and len(place.parts) < 2:
                raise BadSample("missing_caption", "it is not in a subfolder of prepare.source")
            caption = _words(place.parent.name if self.captions == "folder" else place.stem).encode("utf-8", "replace")
        if entry.rows and caption is None and json_caption(meta) is None:
            caption, meta = self._from_rows(number, entry, meta)
        meta.setdefault("source", self.name(number))
        data = read_file(entry.path)
        refuse_unsupported(data)
        if caption is None and beside:
            caption = beside[0]  # the sample is dropped, with the reason, unless its .json has a caption
        return Item(self.name(number), f"{number:09d}", image_ending(entry.path.name, data), data, caption, meta)

    def _from_rows(self, number: int, entry: _Entry, meta: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Return the caption and the metadata of a picture that rows of tables describe."""
        texts: dict[str | bytes, None] = {}
        facts: dict[str, Any] = {}
        for table, row in entry.rows:
            _, found, more = table.row(row)
            texts.update(dict.fromkeys(found))
            if more["source"] == table.name(row):
                del more["source"]  # not a column of this name, but the path as the table has it
            facts = {**more, **facts}
        if len(entry.rows) > 1 and len(texts) > 1:
            facts["captions"] = [text for text in texts if isinstance(text, str)]
            self._several.add(number)
        return caption_bytes(next(iter(texts), b"")), {**facts, **meta}

    # ---------------------------------------------------------------------------------------------------- files

    def _entries(self) -> Iterator[_Entry]:
        groups: dict[tuple[Path, str], dict[str, Path]] = {}
        again: list[Path] = []
        for path in self._files:
            stem, dot, ending = nfc(path.name).partition(".")
            is_lost = path.is_symlink() and path.suffix[1:].lower() in IMAGE_EXTENSIONS  # reading it says so
            if not stem and path.suffix[1:].lower() in IMAGE_EXTENSIONS and _content("", path):
                self._hidden.append(path)  # unlike macOS' ._x.jpg, which are not pictures
            if not stem or not (path.is_file() or is_lost):
                continue
            group, ending = groups.setdefault((path.parent, stem), {}), ending.lower().rstrip()
            if ending in group:
                again.append(path)  # a.jpg and a.JPG
            else:
                group[ending if dot else ""] = path
        for (folder, stem), group in groups.items():
            kinds = {ending: kind_of(ending, _content(ending, path), self.names) for ending, path in group.items()}
            if not any(kind in ("image", *NOT_READ) for kind in kinds.values()):
                self._endings.update(name.rpartition(".")[2] or name for name in group)
                packed = [path for path in group.values() if _is_archive(path)]
                self._archives += [path for path in packed if not (folder / RECORDS).is_dir()]  # not this command's
                if any(kind in ("text", "json") for kind in kinds.values()):
                    self._alone[folder, stem] = group
                continue
            for _, parts in split_samples(stem, kinds, self.names):
                yield from self._of_sample(
                    {name: group[whole] for name, whole in parts.items()},
                    {name: kinds[whole] for name, whole in parts.items()},
                )
        for path in again:
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS:
                beside = groups[path.parent, nfc(path.name).partition(".")[0]]
                kinds = {name: kind_of(name, None, self.names) for name in beside}
                yield self._of(path, roles(kinds, self.names), beside)

    def _of_sample(self, files: dict[str, Path], kinds: dict[str, str | None]) -> Iterator[_Entry]:
        used = roles(kinds, self.names)
        pictures = [name for name, kind in kinds.items() if kind == "image" or name == used.image]
        for name, kind in kinds.items():
            if kind is None and name != used.image:
                self._endings[name.rpartition(".")[2] or name] += 1
        if used.image is None and (not pictures or used.problem == UNFINISHED):
            other = next((name for name, kind in kinds.items() if kind == used.problem), None)
            if other is not None and used.problem == UNFINISHED:
                yield _Entry(files[other], problem=BadSample(UNFINISHED, unfinished_hint(other)))
            elif other is not None:
                ending, content = other.rpartition(".")[2], _content(other, files[other])
                words = f".{ending}: {unsupported_hint(str(content) if is_unsupported(content) else ending)}"
                yield _Entry(files[other], problem=BadSample(UNSUPPORTED_IMAGE, words))
            return
        for name in pictures:
            if used.image is None:
                words = f"one of {', '.join(f'.{one}' for one in pictures)}; choose one with data.members.image"
                yield _Entry(files[name], problem=BadSample(used.problem or "ambiguous_image", words))
            elif name == used.image or "." not in name:  # a.png beside a.jpg is a separate picture
                yield self._of(files[name], used, files)
            else:
                words = f"beside {files[used.image].name}; choose one with data.members.image"
                yield _Entry(files[name], problem=BadSample("unused_image", words))

    def _of(self, picture: Path, used: Roles, files: dict[str, Path]) -> _Entry:
        facts = files[used.json] if used.json is not None else None
        return _Entry(picture, tuple(files[name] for name in used.captions), facts)

    def _join_alone(self, entries: list[_Entry]) -> None:
        """Find captions for pictures without one: of the same name in a sibling folder, if that has no pictures and
        their own no captions (images/1.jpg, captions/1.txt), `1_caption.txt`, or `caption.txt` in a folder with no
        other picture."""
        if not self._alone:
            return
        bare = [entry for entry in entries if not entry.captions and entry.facts is None and entry.problem is None]
        pictures = Counter(entry.path.parent for entry in entries)
        described = {entry.path.parent for entry in entries if entry.captions or entry.facts}
        in_siblings = self._alone_by_siblings(pictures)
        by_case = Counter((folder, stem.casefold()) for folder, stem in self._alone)
        spelled = {(folder, stem.casefold()): (folder, stem) for folder, stem in self._alone}
        alike = Counter((one.path.parent, nfc(one.path.name).partition(".")[0].casefold()) for one in entries)
        for entry in bare:
            folder, stem = entry.path.parent, nfc(entry.path.name).partition(".")[0]
            keys = self._siblings(folder) if folder not in described else ()
            near = [place for key in keys for place in in_siblings.get((stem, *key), [])]
            one = folder, stem.casefold()  # b.txt of B.JPG, where case makes no difference to the file system
            near = near or ([spelled[one]] if by_case[one] == alike[one] == 1 else [])
            near = near or [place for word in _CAPTION_NAMES if (place := (folder, f"{stem}_{word}")) in self._alone]
            if not near and pictures[folder] == 1 and folder != self.folder:
                near = [(folder, name) for name in _CAPTION_NAMES if (folder, name) in self._alone]
            near = [place for place in near if _has_words(self._alone[place].values())]  # labels/ beside captions/
            if len(near) == 1:
                files = self._alone[near[0]]
                kinds = {name: kind_of(name, None, self.names) for name in files}
                joined = self._of(entry.path, roles(kinds, self.names), files)
                entry.captions, entry.facts = joined.captions, joined.facts
                self._joined += near[0][1].casefold() != stem.casefold() or near[0][0] != folder

    def _alone_by_siblings(self, pictures: Iterable[Path]) -> Mapping[tuple[Any, ...], list[tuple[Path, str]]]:
        """Return the texts in folders without pictures in or below them, by (name, *key) for each key of `_siblings`.

        To compare each folder with every other one would take an hour for 20,000 folders.
        """
        above = {folder for below in pictures for folder in (below, *below.parents)}
        found: defaultdict[tuple[Any, ...], list[tuple[Path, str]]] = defaultdict(list)
        for folder, stem in self._alone:
            for key in self._siblings(folder) if folder not in above else ():
                found[stem, *key].append((folder, stem))
        return found

    def _siblings(self, folder: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield, for each part of the folder's path, its number and the other parts. Siblings, whose paths differ in
        exactly one part, have exactly one of these in common, and other folders none."""
        parts = folder.relative_to(self.folder).parts
        for number in range(len(parts)):
            yield number, (*parts[:number], *parts[number + 1 :])

    # ------------------------------------------------------------------------------------------------- metadata

    def _metadata(self) -> Iterator[TableSource]:
        """Joins the rows of metadata tables to the pictures that they name."""
        by_path: dict[Path, _Entry] = {}
        found: list[tuple[Path, TableSource, dict[int, tuple[_Entry, bool]]]] = []
        for place in (path for path in self._files if path.name.lower() in _METADATA):
            try:
                table = TableSource(str(place), self.names, encoding=self.encoding)
            except DataError as error:
                logger.warning("%s; ignoring it", error)
                continue
            by_path = by_path or {entry.path: entry for entry in self.entries}
            rows: dict[int, tuple[_Entry, bool]] = {}
            for number in range(len(table)):
                with suppress(BadSample):
                    picture, certain = table.find(number)
                    if picture in by_path:
                        rows[number] = by_path[picture], certain
            found.append((place, table, rows))
        sure = {id(entry) for *_, rows in found for entry, certain in rows.values() if certain}
        for place, table, rows in found:
            lost = []
            for number in range(len(table)):
                entry, certain = rows.get(number, (None, False))
                if entry is None or (not certain and id(entry) in sure):
                    lost.append(number)
                else:
                    entry.rows.append((table, number))
            if lost:
                words = "%s: %d of %d rows describe no picture of this folder, such as %r"
                logger.warning(words, place, len(lost), len(table), table.name(lost[0]))
            yield table

    def _no_pictures(self) -> str:
        """Return that the folder contains no pictures, what it contains instead, and the remedy."""
        beside = self._beside()
        packed = next((path for path in sorted(self.folder.iterdir()) if _is_archive(path)), None)
        remedy = f"; unpack {packed.name}" if packed else ""
        if any(path.suffix == ".tar" for path in self.folder.iterdir()):
            remedy = "; for shards set prepare.kind=shards"
        return (
            f"it contains no pictures ({', '.join(IMAGE_EXTENSIONS)}){beside and f' but {beside}'}{remedy}"
            f"{self._tables_hint()}"
        )

    def _beside(self) -> str:
        """Return the most frequent extensions of files that are not used; empty if there are none."""
        return ", ".join(f"{count} .{name}" for name, count in self._endings.most_common(6))

    def _tables_hint(self) -> str:
        if any(path.suffix in (".parquet", ".arrow") for path in self._files):
            return f"; it contains tables: use prepare.kind=table {shlex.quote(f'prepare.source={self.folder}')}"
        tables = sorted(path for path in self.folder.iterdir() if _ending(path) in _TABLES)
        texts = [] if tables else sorted(path for path in self.folder.glob("*.txt") if file_size(path) < 1 << 28)
        for path in texts[:20]:
            with suppress(DataError):
                if looks_like_picture(TableSource(str(path), self.names).name(0)):
                    tables.append(path)
                    break
        if not tables:
            return ""
        return f"; there is a table: use prepare.kind=table {shlex.quote(f'prepare.source={tables[0]}')}"

    def advice(self, reason: str) -> str:
        """Return a remedy for the case that most samples were dropped for `reason`; may be empty."""
        if reason == "missing_caption":
            if 2 * len(self._boxes) > len(self.entries):
                return (
                    f"{BOXES}; prepare.captions=folder uses folder names as captions, prepare.captions=name file names"
                )
            beside = self._beside()
            if not beside and any(entry.facts is not None for entry in self.entries):
                return ""  # the reason of the first one lists the fields of its .json
            if not beside:
                bare = next((entry for entry in self.entries if not entry.captions and entry.problem is None), None)
                such = f", such as {bare.path.relative_to(self.folder)}" if bare else ""
                return (
                    f"there are no other files beside them{such}; prepare.captions=folder uses folder names as "
                    "captions, prepare.captions=name file names"
                )
            looked = ", ".join(f".{name}" for name in CAPTION_ENDINGS)
            return (
                f"captions are searched for as {looked} and in the .json; found {beside}; {self._other_names()}"
                f"{self._tables_hint()}"
            )
        return next((one.problem.detail for one in self.entries if one.problem and one.problem.reason == reason), "")

    def _other_names(self) -> str:
        """Return what is wrong with the files beside pictures without a caption: their names or their extensions."""
        bare = next((entry.path.name for entry in self.entries if not entry.captions and entry.problem is None), "")
        alone = [path for files in self._alone.values() for name, path in files.items() if _is_caption(name)]
        if alone and not _has_words(alone):
            return "those texts hold numbers, as the labels of a detection data set do, and no words"
        texts = [path.name for path in alone]
        if not texts or not bare:
            return "set data.members.caption for other extensions"
        wanted = f"{nfc(bare).partition('.')[0]}.txt"
        if wanted in texts:
            return f"it is not clear which {wanted} belongs to {bare}: put the caption beside its picture"
        return f"a caption must have its picture's name: {wanted} for {bare}, not {min(texts)}"

    def remarks(self) -> list[str]:
        said = [remark for table in self.tables for remark in table.remarks()]
        said += several_captions(len(self._several))
        if self._boxes:
            words = "the texts beside %d pictures hold boxes of objects, as the labels of a detection data set do: "
            said.append(words % len(self._boxes) + "they are not used as captions")
        if self._archives:
            said.append(f"{len(self._archives)} archives are not read, such as {self._archives[0]}: unpack them")
        if self._hidden:
            said.append(
                f"{len(self._hidden)} pictures are hidden by their names and not used, such as {self._hidden[0]}"
            )
        if self._joined:
            said.append(f"{self._joined} pictures take their captions from a sibling folder or a caption.txt")
        return said


def _passed_over(folders: list[Path]) -> str:
    """Return the remark that these folders, which are hidden or the system's, are not searched."""
    some = ", ".join(map(str, folders[:3]))
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return f"hidden folders and those in which systems keep copies are not searched: {some}{more}"


def _no_folder(path: Path, given: str) -> str:
    """Return why a source is no folder of pictures, and what to give instead."""
    if "://" in given:
        return (
            f"only local folders are read: copy it first{', for example with `aws s3 sync`' * given.startswith('s3')}"
        )
    if path.is_file() and _ending(path) in _TABLES:
        return "it is a file; a table of pictures is read with prepare.kind=table"
    if path.is_file():
        return f"it is a file; give its folder, {path.parent}"
    if any(letter in given for letter in "*?["):
        return f"there is no such directory; give the folder itself, without a pattern: {path.parent}"
    return "there is no such directory; give the folder of your pictures"


def _content(ending: str, path: Path) -> str | None:
    """Return the picture format of a file, from its content, if its extension is unknown; others are not opened."""
    last = ending.rpartition(".")[2]
    if last in (*IMAGE_EXTENSIONS, *CAPTION_ENDINGS, *_TABLES):
        return None
    try:
        return picture_kind(_beginning(path))
    except OSError:
        return None


def _beginning(path: Path) -> bytes:
    """Return the first 4 kB of a file, also if its file system fails for a while. Raises `OSError` or `StoreError`."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(4096)

    return persist(str(path), read)


def _is_caption(name: str) -> bool:
    return name.rpartition(".")[2] in CAPTION_ENDINGS


def _is_unsupported(entry: _Entry) -> bool:
    return entry.problem is not None and entry.problem.reason == UNSUPPORTED_IMAGE


def _look(entry: _Entry) -> str:
    """Return what changes when a picture or its texts do; for texts also the mtime, because a corrected caption may
    have the same length."""
    texts = [*entry.captions[:1], *([entry.facts] if entry.facts else []), *entry.captions[1:]]
    return " ".join([str(file_size(entry.path)), *(f"{file_size(text)} {text.stat().st_mtime_ns}" for text in texts)])


def _ending(path: Path) -> str:
    """Return the extension in lower case; of `captions.csv.gz` that of the file inside."""
    return Path(path.name.lower().removesuffix(".gz")).suffix[1:]


def _is_archive(path: Path) -> bool:
    packed = path.suffix.lower() == ".gz" and _ending(path) not in _TABLES
    return (packed or _ending(path) in _ARCHIVES) and path.is_file()


def _words(name: str) -> str:
    """Return a name as a caption: spaces for underscores, without other trainers' repeat counts (`10_sks dog`)."""
    return re.sub(r"^\d+_(?=\D)", "", name).replace("_", " ").strip()


def _is_no_caption(text: bytes) -> bool:
    return text[:1].isascii() and no_caption(text.decode("utf-8", "replace")) != ""


def _is_boxes(text: bytes) -> bool:
    return text[:1].isascii() and holds_boxes(text.decode("utf-8", "replace"))


def _has_words(paths: Iterable[Path]) -> bool:
    """Return whether any of the texts contains letters; YOLO's box files, for example, do not."""
    for path in paths:
        with suppress(OSError):
            if re.search(rb"[^\W\d_]|[\x80-\xff]", _beginning(path)):
                return True
    return False
