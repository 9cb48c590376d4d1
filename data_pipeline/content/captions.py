"""Chooses and cleans the caption of a sample. Pure functions of the sample's bytes."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from bisect import bisect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from data_pipeline.common.errors import BadSample
from data_pipeline.config import CaptionConfig, member_of
from data_pipeline.content.members import ending, more_captions
from data_pipeline.order.chance import hash_below, hash_uniform

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>|<!--[^<>]{0,500}-->")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_CONTROL = re.compile("[\\x00-\\x08\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f\\ufeff\\ufffe\\uffff]")
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
"""Unicode categories of control and formatting characters, surrogates and white space."""
_BYTE_ORDER_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_HIGH = 9
"""First byte that the upper half of a character does not have in the alphabets up to Arabic."""
JSON_CAPTIONS = ("caption", "captions", "text", "prompt", "description")
"""Fields of a .json that may hold the caption, as a string or a list of strings; preferred ones first."""
BOXES = "its text holds boxes of objects, as the labels of a detection data set do, not a caption"
_NO_VALUE = {"nan", "NaN", "NaT", "null", "NULL", "None", "NA", "N/A", "n/a", "#N/A", "<NA>", "\\N"}
"""What pandas, R, spreadsheets and databases write for a missing value."""
_TEXT_FIELDS = (*JSON_CAPTIONS, "raw", "sentence", "en", "assistant")
"""Fields of an object that represents one caption."""
_ANSWERING = ("gpt", "assistant", "model", "bot")
"""Speakers whose turns are the captions in a conversation about a picture (LLaVA's layout or that of chat models)."""
_NUMBER = r"(?>[ \t,]+[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
_LINE = rf"(?>\d+{_NUMBER}{{4,}}+|[A-Za-z_]\S*+{_NUMBER}{{8,}}+)[ \t]*+"
_BOXES = re.compile(rf"\s*+(?>{_LINE}(?:\r?\n\s*+|$))++")
FROM_FILES = "__captions__"
"""Key of a raw sample for its captions from `data.captions.files`, {name: captions}; present if a source uses them."""
_MOST_OF_BOXES = 2048
"""Characters by which a text is judged to be boxes."""
_ROOM_TO_CLEAN = 20
"""Texts are cut to this many times `max_characters` before cleaning, which bounds the cost of a huge text."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption as used in training, and the source it came from (see `CaptionConfig.sources`)."""

    text: str
    source: str


def choose_caption(sample: Mapping[str, Any], config: CaptionConfig, seed: int, position: int) -> Caption:
    """Choose the caption of a sample at a position: draw a source that has text by weight, then one of its texts.

    Args:
        sample: the members' bytes by extension. `txt` and `json` are read, and `FROM_FILES` if a `file:` source is set.
        config: sources and their weights, cleaning, length. Without sources: the .txt or, if it has no text, the
            caption in the .json.
        seed, position: see `chance.py`; the same pair always gives the same caption.

    Returns:
        Text without control characters, 1 to `config.max_characters` characters long.

    Raises:
        BadSample: no source has text (`missing_caption`), or none has text and the last failure was a text of unknown
            encoding (`bad_text`) or a .json member that cannot be parsed (`bad_json`).
    """
    found, problem = _texts_by_source(sample, config)
    if not found:
        raise problem or BadSample("missing_caption", _what_lies_beside(sample, config))
    bounds = list(accumulate(weight for weight, *_ in found))
    number = bisect(bounds, hash_uniform(seed, position, "caption source") * bounds[-1])
    _, source, texts = found[min(number, len(found) - 1)]
    return Caption(texts[hash_below(len(texts), seed, position, "caption text")], source)


def first_caption(sample: Mapping[str, Any], config: CaptionConfig) -> str:
    """Return the first text of the source with the largest weight that has one.

    Args:
        sample, config: see `choose_caption`.

    Raises:
        BadSample: see `choose_caption`.
    """
    found, problem = _texts_by_source(sample, config)
    if not found:
        raise problem or BadSample("missing_caption", _what_lies_beside(sample, config))
    return max(found, key=lambda one: one[0])[2][0]


def candidates(sample: Mapping[str, Any], config: CaptionConfig) -> list[str]:
    """Return every distinct caption `choose_caption` may return for a sample; empty if it would raise `BadSample`."""
    found, _ = _texts_by_source(sample, config)
    return list(dict.fromkeys(text for *_, texts in found for text in texts))


def _texts_by_source(
    sample: Mapping[str, Any], config: CaptionConfig
) -> tuple[list[tuple[float, str, list[str]]], BadSample | None]:
    """Return (weight, source, cleaned texts) of each source that has text, and the last error of a source."""
    found: list[tuple[float, str, list[str]]] = []
    problem: BadSample | None = None
    meta: dict[str, Any] | None = None
    for source, weight in (config.sources or {"txt": 1.0}).items():
        if weight <= 0:
            continue
        try:
            if source == "txt":
                texts = [decode_text(sample.get("txt") or b"", config.encoding)]
            elif source == "txt:lines":
                texts = decode_text(sample.get("txt") or b"", config.encoding).splitlines()
            elif source.startswith("member:"):
                texts = _texts_of_members(sample, member_of(source), config.encoding)
            elif source.startswith("file:"):
                texts = sample[FROM_FILES].get(source.removeprefix("file:"), [])
            else:
                meta = parse_json(sample.get("json")) if meta is None else meta
                texts = texts_in(value_at(meta, source.removeprefix("json:")))
        except BadSample as error:
            problem = error
            continue
        cleaned = _cleaned(texts, config)
        if cleaned:
            found.append((float(weight), source, cleaned))
    if not found and problem is None and not config.sources:
        with suppress(BadSample):  # a .json that cannot be parsed has no caption
            other = json_caption(parse_json(sample.get("json")))
            cleaned = _cleaned(other[1], config) if other else []
            if other and cleaned:
                found.append((1.0, f"json:{other[0]}", cleaned))
    return found, problem


def _texts_of_members(sample: Mapping[str, Any], wanted: str, encoding: str | None) -> list[str]:
    """Return the texts of further caption members, in the order of the archive; of a .json those of its caption."""
    texts = []
    for name in more_captions((name for name in sample if not name.startswith("__")), [wanted]):
        if ending(name) == "json":
            found = json_caption(parse_json(sample[name]))
            texts += found[1] if found else []
        else:
            texts.append(decode_text(sample[name], encoding))
    return texts


def _cleaned(texts: list[str], config: CaptionConfig) -> list[str]:
    return [text for text in (clean(text, config) for text in texts) if text]


def json_caption(meta: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Return the first field of a .json that holds captions, in any case, with its texts; None if there is none."""
    spelled = {str(name).lower(): name for name in [*meta][::-1]}
    spelled.update({name: name for name in JSON_CAPTIONS if name in meta})
    for name in JSON_CAPTIONS:
        if name in spelled and (texts := texts_in(meta[spelled[name]])):
            return spelled[name], texts
    return None


def texts_in(value: Any) -> list[str]:
    """Return the captions in a JSON value: a string, an object with one, or a list of these; of a conversation, the
    answers. Blank strings are skipped."""
    if isinstance(value, str):
        return [] if is_blank(value) or is_no_value(value) else [value]
    if isinstance(value, Mapping):
        names = (*_TEXT_FIELDS, "value", "content") if _is_turn(value) else _TEXT_FIELDS
        return next((found for name in names if (found := texts_in(value.get(name)))), [])
    if not isinstance(value, (list, tuple)):
        return []
    answers = [one for one in value if _is_turn(one) and str(one.get("from") or one.get("role")).lower() in _ANSWERING]
    turns = any(map(_is_turn, value))
    return [text for one in (answers if turns else value) for text in texts_in(one)]


def _is_turn(value: Any) -> bool:
    """Return whether a value is a turn of a conversation: {from, value} or {role, content}."""
    return isinstance(value, Mapping) and ("from" in value or "role" in value)


def value_at(meta: Any, path: str) -> Any:
    """Return the value at a path such as `meta.caption` or `turns.1.value`; None if there is none.

    A field whose name contains dots is found by its full name first.
    """
    if not path:
        return meta
    if isinstance(meta, Mapping) and path in meta:
        return meta[path]
    name, _, rest = path.partition(".")
    if isinstance(meta, Mapping):
        return value_at(meta[name], rest) if name in meta else None
    if isinstance(meta, (list, tuple)) and name.isdigit() and int(name) < len(meta):
        return value_at(meta[int(name)], rest)
    return None


def fields_with_text(value: Any, name: str = "", depth: int = 0) -> list[str]:
    """Return the paths of the fields that hold text, in the form `json:FIELD` expects."""
    if isinstance(value, Mapping) and depth < 4:
        below = ((f"{name}.{key}".lstrip("."), one) for key, one in value.items())
        return [path for key, one in below for path in fields_with_text(one, key, depth + 1)]
    return [name] if texts_in(value) else []


def _what_lies_beside(sample: Mapping[str, Any], config: CaptionConfig) -> str:
    """Explain why no caption was found: what was asked for, what is there, and which setting would use it."""
    asked = ", ".join(config.sources) or "the .txt and the .json"
    there = ", ".join(f".{name}" for name in sample if not name.startswith("__")) or "nothing"
    words = f"no text in {asked} (data.captions.sources, data.members.caption); the members are {there}"
    if text := (sample.get("txt") or b"").strip():
        if config.sources and not {"txt", "txt:lines"} & {*config.sources}:
            return f"{words}; the .txt has text"
        if why := no_caption(decode_text(text, config.encoding)):
            return f"{words}; {why}"
        if decode_text(text, config.encoding).strip():
            return f"{words}; data.captions.clean removes all of the .txt: {text[:40]!r}"
    try:
        texts = sorted(fields_with_text(parse_json(sample.get("json"))), key=lambda name: ("url" in name.lower(), name))
    except BadSample as error:
        return f"{words}; the .json cannot be parsed ({error.detail})"
    if texts:
        use = f"'data.captions.sources={{\"json:{texts[0]}\": 1}}' uses the first"
        return f"{words}; fields of the .json with text: {', '.join(texts[:8])}; {use}"
    return words


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it holds only white space and control or formatting characters, such as the
    zero width space."""
    return all(unicodedata.category(letter) in _UNSEEN for letter in text)


def is_no_value(text: str) -> bool:
    """Return whether a text is only what programs write for a missing value, such as `nan`."""
    return len(text) < 99 and text.strip() in _NO_VALUE


def no_caption(text: str) -> str:
    """Say why a text that shows something is no caption; empty if it may be one."""
    if is_no_value(text):
        return f"its text is {text.strip()!r}, which programs write for a missing value"
    return BOXES if holds_boxes(text) else ""


def holds_boxes(text: str) -> bool:
    """Return whether a text holds the boxes or outlines of objects, as the labels of detection data sets do (YOLO: a
    class number and at least four numbers per line; KITTI: a class and at least eight), rather than a caption."""
    if len(text) > _MOST_OF_BOXES:
        text = text[:_MOST_OF_BOXES]
        text = text.rpartition("\n")[0] or text.rpartition(" ")[0]  # whole lines, or whole numbers of an outline
    return _BOXES.fullmatch(text) is not None


def holds_json(text: str) -> bool:
    """Return whether a text is JSON that holds captions, such as `{"caption": ...}` or `["one", "two"]`."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    with suppress(ValueError, RecursionError):
        return json_caption(object_of(json.loads(text))) is not None
    return False


def clean(text: str, config: CaptionConfig) -> str:
    """Clean and truncate a text as `config` says; may return an empty string, as it does for what is `no_caption`.

    Control characters and lone surrogates are always removed: tokenizers do not accept them.
    """
    if no_caption(text):
        return ""
    text = text[: _ROOM_TO_CLEAN * config.max_characters]
    text = _CONTROL.sub("", text.encode("utf-8", "ignore").decode())
    if config.clean:
        text = html.unescape(_TAG.sub(" ", text))
        text = " ".join(_URL.sub(" ", _CONTROL.sub("", text)).split())
    text = text[: config.max_characters].strip()
    return "" if is_blank(text) else text


def decode_text(data: bytes, otherwise: str | None = None) -> str:
    """Decode UTF-8, UTF-16/32 with a byte order mark, UTF-16 that is recognized without one, or else `otherwise`.

    Raises:
        BadSample: `bad_text`, the bytes fit none of these; an encoding is never guessed.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and len(data) > 1 and min(data[:2]) < _HIGH:
        encoding = _unmarked(data) or encoding
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if otherwise:
            with suppress(UnicodeDecodeError):
                return data.decode(otherwise)
        if data.startswith((b"\x1f\x8b", b"\x80\x04", b"PK\x03\x04")):
            raise BadSample("bad_text", f"a caption is not text: it begins with {data[:8]!r}") from error
        tried = f"neither {encoding.removesuffix('-sig')} nor {otherwise}" if otherwise else "not UTF-8"
        raise BadSample(
            "bad_text", f"a caption is {tried}; set data.captions.encoding to its encoding, such as cp1252"
        ) from error


def _unmarked(data: bytes) -> str | None:
    """Return the encoding of UTF-16 without a byte order mark; None for other text.

    Up to the letters of Arabic, one byte of a character is below 9, which no text in UTF-8 has in every other place.
    """
    for name, high, low in (("utf-16-le", data[1::2], data[0::2]), ("utf-16-be", data[0::2], data[1::2])):
        if 2 * sum(byte < _HIGH for byte in high) > len(high) and 2 * sum(byte < _HIGH for byte in low) < len(low):
            return name
    return None


def parse_json(member: bytes | None) -> dict[str, Any]:
    """Parse the .json member into an object; {} if there is none or it holds neither an object nor text.

    A string or a list of strings becomes {"caption": ...}.

    Raises:
        BadSample: `bad_json`, it cannot be parsed.
    """
    if not member:
        return {}
    try:
        value = json.loads(member)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    return object_of(value)


def object_of(value: Any) -> dict[str, Any]:
    """Return a JSON value as a sample's metadata: an object as is, bare text as {"caption": value}, otherwise {}."""
    if isinstance(value, dict):
        return value
    return {"caption": value} if texts_in(value) else {}


def read_json_or_nothing(member: bytes | None) -> dict[str, Any]:
    """Parse the .json member; {} if it cannot be parsed, because the picture and its .txt are usable without it."""
    try:
        return parse_json(member)
    except BadSample:
        return {}
