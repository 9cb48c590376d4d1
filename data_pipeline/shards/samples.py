"""Groups the members of a tar into samples, and extracts the properties that filters use."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from posixpath import dirname, join, normpath
from typing import Any
from unicodedata import normalize

from data_pipeline.common.errors import BadSample
from data_pipeline.config import MembersConfig
from data_pipeline.content.captions import decode_text, holds_boxes, holds_json, is_no_value, json_caption, object_of
from data_pipeline.content.members import IMAGE_EXTENSIONS, ending, kind_of, picture_kind, roles, split_samples
from data_pipeline.shards.tar import MAX_MEMBER, MAX_TEXT, Member, Problem

SCORES = {
    "aesthetic": ("aesthetic_score", "aesthetic", "aesthetics", "aesthetic_score_laion_v2"),
    "watermark": ("pwatermark", "watermark", "p_watermark", "watermark_score"),
    "unsafe": ("punsafe", "unsafe", "p_unsafe"),
    "similarity": (
        *("similarity", "clip_similarity", "clip_score", "clip_l14_similarity_score", "clip_similarity_vitl14"),
        *("clip_b32_similarity_score", "clip_similarity_vitb32"),
    ),
}
"""Index column -> its names in a sample's .json, case-insensitive, preferred ones first."""
LICENCES = (
    *("license", "licence", "license_name", "licensename", "license_short_name", "licenseshortname"),
    *("license_url", "licenseurl", "usage_rights", "rights"),
)
"""Names of the licence in a sample's .json, case-insensitive; the first one with a meaningful value is used."""
UNKNOWN = "unknown"
"""The licence of samples that state none."""
_SAYS_NOTHING = ("", "?", "-", "none", "null", "nan", "n/a", UNKNOWN)
_LONGEST_LICENCE = 200
_TABLES = ("jsonl", "ndjson", "csv", "tsv", "parquet")
_LARGEST_SIDE = 2**31 - 1
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_SCORE_OF = {name: column for column, names in SCORES.items() for name in names}


def key_hash(key: str) -> int:
    """Return a 64-bit BLAKE2b hash of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


@dataclass(slots=True)
class _Found:
    """What the index needs of one member."""

    name: str
    """Full name in the archive."""
    part: tuple[int, int, int]
    kind: str | None
    content: str | None
    facts: dict[str, Any]


@dataclass(slots=True)
class _Group:
    """The members of one archive with the same key, by what follows the key."""

    key: str
    archive: int
    offset: int
    members: dict[str, _Found]


def rows_of(
    members: Iterable[Member], problems: list[Problem], names: MembersConfig | None = None
) -> list[dict[str, Any]]:
    """Group members by key into rows of the index (see `index.SCHEMA`).

    In the rows, members that are used are named by their kind: an extension of `IMAGE_EXTENSIONS`, `txt` or `json`.

    Args:
        members: the members of one archive.
        problems: problems of single samples are appended here.
        names: `data.members`.
    """
    names = names or MembersConfig()
    groups = _grouped(members, problems, names)
    rows = []
    for group in _joined(groups, problems) if any(group.archive for group in groups) else groups:
        own = group.members
        for sample_key, parts in split_samples(group.key, {name: one.kind for name, one in own.items()}, names):
            rows.append(_row(sample_key, {name: own[whole] for name, whole in parts.items()}, names, problems))
    return rows


class _Groups:
    """The groups of an archive, or of several in a row, in the order in which they begin."""

    def __init__(self, problems: list[Problem]) -> None:
        self.found: list[_Group] = []
        self._newest: dict[str, _Group] = {}
        self._problems = problems

    def add(self, found: _Found, archive: int, offset: int) -> None:
        """Add a member to the newest group with its key; begin another group if that has a member of its name."""
        folder, slash, base = found.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        one = normalize("NFC", key)  # macOS spells accents otherwise than the programs that write captions
        group = self._newest.get(one)
        if group is None or group.archive != archive or extension in group.members:
            if group is not None and group.archive == archive:
                self._problems.append(Problem("duplicate_key", offset, f"{found.name!r} occurs again"))
            group = self._newest[one] = _Group(key, archive, offset, {})
            self.found.append(group)
        group.members[extension] = found


def _grouped(members: Iterable[Member], problems: list[Problem], names: MembersConfig) -> list[_Group]:
    """Group members by key and archive, links as the members that they name."""
    groups = _Groups(problems)
    named: dict[str, _Found] = {}
    waiting: list[Member] = []
    for member in members:
        if member.link:
            waiting.append(member)  # a symbolic link may come before its target
            continue
        stem, dot, extension = member.name.rpartition("/")[2].partition(".")
        content = picture_kind(member.data)
        if not stem:
            if content:  # unlike macOS' ._x.jpg, which are not pictures
                problems.append(Problem("hidden_image", member.offset, f"{member.name!r} is hidden by its name"))
            continue
        if not dot and not content:
            continue  # such as README or LICENSE
        kind = kind_of(extension.lower(), content, names)
        facts = _facts(kind, member, problems)
        found = _Found(member.name, (member.offset, member.size, member.checksum), kind, content, facts)
        named[normpath(member.name)] = found
        groups.add(found, member.archive, member.offset)
        del member  # before the next one is read
    for member in waiting:
        target = named.get(_target(member))
        base = member.name.rpartition("/")[2]
        if target is not None and not base.startswith(".") and ("." in base or target.content):
            groups.add(_linked(member, target, names), member.archive, member.offset)
        elif target is None and kind_of(ending(member.name).lower(), None, names):
            words = f"{member.name!r} is a link to {member.link!r}, which is not in the archive: pack it with `tar -h`"
            problems.append(Problem("link_outside", member.offset, words))
    return groups.found


def _joined(groups: list[_Group], problems: list[Problem]) -> list[_Group]:
    """Join groups of the same key in several archives in a row, such as one of pictures and one of captions.

    If both have a member of the same name, or a picture, they are two samples: the caption of the one is not that of
    the other, whose own may be missing.
    """
    kept: list[_Group] = []
    last: dict[str, _Group] = {}
    for group in groups:
        one = normalize("NFC", group.key)
        before = last.get(one)
        if before is not None and before.archive != group.archive:
            if not (before.members.keys() & group.members.keys() or (_has_picture(before) and _has_picture(group))):
                before.members.update(group.members)
                continue
            name = next(iter(group.members.values())).name
            problems.append(Problem("duplicate_key", group.offset, f"{name!r} occurs again in another archive"))
        last[one] = group
        kept.append(group)
    return kept


def _has_picture(group: _Group) -> bool:
    """Return whether a group has a picture that is named by its key alone."""
    return any(found.kind == "image" and "." not in name for name, found in group.members.items())


def _row(key: str, group: dict[str, _Found], names: MembersConfig, problems: list[Problem]) -> dict[str, Any]:
    group = dict(sorted(group.items(), key=lambda item: item[1].part[0]))  # links may name earlier or later members
    used = roles({name: found.kind for name, found in group.items()}, names)
    image = group[used.image] if used.image is not None else None
    caption = next((name for name in used.captions if group[name].facts.get("length")), None)
    caption = caption or (used.captions[0] if used.captions else None)
    if used.problem == "missing_image" and (table := next((name for name in group if ending(name) in _TABLES), None)):
        words = (
            f"{group[table].name!r} is a table inside a shard, which is not read: unpack it, see prepare.kind=folder"
        )
        problems.append(Problem("unused_table", group[table].part[0], words))
    for name in used.unused_images:
        beside = image.name if image else ""
        words = f"{group[name].name!r} is a picture beside {beside!r}; choose one with data.members.image"
        problems.append(Problem("unused_image", group[name].part[0], words))
    others = [name for name in used.captions if name != caption]
    others += [name for name, found in group.items() if found.kind == "json" and name != used.json]
    for name in others:
        if group[name].facts.get("length") and not names.caption:
            words = f'{group[name].name!r} holds another caption: "member:{name}" in data.captions.sources would use it'
            problems.append(Problem("unused_caption", group[name].part[0], words))
    called = _called(group, used.image, caption, used.json)
    data = group[used.json].facts if used.json else {}
    text = group[caption].facts if caption else {}
    size = image.facts if image else {}
    return {
        "key": key,
        "key_hash": key_hash(key),
        "layout": "/".join(called.values()),
        "names": "/".join(group),
        "offsets": [found.part[0] for found in group.values()],
        "sizes": [found.part[1] for found in group.values()],
        "checksums": [found.part[2] for found in group.values()],
        "width": size.get("width"),
        "height": size.get("height"),
        "caption_length": text.get("length") or data.get("length", text.get("length")),
        **{name: data.get(name) for name in SCORES},
        "licence": data.get("licence"),
        "problem": used.problem if image is None else _size_problem(image.part[1]),
    }


def _target(link: Member) -> str:
    """Return the normalized name of the member that a link names: a hard link from the root, others from its folder."""
    return normpath(link.link if link.hard else join(dirname(link.name), link.link))


def _linked(link: Member, target: _Found, names: MembersConfig) -> _Found:
    kind = kind_of(link.name.rpartition("/")[2].partition(".")[2].lower(), target.content, names)
    return _Found(link.name, target.part, kind, target.content, target.facts if kind == target.kind else {})


def _size_problem(size: int) -> str | None:
    """Return why a picture of so many bytes is never used, or None."""
    return "empty_image" if size == 0 else "too_large" if size > MAX_MEMBER else None


def _called(group: dict[str, _Found], image: str | None, caption: str | None, facts: str | None) -> dict[str, str]:
    """Return the name of each member in the index: used ones by their kind, others never like a used one."""
    used = {}
    if image is not None:
        known = ending(image) if ending(image) in IMAGE_EXTENSIONS else group[image].content
        used[image] = known or IMAGE_EXTENSIONS[0]  # configured as the picture but not one: reading reports it
    if caption is not None:
        used[caption] = "txt"
    if facts is not None:
        used[facts] = "json"
    rank = IMAGE_EXTENSIONS.index(used[image]) if image is not None else -1
    better = {*IMAGE_EXTENSIONS[: rank + 1], *used.values()}
    called: dict[str, str] = {}
    for name in group:
        called[name] = used.get(name, f"unused.{name}" if name in better else name or "unused")
    return called


def _facts(kind: str | None, member: Member, problems: list[Problem]) -> dict[str, Any]:
    """Return the properties of a member that filters use."""
    if kind == "image":
        width, height = image_size(member.data)
        return {"width": width, "height": height}
    if kind in ("text", "json") and member.size > MAX_TEXT:
        words = (
            f"{member.name!r} has {member.size} bytes; captions and metadata above {MAX_TEXT >> 20} MiB are not used"
        )
        problems.append(Problem("oversized_text", member.offset, words))
        return {}
    if kind == "text":
        try:
            text = decode_text(member.data).strip()
        except BadSample:
            text = member.data.decode("utf-8", "replace").strip()
        if holds_boxes(text):
            words = f"{member.name!r} holds boxes of objects, as the labels of a detection data set do, not a caption"
            problems.append(Problem("box_labels", member.offset, words))
            return {"length": 0}
        if is_no_value(text):
            return {"length": 0}
        if holds_json(text):
            words = f"{member.name!r} is JSON, which is used as a caption as it stands: data.members.json would read it"
            problems.append(Problem("json_as_caption", member.offset, words))
        return {"length": len(text)}
    return _json_facts(member, problems) if kind == "json" else {}


def _json_facts(member: Member, problems: list[Problem]) -> dict[str, Any]:
    """Return the scores, the licence and the length of the caption in a .json."""
    try:
        data = object_of(json.loads(member.data))
    except (ValueError, RecursionError):
        problems.append(Problem("bad_json", member.offset, f"{member.name!r} is not valid JSON"))
        return {}
    facts: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    for name, value in data.items():
        column = _SCORE_OF.get(name.lower())
        if column is None or value is None or str(value).strip().lower() in _SAYS_NOTHING:  # also NaN
            continue
        score = _score(value)
        if score is None:
            words = f"{member.name!r}: {name!r} is {str(value)[:40]!r}, which is not a number"
            problems.append(Problem("bad_score", member.offset, words))
        elif column not in facts or SCORES[column].index(name.lower()) < SCORES[column].index(chosen[column]):
            facts[column], chosen[column] = score, name.lower()
    if licence := licence_of(data):
        facts["licence"] = licence
    caption = json_caption(data)
    if caption is not None:
        facts["length"] = len(caption[1][0].strip())
    return facts


def _score(value: Any) -> float | None:
    """Return a score as a number, also one written as text (`"6.1"`), as tables of strings have it; None otherwise."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with suppress(OverflowError):  # an integer of hundreds of digits is not a score
        return float(value)
    return None


def licence_of(facts: Mapping[str, Any]) -> str | None:
    """Return the licence stated in a sample's .json, white space collapsed, at most 200 characters; None without one.

    It may be a string, a number (as in COCO), or an object with a name, URL or id.
    """
    by_name = {name.lower(): value for name, value in facts.items()}
    for name in LICENCES:
        value = by_name.get(name)
        if isinstance(value, dict):
            value = next((value[key] for key in ("name", "url", "id") if value.get(key)), None)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            text = " ".join(str(value).split())[:_LONGEST_LICENCE]
            if text.lower() not in _SAYS_NOTHING:
                return text
    return None


def image_size(data: bytes) -> tuple[int | None, int | None]:
    """Return (width, height) in pixels from the header of an encoded picture; (None, None) if it cannot be read."""
    width, height = _header_size(data)
    return (width, height) if max(width or 0, height or 0) <= _LARGEST_SIDE else (None, None)


def _header_size(data: bytes) -> tuple[int | None, int | None]:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    from data_pipeline.content.images import dimensions

    try:
        return dimensions(data)
    except BadSample:
        return None, None
