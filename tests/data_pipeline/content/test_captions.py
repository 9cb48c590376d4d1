"""Choosing and cleaning captions."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.errors import BadSample, ConfigError
from data_pipeline.config import CaptionConfig
from data_pipeline.content.captions import candidates, choose_caption, clean, decode_text, holds_boxes

PLAIN = CaptionConfig()


def sample(text: bytes | None = None, **fields: Any) -> dict[str, bytes]:
    members = {"json": json.dumps(fields).encode()} if fields else {}
    return members if text is None else members | {"txt": text}


def test_sources_are_drawn_by_weight_and_the_same_at_the_same_position() -> None:
    config = CaptionConfig(sources={"txt": 3.0, "json:captions": 1.0})
    members = sample(b"own", captions=["a", "b"])
    chosen = [choose_caption(members, config, 1, position).text for position in range(4000)]
    assert chosen == [choose_caption(members, config, 1, position).text for position in range(4000)]
    count = Counter(chosen)
    assert 0.72 < count["own"] / 4000 < 0.78
    assert set(count) == {"own", "a", "b"} and abs(count["a"] - count["b"]) < 150
    assert chosen != [choose_caption(members, config, 2, position).text for position in range(4000)]


@pytest.mark.parametrize(
    "members", [sample(b" ", caption="spare"), sample(caption="spare"), sample(b"\xff", caption="spare")]
)
def test_the_weight_of_a_source_without_text_goes_to_the_others(members: dict[str, bytes]) -> None:
    config = CaptionConfig(sources={"txt": 1000.0, "json:caption": 1.0})
    assert choose_caption(members, config, 0, 0).text == "spare"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("0 0.5 0.5 0.1 0.1\r\n3 1 0 .2 1e-3\n", True),
        ("7 0.5 0.5 0.1 0.1 0.3 0.4\n" * 900, True),
        ("7" + " 0.5" * 1200, True),
        ("Car 0.0 0 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.7 -1.59\n", True),
        ("0 0.5 0.5 0.1 0.1\na cat", False),
        ("5 6 7 8 9 jokers", False),
        ("1999", False),
        ("10 20 30 40", False),
        ("0" + " 1111111111111111111" * 90 + "x", False),
    ],
)
def test_boxes_of_objects_are_no_caption(text: str, boxes: bool) -> None:
    assert holds_boxes(text) is boxes
    members = sample(text.encode(), caption="spare")
    assert choose_caption(members, CaptionConfig(), 0, 0).source == ("json:caption" if boxes else "txt")


def test_invalid_json_does_not_cost_a_sample_that_has_its_text() -> None:
    config = CaptionConfig(sources={"txt": 1.0, "json:caption": 1000.0})
    assert choose_caption({"txt": b"text", "json": b"{not json"}, config, 0, 0).text == "text"


@pytest.mark.parametrize(
    ("members", "sources", "reason"),
    [
        ({}, {"txt": 1.0}, "missing_caption"),
        (sample(b""), {"txt": 1.0}, "missing_caption"),
        (sample(b" \n\t "), {"txt": 1.0}, "missing_caption"),
        (sample(b"\x00\x01"), {"txt": 1.0}, "missing_caption"),
        (sample("\u200b\u2060".encode()), {"txt": 1.0}, "missing_caption"),
        (sample("café".encode("latin-1")), {"txt": 1.0}, "bad_text"),
        ({"json": b"{"}, {"json:caption": 1.0}, "bad_json"),
        ({"json": b"[" * 100_000}, {"json:caption": 1.0}, "bad_json"),
        (sample(caption=None), {"json:caption": 1.0}, "missing_caption"),
        (sample(caption=7), {"json:caption": 1.0}, "missing_caption"),
        ({"json": b"[1]"}, {"json:caption": 1.0}, "missing_caption"),
        (sample(b"text", caption="x"), {"txt": 0.0, "json:other": 1.0}, "missing_caption"),
    ],
)
def test_samples_without_a_usable_caption(members: dict[str, bytes], sources: dict[str, float], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        choose_caption(members, CaptionConfig(sources=sources), 0, 0)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a   dog\n on\ta mat ", "a dog on a mat"),
        ("a&nbsp;cat &amp; a &lt;hat&gt;", "a cat & a <hat>"),
        ("<p>a <b>red</b> kite</p><br/>", "a red kite"),
        ("i <3 you, 2 < 3 > 1", "i <3 you, 2 < 3 > 1"),
        ("see https://example.org/x?y=1 now www.example.org", "see now"),
        ("nul\x00 bell\x07 mark\ufeff half\ud800", "nul bell mark half"),
        ("&#0;&#7;a", "\ufffda"),
        ("eine Straße in 東京 🎈", "eine Straße in 東京 🎈"),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean(raw, PLAIN) == cleaned


def test_without_cleaning_only_control_characters_go() -> None:
    assert clean("<b>two\n lines</b>\x00", CaptionConfig(clean=False)) == "<b>two\n lines</b>"


def test_long_texts_are_cut_before_and_after_cleaning() -> None:
    assert clean("x" * 100_000, CaptionConfig(max_characters=77)) == "x" * 77
    assert clean("<" * 1_000_000, PLAIN) == "<" * 1000


@given(st.text(max_size=300), st.booleans(), st.integers(1, 50))
def test_cleaned_texts_are_short_encodable_and_free_of_controls(text: str, full: bool, limit: int) -> None:
    cleaned = clean(text, CaptionConfig(clean=full, max_characters=limit))
    assert len(cleaned) <= limit
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert not any(ord(character) < 32 and character not in "\t\n\v\f\r" for character in cleaned)
    if full:
        assert cleaned == " ".join(cleaned.split())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_byte_order_mark_are_read(encoding: str) -> None:
    assert decode_text("ein Hügel".encode(encoding)) == "ein Hügel"


@pytest.mark.parametrize("text", ["a cat", "кот", "γάτα — και σκύλος", "on\0e", "\0", "x", ""])
def test_wide_text_without_a_mark_is_recognized_and_other_text_is_not(text: str) -> None:
    assert decode_text(text.encode()) == text
    if len(text) > 1 and "\0" not in text:
        assert decode_text(text.encode("utf-16-le")) == decode_text(text.encode("utf-16-be")) == text


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"txt": 0.0}, "at least one"),
        ({"text": 1.0}, "is not a source; use txt"),
        ({"txt": -1.0}, "must not be negative"),
    ],
)
def test_impossible_sources_are_refused(sources: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CaptionConfig(sources=sources)


def test_each_line_is_a_caption() -> None:
    config = CaptionConfig(sources={"txt:lines": 1})
    sample = {"txt": b"a red circle\r\n\n  a circle on  white \n"}
    assert candidates(sample, config) == ["a red circle", "a circle on white"]
    assert {choose_caption(sample, config, 0, position).text for position in range(30)} == {*candidates(sample, config)}
    assert choose_caption(sample, config, 0, 1).source == "txt:lines"


TALK = [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": "one"}]


@pytest.mark.parametrize(
    ("value", "source"),
    [
        (["one", "one"], "json:caption"),
        ("one", "json:caption"),
        ({"captions": [{"text": "one"}, {"raw": "one"}]}, "json:captions"),
        ({"caption": {"en": "one"}}, "json:caption"),
    ],
)
def test_captions_of_a_json_are_found_in_any_shape(value: Any, source: str) -> None:
    caption = choose_caption({"json": json.dumps(value).encode()}, PLAIN, 0, 0)
    assert (caption.text, caption.source) == ("one", source)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"meta": {"caption": "one"}}, "meta.caption"),
        ({"meta.caption": "one", "meta": {}}, "meta.caption"),
        ({"turns": [{"text": "zero"}, {"text": "one"}]}, "turns.1.text"),
        ({"conversations": TALK}, "conversations"),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "one"}]}, "messages"),
    ],
)
def test_a_field_inside_another_is_named_by_its_path(value: Any, field: str) -> None:
    members = {"json": json.dumps(value).encode()}
    assert choose_caption(members, CaptionConfig(sources={f"json:{field}": 1.0}), 0, 0).text == "one"
    with pytest.raises(BadSample) as caught:
        choose_caption(members, PLAIN, 0, 0)
    assert field.partition(".1")[0] in caught.value.detail, "the message names it"


def test_another_encoding_is_used_when_it_is_named() -> None:
    with pytest.raises(BadSample, match="bad_text") as caught:
        choose_caption(sample("caf\u00e9".encode("cp1252")), PLAIN, 0, 0)
    assert "data.captions.encoding" in caught.value.detail
    config = CaptionConfig(encoding="cp1252")
    assert choose_caption(sample("caf\u00e9".encode("cp1252")), config, 0, 0).text == "caf\u00e9"
    assert choose_caption(sample("caf\u00e9".encode()), config, 0, 0).text == "caf\u00e9", "UTF-8 comes first"
    for encoding in ("utf-16-le", "utf-32-be"):
        text = "\u4e2d\u6587" * 3
        assert choose_caption(sample(text.encode(encoding)), CaptionConfig(encoding=encoding), 0, 0).text == text
    with pytest.raises(ConfigError, match=r"data\.captions\.encoding=nonsense"):
        CaptionConfig(encoding="nonsense")
    with pytest.raises(ConfigError):
        CaptionConfig(encoding="base64_codec")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"txt": b"<br><p></p>"}, r"data\.captions\.clean removes all of the .txt: b'<br><p></p>'"),
        ({"txt": b"https://x.org/1.jpg"}, r"data\.captions\.clean removes all"),
        ({"json": b'{"caption": "a",}'}, r"the \.json cannot be parsed"),
        ({"json": b'{"caption": 5}'}, r"the members are \.json$"),
        (
            {"json": b'{"page_url": "u", "blip_caption": "x"}'},
            r"""'data\.captions\.sources=\{"json:blip_caption": 1\}'""",
        ),
        ({"txt": b"\x1f\x8b\x08\0\0\0\0\0\xff"}, "bad_text: a caption is not text"),
    ],
)
def test_the_reason_why_a_caption_is_not_used_is_reported(members: dict[str, bytes], words: str) -> None:
    with pytest.raises(BadSample, match=words):
        choose_caption(members, CaptionConfig(), 0, 0)


@pytest.mark.parametrize("name", ["TEXT", "Caption", "PROMPT"])
def test_fields_are_known_in_any_case(name: str) -> None:
    sample = {"json": json.dumps({"URL": "u", name: "a cat"}).encode()}
    found = choose_caption(sample, CaptionConfig(), 0, 0)
    assert (found.text, found.source) == ("a cat", f"json:{name}")
