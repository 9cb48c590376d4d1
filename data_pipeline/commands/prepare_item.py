"""What every source of `cascade prepare` gives, and the little things that all of them need."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.common.errors import BadSample
from data_pipeline.content.members import IMAGE_EXTENSIONS, instead, is_unsupported, picture_kind, unsupported_hint

_PIECE = 1 << 20


@dataclass
class Item:
    """One sample as found."""

    name: str
    """What reports call it: a path, or shard and key."""
    key: str
    extension: str
    """Of the picture."""
    image: bytes
    caption: bytes | None
    """The .txt, as bytes."""
    meta: dict[str, Any]


class Source(Protocol):
    """Where `prepare` imports from: numbered items, each with a name."""

    identity: str
    """Changes when the content of the source does."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Of item `number`, as it stands in messages and in the metadata."""

    def read(self, number: int) -> Item:
        """Raises `BadSample` where the sample is damaged."""

    def advice(self, reason: str) -> str:
        """What would help where most samples were dropped for this reason; may be empty."""

    def remarks(self) -> list[str]:
        """What is to be said after all samples were read."""


def nfc(name: str) -> str:
    """A name with composed letters: a Mac may write the same one in two parts."""
    return unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    """A name with letters in parts."""
    return unicodedata.normalize("NFD", name)


def read_file(path: Path) -> bytes:
    """Raises `BadSample("missing_image")` where it cannot be read, or stands for a file that is elsewhere."""
    try:
        data = path.read_bytes()
        if "LFS" in (words := instead(data[:99])):
            raise BadSample("missing_image", f"{path}: {words}")
        return data
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSample("missing_image", f"{path}: {reason}") from error


def file_size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def refuse_unsupported(data: bytes) -> None:
    """Raises `BadSample("unsupported_image")` for pictures that are known but not read, with what helps."""
    kind = picture_kind(data)
    if is_unsupported(kind):
        raise BadSample("unsupported_image", f"{kind}: {unsupported_hint(str(kind))}")


def image_ending(name: str, data: bytes) -> str:
    """The ending under which a picture goes into a shard; readers look at the content."""
    ending = name.rpartition(".")[2].lower()
    return ending if ending in IMAGE_EXTENSIONS else picture_kind(data) or IMAGE_EXTENSIONS[0]


def plain(value: Any) -> Any:
    """A value of a table as JSON has it; bytes as text."""
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
    """The .json member: ASCII, the same bytes for the same values."""
    return json.dumps(dict(meta), ensure_ascii=True).encode()


def hash_lines(lines: Iterable[Any]) -> str:
    """A short hash over lines, as hex: changes when any of them does."""
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Of the content, read piece by piece."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
