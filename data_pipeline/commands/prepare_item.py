"""What every source of `cascade prepare` returns, and small helpers shared by the sources."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipeline.common.errors import NO_FILE, PASSING, BadSample, DataError, system_words
from data_pipeline.config import MembersConfig
from data_pipeline.content.members import (
    IMAGE_EXTENSIONS,
    UNFINISHED,
    instead,
    is_unsupported,
    kind_of,
    picture_kind,
    unfinished_hint,
    unsupported_hint,
)
from data_pipeline.storage.retry import disk_fault, persist

T = TypeVar("T")

_PIECE = 1 << 20
RECORDS = ".prepare"
"""Folder in an output with the settings that it was made with."""
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders in which systems keep copies, thumbnails or deleted files, beside hidden ones (`.ipynb_checkpoints`)."""
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?:ing)?(?=$|[-_.\d])", re.IGNORECASE)
"""Beginning of the name of a folder or file of one split of a data set."""
_HALF_CHARACTERS = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates, except those by which Python represents bytes that are not UTF-8 (surrogateescape)."""


@dataclass
class Item:
    """One sample as read from a source."""

    name: str
    """Its name in reports: a path, or shard and key."""
    key: str
    extension: str
    """Extension of the picture."""
    image: bytes
    """The encoded picture."""
    caption: bytes | None
    """The content of the .txt."""
    meta: dict[str, Any]


class Source(Protocol):
    """Where `prepare` imports from: numbered items, each with a name."""

    identity: str
    """A hash that changes when the content of the source does."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return the name of item `number` in messages and metadata."""

    def read(self, number: int) -> Item:
        """Read item `number`. Raises `BadSample` if it is damaged."""

    def advice(self, reason: str) -> str:
        """Return a remedy for the case that most samples were dropped for this reason; may be empty."""

    def remarks(self) -> list[str]:
        """Return remarks to log after all samples have been read."""


def several_captions(count: int) -> list[str]:
    """Return the remark that so many samples have more than one caption; none if `count` is 0."""
    words = "the .txt has the first, and 'data.captions.sources={json:captions: 1}' trains with all"
    return [f"{count} samples have several captions: {words}"] if count else []


def caption_bytes(text: str | bytes) -> bytes:
    """Return a caption of a table as the content of a .txt: bytes that were not UTF-8 as they stand in the table, and
    without the half characters of JSON that was cut off (`\\ud83d`)."""
    return text if isinstance(text, bytes) else _HALF_CHARACTERS.sub("", text).encode("utf-8", "surrogateescape")


def nfc(name: str) -> str:
    """Return a name in Unicode normal form C; macOS may store names in form D."""
    return unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    """Return a name in Unicode normal form D."""
    return unicodedata.normalize("NFD", name)


def on_disk(path: Path, look: Callable[[], T]) -> T:
    """Return what `look` returns, which reads `path` or asks about it; its file system may fail for a while.

    Raises:
        StoreError: its file server is gone.
        OSError: any other error of `look`; also EIO, if it does not pass.
    """
    return disk_fault(lambda: persist(str(path), look))


def read_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        BadSample: `missing_image`, it cannot be read or is a Git LFS pointer.
        StoreError, OSError: its file server is gone, or this process has run out of something; the picture is not to
            blame.
    """
    try:
        data = on_disk(path, path.read_bytes)
        if "LFS" in (words := instead(data[:99])):
            raise BadSample("missing_image", f"{path}: {words}")
        return data
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_FILE:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSample("missing_image", f"{path}: {reason}") from error


def splits_among(files: Iterable[Path], root: Path) -> str:
    """Return the remark that files below `root` belong to several splits, which are read as one; empty otherwise.

    The names of folders or files tell: `train/`, `test-00000-of-00001.parquet`.
    """
    found: dict[str, Path] = {}
    for file in files:
        for part in file.relative_to(root).parts:
            if name := _SPLIT.match(part):
                found.setdefault(name[1].lower(), file)
                break
    if "train" not in found or len(found) == 1:
        return ""
    names = ", ".join(found)
    return (
        f"{root}: it contains several splits ({names}), all of which are read; to read one, give it as prepare.source"
    )


def files_below(root: Path, strict: bool = False) -> tuple[list[Path], list[Path]]:
    """Return the files below a folder, sorted, and the folders that were passed over: hidden ones and `_OF_SYSTEMS`.

    Links to folders elsewhere are followed, each target once; those to folders below `root` are not, as their files are
    found without them.

    Args:
        strict: refuse folders that cannot be listed, instead of passing them over.

    Raises:
        DataError: with `strict`, a folder cannot be listed.
        StoreError: its file system kept failing.
    """
    return persist(str(root), partial(_files_below, root, strict))


def _files_below(root: Path, strict: bool) -> tuple[list[Path], list[Path]]:
    def refuse(error: OSError) -> None:
        if error.errno in PASSING:
            raise error
        if strict:
            raise DataError(f"{error.filename}: {system_words(error)}") from error

    top = os.path.realpath(root)
    seen, files, passed_over = {top}, list[Path](), list[Path]()
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        files += [Path(folder, name) for name in names]
        kept = []
        for name in sorted(below):
            path = os.path.join(folder, name)
            place = os.path.realpath(path)
            if name.startswith(".") or name in _OF_SYSTEMS:
                passed_over += [Path(path)] * (name != RECORDS)
            elif place not in seen and not (os.path.islink(path) and place.startswith(os.path.join(top, ""))):
                seen.add(place)
                kept.append(name)
        below[:] = kept
    return sorted(files), passed_over


def file_size(path: Path) -> int:
    """Return the size of a file in bytes; -1 if it does not exist."""
    try:
        return on_disk(path, path.stat).st_size
    except (OSError, ValueError):
        return -1


def refuse_unsupported(data: bytes, name: str = "") -> None:
    """Raise `BadSample` (`unsupported_image`), with a remedy, for a format known by its content or the file's name but
    not supported, or (`unfinished_download`) for a name of a file that is not complete."""
    if kind_of(name.lower(), picture_kind(data), MembersConfig()) == UNFINISHED:
        raise BadSample(UNFINISHED, unfinished_hint(name))
    for kind in (picture_kind(data), name.rpartition(".")[2].lower()):
        if is_unsupported(kind):
            raise BadSample("unsupported_image", f"{kind}: {unsupported_hint(str(kind))}")


def image_ending(name: str, data: bytes) -> str:
    """Return the extension for a picture in a shard: its own if known, otherwise by content."""
    ending = name.rpartition(".")[2].lower()
    return ending if ending in IMAGE_EXTENSIONS else picture_kind(data) or IMAGE_EXTENSIONS[0]


def plain(value: Any) -> Any:
    """Convert a value of a table for JSON: bytes become text; NaN and infinity become None."""
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    return str(value)


def dump_json(meta: Mapping[str, Any]) -> bytes:
    """Return the .json member as ASCII; the same values give the same bytes."""
    return json.dumps(dict(meta), ensure_ascii=True).encode()


def hash_lines(lines: Iterable[Any]) -> str:
    """Return a short hash of the lines, hexadecimal."""
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return a short hash of a file's content, hexadecimal. Raises `OSError` or `StoreError`."""
    return on_disk(path, partial(_hash_file, path))


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
