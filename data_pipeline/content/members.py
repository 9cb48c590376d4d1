"""Decides which file of a sample is the picture, the caption and the metadata: by name, or by content if the name
is not known. Pure functions shared by folders, shards and tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from data_pipeline.config import MembersConfig

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "jpe", "avif"),
    *("apng", "dib", "jp2", "j2k", "jpx", "jpf", "j2c", "jpc", "mpo", "ppm", "pgm", "pbm", "pnm", "qoi"),
)
"""Extensions of pictures, preferred ones first."""
CAPTION_ENDINGS = ("txt", "caption", "captions", "text", "cap", "prompt", "tags")
"""Extensions of captions, preferred ones first."""
_NAMED_IMAGES = ("image", "img", "picture", "photo", "pic")
"""Names, as in `KEY.image.jpg`, of the picture to train on among several; preferred ones first."""
_NAMED_CAPTIONS = ("caption", "captions", "text", "prompt", "txt", "label")
_MOST_NAMED_IMAGES = 8
"""The most pictures that one key's files may have to count as named members of one sample."""

_HINTS = {
    "heic": "convert it to JPEG first, with `heif-convert` or Python's pillow-heif",
    "jxl": "convert it to PNG first, with `djxl` or Python's pillow-jxl-plugin",
    "svg": "draw it as pixels first, for instance with `rsvg-convert`",
    "raw": "develop it first, for instance with `darktable-cli`",
    "psd": "export it as PNG first",
    "other": "convert it to PNG first, for instance with ImageMagick's `magick`",
    "video": "take frames out of it first, for instance with `ffmpeg`",
}
"""Kind of unsupported picture -> remedy."""
UNSUPPORTED = {
    **dict.fromkeys(("heic", "heif", "hif"), "heic"),
    "jxl": "jxl",
    **dict.fromkeys(("svg", "svgz"), "svg"),
    **dict.fromkeys(("cr2", "cr3", "nef", "arw", "dng", "raf", "orf", "rw2"), "raw"),
    **dict.fromkeys(("psd", "xcf"), "psd"),
    **dict.fromkeys(("tga", "ico", "icns", "pcx", "sgi", "dds", "exr", "hdr", "pdf"), "other"),
    **dict.fromkeys(("eps", "bpg", "emf", "wmf", "fits", "pfm", "jxr", "wdp", "jls"), "other"),
    **dict.fromkeys(("mp4", "mov", "webm", "avi", "mkv"), "video"),
}
"""Extension of unsupported pictures -> their kind."""

UNSUPPORTED_IMAGE, UNFINISHED = "unsupported_image", "unfinished_download"
NOT_READ = (UNSUPPORTED_IMAGE, UNFINISHED)
"""Kinds of pictures that are never read, and the reasons for which their samples are dropped."""
_UNFINISHED = (
    *("crdownload", "part", "partial", "download", "opdownload", "filepart", "aria2", "!ut", "!qb", "dlpart"),
    *("fdmdownload", "tmp", "temp", "incomplete", "unfinished"),
)
"""Extensions that browsers and other programs give to files until they have written all of them."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"II+\0", "tif"),  # above 4 GB, but also written for smaller ones
    (b"MM\0+", "tif"),
    (b"\0\0\0\x0cjP  ", "jp2"),
    (b"\xff\x4f\xff\x51", "j2k"),
    (b"qoif", "qoi"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
    (b"8BPS", "psd"),
)
_NUMBER = re.compile("[0-9]+")
_NETPBM = re.compile(rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d+\s+\d+")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml|<!--|<!DOCTYPE svg|<svg)[\s\S]{0,2000}?<svg|\s*<svg")


def picture_kind(data: bytes) -> str | None:
    """Detect the format of encoded bytes: one of `IMAGE_EXTENSIONS` or a kind of `UNSUPPORTED`; None: not a picture."""
    for signature, ending in _SIGNATURES:
        if data.startswith(signature):
            return ending
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if data[4:8] == b"ftyp":
        brands = data[8:12] + data[16:64]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        return "heic" if data[8:12] in _HEIC_BRANDS else "video"
    if _NETPBM.match(data[:1024]):
        return "ppm"
    return "svg" if _SVG.match(data[:4096]) else None


def instead(data: bytes) -> str:
    """Say what the data is instead of a picture or archive, with the remedy; empty if that is not known."""
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if data.lstrip()[:1] in (b"<", b"{"):
        return "it looks like an error page that was saved under this name: fetch it again"
    return ""


def unsupported_hint(kind: str) -> str:
    """Return the remedy for an unsupported picture, given its extension or kind. Raises `KeyError` for others."""
    return _HINTS[UNSUPPORTED.get(kind, kind)]


def is_unsupported(kind: str | None) -> bool:
    """Return whether this is the extension or kind of a picture that is known but not supported."""
    return kind in _HINTS or kind in UNSUPPORTED


def unfinished_hint(name: str) -> str:
    """Say what to do about a picture that a program has not finished writing."""
    return f".{ending(name)} marks a file that is not complete yet: let the download finish, or repeat it"


@dataclass(frozen=True, slots=True)
class Roles:
    """Names of the members to use, as the sample spells them; None if there is none."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    """Preferred ones first; the first one with text is used."""
    json: str | None = None
    unused_images: tuple[str, ...] = ()
    problem: str | None = None
    """Why the sample has no picture: `missing_image`, `ambiguous_image`, or one of `NOT_READ`."""


def ending(name: str) -> str:
    """Return what follows the last dot; the whole name if it has none."""
    return name.rpartition(".")[2]


def roles(kinds: Mapping[str, str | None], config: MembersConfig) -> Roles:
    """Choose which members of a sample to use.

    Args:
        kinds: name of each member (what follows the key, lower case) -> its kind, see `kind_of`.
        config: names that take precedence. By default a plain extension (`KEY.jpg`) beats a named member
            (`KEY.image.jpg`), and of several named pictures the one called image, img, picture, photo or pic is used.
    """
    pictures = [name for name, kind in kinds.items() if kind == "image"]
    texts = [name for name, kind in kinds.items() if kind == "text"]
    facts = [name for name, kind in kinds.items() if kind == "json"]
    image, problem = _image(pictures, list(kinds), config)
    if problem and UNSUPPORTED_IMAGE in kinds.values():
        problem = UNSUPPORTED_IMAGE
    elif problem == "missing_image" and UNFINISHED in kinds.values():
        problem = UNFINISHED
    elif f"{image}.aria2" in kinds:  # lies beside what aria2 is still writing
        image, problem = None, UNFINISHED
    captions = _chosen(kinds, config.caption) or tuple(sorted(texts, key=_caption_rank))
    found = _chosen(kinds, config.json) or tuple(sorted(facts, key=lambda name: ("." in name, "meta" not in name)))
    return Roles(
        image,
        tuple(name for name in captions if name != image),
        found[0] if found else None,
        tuple(name for name in pictures if name != image) if image else (),
        problem,
    )


def kind_of(name: str, content: str | None, config: MembersConfig) -> str | None:
    """Return the kind of a member: `image`, `text`, `json`, one of `NOT_READ`, or None.

    Args:
        name: what follows the key, lower case.
        content: `picture_kind` of its first bytes, used if the extension is not known.
    """
    last = ending(name)
    if last in IMAGE_EXTENSIONS:
        return "image"
    if last == "json" or matches(name, config.json):
        return "json"
    if matches(name, config.caption) or last in CAPTION_ENDINGS:
        return "text"
    if (
        last in _UNFINISHED
        and not matches(name, config.image)
        and (content or ending(name.rpartition(".")[0]) in IMAGE_EXTENSIONS)
    ):
        return UNFINISHED
    if last in UNSUPPORTED or is_unsupported(content):
        return UNSUPPORTED_IMAGE
    return "image" if content else None


def more_captions(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the members of a sample, by their names in the index, that `data.captions.sources=member:NAME` means.

    Args:
        names: of the members; the picture, the caption in use and the metadata are called by their kind (`jpg`).
        wanted: names or globs.
    """
    others = [name for name in names if name not in (*IMAGE_EXTENSIONS, "txt", "json")]
    texts = [name for name in others if kind_of(name, None, MembersConfig()) in ("text", "json") or name in wanted]
    return list(dict.fromkeys(name for one in wanted for name in texts if fnmatchcase(name, one)))


def matches(name: str, wanted: Iterable[str]) -> bool:
    """Return whether a member's name (`image.jpg`) matches an entry: as a whole, by stem, by extension or by glob."""
    return any(
        name == one or one in (name.rpartition(".")[0], ending(name)) or fnmatchcase(name, one) for one in wanted
    )


def _chosen(names: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    names = list(names)
    return tuple(dict.fromkeys(name for one in wanted for name in names if matches(name, (one,))))


def _image(pictures: list[str], names: list[str], config: MembersConfig) -> tuple[str | None, str | None]:
    """Return (the picture, None) or (None, the reason there is none)."""
    if config.image:
        found = _chosen(names, config.image)
        return (found[0], None) if found else (None, "missing_image")
    pictures = [name for name in pictures if ending(name) in IMAGE_EXTENSIONS] or pictures
    plain = [name for name in pictures if "." not in name]
    if plain:
        known = [name for name in IMAGE_EXTENSIONS if name in plain]
        return (known or plain)[0], None
    named = [name for word in _NAMED_IMAGES for name in pictures if name.split(".")[-2] == word]
    if named or len(pictures) == 1:
        return (named or pictures)[0], None
    return None, "ambiguous_image" if pictures else "missing_image"


def _caption_rank(name: str) -> tuple[bool, int, int]:
    """Sort key of captions: plain extensions, then a caption of one picture (`KEY.jpg.txt`), then `KEY.caption.txt`."""
    stem, _, last = name.rpartition(".")
    word = stem.rpartition(".")[2]
    order = CAPTION_ENDINGS.index(last) if last in CAPTION_ENDINGS else 0
    names = (*IMAGE_EXTENSIONS, *_NAMED_CAPTIONS)
    return bool(stem), names.index(word) if word in names else len(names), order


def split_samples(key: str, kinds: Mapping[str, str | None], config: MembersConfig) -> list[tuple[str, dict[str, str]]]:
    """Group the files whose names are equal up to the first dot into samples.

    By webdataset's rule they are one sample. Names that contain dots themselves (`photo.v2.jpg`, `photo.v2.txt`) are
    split at the last dot instead, if only that gives a picture and its caption.

    Args:
        key: the part of the names up to the first dot.
        kinds: what follows the key -> its kind, see `kind_of`.

    Returns:
        (key, {name within the sample: name in `kinds`}) of each sample.
    """
    whole = {name: name for name in kinds}
    if not any("." in name for name in kinds) or any("." in name for name in (*config.image, *config.caption)):
        return [(key, whole)]
    by_stem: dict[str, dict[str, str]] = {}
    for name in kinds:
        stem, _, last = name.rpartition(".")
        if kinds[name] != "image" and kinds.get(stem) == "image":  # photo.jpg.txt belongs to photo.jpg
            stem, last = stem.rpartition(".")[0], f"{ending(stem)}.{last}"
        by_stem.setdefault(stem, {})[last] = name
    texts_apart = any(_has(kinds, part, "text") and not _has(kinds, part, "image") for part in by_stem.values())
    own: dict[str, dict[str, str]] = {}
    for stem, part in by_stem.items():
        described = _has(kinds, part, "text") or (_has(kinds, part, "json") and not texts_apart)
        if stem and described and _has(kinds, part, "image"):
            own[stem] = part
    pictures = sum(kind == "image" for kind in kinds.values())
    described = any(kind in ("text", "json") for kind in kinds.values())
    if (
        not own
        and not _numbered(by_stem, kinds)
        and ("" in by_stem or (described and 1 <= pictures <= _MOST_NAMED_IMAGES))
    ):
        return [(key, whole)]
    # The names contain dots, so what is left of them must not be joined: a picture and a caption of two others.
    plain = by_stem.pop("", {})
    alone = ("image", "text", *["json"] * any(not _has(kinds, part, "text") for part in own.values()))
    for stem in [stem for stem, part in by_stem.items() if plain and not _has(kinds, part, *alone)]:
        plain.update({name: name for name in by_stem.pop(stem).values()})
    apart = [(f"{key}.{stem}", part) for stem, part in by_stem.items()]
    return [(key, plain), *apart] if plain else apart


def _numbered(by_stem: Mapping[str, Mapping[str, str]], kinds: Mapping[str, str | None]) -> bool:
    """Return whether the names of a picture and of a caption differ by a number, as those of two samples do."""
    numbered = {stem: _NUMBER.sub("0", stem) for stem in by_stem if _NUMBER.search(stem)}
    pictures = {form for stem, form in numbered.items() if _has(kinds, by_stem[stem], "image")}
    return any(form in pictures and _has(kinds, by_stem[stem], "text", "json") for stem, form in numbered.items())


def _has(kinds: Mapping[str, str | None], part: Mapping[str, str], *wanted: str) -> bool:
    return any(kinds[name] in wanted for name in part.values())


def advice(reason: str, layouts: Mapping[str, int]) -> str:
    """Say how to include samples that were dropped for `reason`; empty if their names are not the cause.

    Args:
        reason: one of `BAD_REASONS`.
        layouts: member names joined by "/", as in an index -> number of dropped samples with these members.
    """
    seen: Counter[str] = Counter()
    for layout, count in layouts.items():
        for name in layout.split("/"):
            seen[name] += count
    members = ", ".join(f".{name}" for name, _ in seen.most_common(8))
    if reason == UNSUPPORTED_IMAGE:
        kinds = [name for name in seen if is_unsupported(ending(name))]
        hints = (f"{seen[name]} x .{name}: {unsupported_hint(ending(name))}" for name in kinds[:4])
        return "; ".join(hints) or (f"the members are {members}" if members else "")
    if reason == UNFINISHED:
        names = [name for name in seen if kind_of(name, "", MembersConfig()) == UNFINISHED]
        return unfinished_hint(names[0]) if names else ""
    if reason == "missing_caption":
        others = [name for name in seen if kind_of(name, None, MembersConfig()) is None]
        if not others:
            return ""  # the content of the samples is the cause
        example = next((name for name in others if ending(name) in ("cls", "classname", "label")), others[0])
        return f"their members are {members}; if one is the caption, 'data.members={{caption: [{example}]}}' names it"
    if reason not in ("missing_image", "ambiguous_image"):
        return ""
    if reason == "missing_image" and all(kind_of(name, None, MembersConfig()) in ("text", "json") for name in seen):
        return (
            f"their only members are {members}: the files of a sample must have the same path up to the first dot; "
            "once they are unpacked, prepare.kind=folder also pairs images/1.jpg with captions/1.txt"
        )
    pictures = [name for name in seen if ending(name) in IMAGE_EXTENSIONS]
    if not pictures:
        return f"their members are {members}: none of them is a picture in a format that can be read"
    return f"their members are {members}; name the picture with 'data.members={{image: [{pictures[0]}]}}'"
