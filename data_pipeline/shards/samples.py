"""Members of a tar -> samples: which members belong together, and what filters will ask about them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.common.errors import BadSample
from data_pipeline.content.captions import decode_text
from data_pipeline.shards.tar import Member, Problem

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "jpe", "avif")
"""Members that are pictures, the preferred first."""
SCORES = {
    "aesthetic": ("aesthetic_score", "aesthetic", "aesthetics", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark", "p_watermark"),
    "unsafe": ("punsafe", "unsafe", "p_unsafe"),
    "similarity": ("similarity", "clip_similarity", "clip_score"),
}
"""Index column -> names of it in a sample's .json, in any case."""
_LARGEST_SIDE = 2**31 - 1
_SCORE_OF = {name: column for column, names in SCORES.items() for name in names}


def key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


@dataclass(slots=True)
class _Found:
    """What the index keeps of one member."""

    extension: str
    stem: str
    part: tuple[int, int, int]
    facts: dict[str, Any]


def rows_of(members: Iterable[Member], problems: list[Problem]) -> list[dict[str, Any]]:
    """Members -> rows of the index (see `shard_index.SCHEMA`), by key; damage to single samples goes to `problems`."""
    groups: list[tuple[str, list[_Found]]] = []
    open_group: dict[str, list[_Found]] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            continue  # no extension, or a hidden file such as macOS' ._x.jpg
        key, extension = folder + slash + stem, extension.lower()
        kind = extension.rpartition(".")[2]
        facts = _facts(kind, member, problems)
        dotted = folder + slash + base.rpartition(".")[0]
        found = _Found(extension, dotted, (member.offset, member.size, member.checksum), facts)
        group = open_group.get(key)
        if group is None or any(other.extension == extension for other in group):
            if group is not None:
                problems.append(Problem("duplicate_key", member.offset, f"{member.name!r} comes again"))
            group = open_group[key] = []
            groups.append((key, group))
        group.append(found)
    rows = []
    for key, group in groups:
        if all("." in found.extension for found in group):
            for dotted in dict.fromkeys(found.stem for found in group):
                part = [found for found in group if found.stem == dotted]
                for found in part:
                    found.extension = found.extension.rpartition(".")[2]
                rows.append(_row(dotted, part))
        else:
            rows.append(_row(key, group))
    return rows


def _row(key: str, group: list[_Found]) -> dict[str, Any]:
    by_extension = {found.extension: found for found in group}
    image = next((by_extension[name] for name in IMAGE_EXTENSIONS if name in by_extension), None)
    data = by_extension["json"].facts if "json" in by_extension else {}
    text = by_extension["txt"].facts if "txt" in by_extension else {}
    size = image.facts if image else {}
    return {
        "key": key,
        "key_hash": key_hash(key),
        "layout": "/".join(found.extension for found in group),
        "offsets": [found.part[0] for found in group],
        "sizes": [found.part[1] for found in group],
        "checksums": [found.part[2] for found in group],
        "width": size.get("width"),
        "height": size.get("height"),
        "caption_length": text.get("length", data.get("length")),
        **{name: data.get(name) for name in SCORES},
        "problem": "missing_image" if image is None else "empty_image" if image.part[1] == 0 else None,
    }


def _facts(kind: str, member: Member, problems: list[Problem]) -> dict[str, Any]:
    """What filters will ask about this member."""
    if kind in IMAGE_EXTENSIONS:
        width, height = image_size(member.data)
        return {"width": width, "height": height}
    if kind == "txt":
        try:
            return {"length": len(decode_text(member.data).strip())}
        except BadSample:
            return {"length": len(member.data.decode("utf-8", "replace").strip())}
    if kind != "json":
        return {}
    try:
        data = json.loads(member.data)
    except (ValueError, RecursionError):
        problems.append(Problem("bad_json", member.offset, f"{member.name!r} is not valid JSON"))
        return {}
    if not isinstance(data, dict):
        return {}
    facts: dict[str, Any] = {}
    for name, value in data.items():
        column = _SCORE_OF.get(name.lower())
        if column and isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(OverflowError):  # an integer of hundreds of digits is no score
                facts[column] = float(value)
    if isinstance(data.get("caption"), str):
        facts["length"] = len(data["caption"].strip())
    return facts


def image_size(data: bytes) -> tuple[int | None, int | None]:
    """(width, height) in pixels from the header of an encoded picture; (None, None) if it cannot be read."""
    width, height = _header_size(data)
    return (width, height) if max(width or 0, height or 0) <= _LARGEST_SIDE else (None, None)


def _header_size(data: bytes) -> tuple[int | None, int | None]:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    try:
        if data[:2] == b"\xff\xd8":
            import simplejpeg

            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return width, height
    except ValueError:
        pass
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return None, None
