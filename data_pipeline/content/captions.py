"""Which caption a sample is trained with, and how it is cleaned. Pure functions of the sample's bytes."""

from __future__ import annotations

import html
import json
import re
from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from data_pipeline.common.errors import BadSample
from data_pipeline.config import CaptionConfig
from data_pipeline.order.chance import below, uniform

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>|<!--[^<>]{0,500}-->")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_CONTROL = re.compile("[\\x00-\\x08\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f\\ufeff\\ufffe\\uffff]")
_BYTE_ORDER_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_ROOM_TO_CLEAN = 20
"""Texts are cut to this many times `max_characters` before cleaning, so that one huge text costs no more than that."""


def choose(sample: Mapping[str, Any], config: CaptionConfig, seed: int, position: int) -> str:
    """The caption of this sample at this position: a source with text, by weight, then one of its texts.

    Args:
        sample: the members' bytes by extension; `txt` and `json` are looked at.
        config: sources and their weights, cleaning, length.
        seed, position: see `chance.py`; the same pair always gives the same caption.

    Returns:
        Text without control characters, at most `config.max_characters` long, never empty.

    Raises:
        BadSample: `missing_caption` when no source has text, `bad_text` when the only text is in no known encoding,
            `bad_json` when captions are wanted from a .json member that cannot be parsed and no other source has text.
    """
    found, problem = _texts_by_source(sample, config)
    if not found:
        raise problem or BadSample("missing_caption", "no source has any text")
    bounds = list(accumulate(weight for weight, _ in found))
    source = bisect(bounds, uniform(seed, position, "caption source") * bounds[-1])
    texts = found[min(source, len(found) - 1)][1]
    return texts[below(len(texts), seed, position, "caption text")]


def candidates(sample: Mapping[str, Any], config: CaptionConfig) -> list[str]:
    """Every caption that `choose` may give for this sample, each once; empty where it would raise `BadSample`."""
    found, _ = _texts_by_source(sample, config)
    return list(dict.fromkeys(text for _, texts in found for text in texts))


def _texts_by_source(
    sample: Mapping[str, Any], config: CaptionConfig
) -> tuple[list[tuple[float, list[str]]], BadSample | None]:
    """(weight, cleaned texts) of each source that has any, and the last thing that went wrong with one."""
    found: list[tuple[float, list[str]]] = []
    problem: BadSample | None = None
    meta: dict[str, Any] | None = None
    for source, weight in config.weights.items():
        if weight <= 0:
            continue
        try:
            if source == "txt":
                texts = [decode_text(sample.get("txt") or b"")]
            else:
                meta = read_json(sample.get("json")) if meta is None else meta
                texts = _strings(meta.get(source.removeprefix("json:")))
        except BadSample as error:
            problem = error
            continue
        cleaned = [text for text in (clean(text, config) for text in texts) if text]
        if cleaned:
            found.append((float(weight), cleaned))
    return found, problem


def clean(text: str, config: CaptionConfig) -> str:
    """One line of text for the tokenizer, which takes neither control characters nor halves of surrogate pairs."""
    text = text[: _ROOM_TO_CLEAN * config.max_characters]
    text = _CONTROL.sub("", text.encode("utf-8", "ignore").decode())
    if config.clean:
        text = html.unescape(_TAG.sub(" ", text))
        text = " ".join(_URL.sub(" ", _CONTROL.sub("", text)).split())
    return text[: config.max_characters].strip()


def decode_text(data: bytes) -> str:
    """UTF-8, or UTF-16/32 with a byte order mark. Any other encoding would be a guess: `BadSample("bad_text")`."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"not {encoding.removesuffix('-sig')}: {error.reason}") from error


def read_json(member: bytes | None) -> dict[str, Any]:
    """The .json member; {} when there is none or it holds no object. Raises `BadSample("bad_json")`."""
    if not member:
        return {}
    try:
        value = json.loads(member)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    return value if isinstance(value, dict) else {}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
