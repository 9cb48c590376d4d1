"""The two kinds of text encoder; the T5 models are tiny ones made here, and loaded in the same way as real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError, UserError
from tests.training.text.tiny_t5 import tiny_t5
from training.config.experiment import TextConfig
from training.text import encoder as text_encoder
from training.text import words
from training.text.encoder import T5Encoder, WordEncoder, build_text_encoder
from training.text.words import hash_vector, normalise_word, split_words, token_vectors, word_vector

CAPTION = "a large red circle on a white background"


def tokens(text: str) -> list[str]:
    return [text[start:end] for start, end in split_words(text)]


@pytest.fixture(scope="module")
def t5_path(tmp_path_factory) -> str:
    return tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def byt5_path(tmp_path_factory) -> str:
    return tiny_t5(tmp_path_factory.mktemp("byt5"), byte_level=True)


def t5_config(path: str, **settings) -> TextConfig:
    return TextConfig(**{"kind": "t5", "path": path, "dim": 16, "max_tokens": 24} | settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A large, red circle!", ["A", "large", "red", "circle"]),
        ("蓝天白云下的沙滩", list("蓝天白云下的沙滩")),
        ("ein größeres Bild", ["ein", "größeres", "Bild"]),
        ("the dog's 3 bones", ["the", "dog's", "3", "bones"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301 au lait", ["cafe\u0301", "au", "lait"]),
        ("red 🔴 ball", ["red", "🔴", "ball"]),
        ("東京タワーat night", [*"東京タワー", "at", "night"]),
        ("... --- !", []),
    ],
)
def test_split_words(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


def test_normalise_gives_one_spelling() -> None:
    assert normalise_word("ＲＥＤ") == normalise_word("Red") == "red"
    assert normalise_word("cafe\u0301") == normalise_word("CAFÉ")


def test_hash_vector_is_fixed_for_ever() -> None:
    """A bundle names no weights for this encoder, so these numbers may never change."""
    assert hash_vector("word red", 3).tolist() == pytest.approx(
        [0.4842981994152069, -0.594772219657898, 0.1194605901837349], abs=0
    )
    assert hash_vector("word red", 3).dtype == np.float32


def test_hash_vectors_have_unit_variance_and_are_unrelated() -> None:
    vectors = np.stack([hash_vector(str(i), 512) for i in range(64)])
    assert vectors.std() == pytest.approx(1.0, abs=0.02)
    cosines = vectors @ vectors.T / 512
    assert np.abs(cosines - np.diag(np.diag(cosines))).max() < 0.25


def test_word_vectors_are_near_only_when_spelled_alike() -> None:
    def cosine(a: str, b: str) -> float:
        u, v = word_vector(a, 4096), word_vector(b, 4096)
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    assert cosine("circle", "circles") > 0.1
    assert abs(cosine("red", "blue")) < 0.06


def test_words_encoding_is_deterministic_masked_and_unit_variance() -> None:
    encoder = build_text_encoder(TextConfig(dim=256, max_tokens=12))
    text, mask = encoder.encode([CAPTION, "red", ""])
    assert text.shape == (3, 12, 256) and text.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [8, 1, 0]
    assert text[~mask].abs().max() == 0
    inner = text[0, 3:5]  # places with three words on either side; nearer the ends some neighbours are missing
    assert inner.var().item() == pytest.approx(1.0, abs=0.15)
    again, _ = WordEncoder(TextConfig(dim=256, max_tokens=12)).encode(["red", CAPTION])
    assert torch.equal(again[1], text[0]) and torch.equal(again[0], text[1])


def test_words_encoding_depends_on_position_case_and_script() -> None:
    encoder = WordEncoder(TextConfig(dim=64, max_tokens=8))
    text, mask = encoder.encode(["red blue", "blue red", "RED  Blue.", "蓝天白云", "白云蓝天"])
    assert not torch.allclose(text[0], text[1])
    assert torch.equal(text[0], text[2])
    assert mask[3].sum() == 4 and not torch.allclose(text[3], text[4])


def test_a_token_depends_on_the_words_within_three_places_and_their_order() -> None:
    def circle(caption: str) -> np.ndarray:
        listed = caption.split()
        return token_vectors(listed, 64)[listed.index("circle")]

    assert not np.allclose(circle("red circle blue square"), circle("blue circle red square"))
    assert not np.allclose(circle("large red circle"), circle("red large circle"))
    np.testing.assert_array_equal(circle("a b c d circle e f g h"), circle("z b c d circle e f g z"))


def test_words_encoder_says_that_it_knows_no_meaning(caplog) -> None:
    with caplog.at_level("INFO"):
        encoder = build_text_encoder(TextConfig())
    assert "knows no meaning" in encoder.name and "knows no meaning" in caplog.text


def test_very_long_captions_are_cut_before_they_are_split(monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(text_encoder, "split_words", lambda text: seen.append(len(text)) or words.split_words(text))
    encoder = WordEncoder(TextConfig(dim=8, max_tokens=4))
    _, mask = encoder.encode(["x" * 100_000, "word " * 20_000])
    assert max(seen) <= 4 * text_encoder.CHARACTERS_PER_TOKEN
    assert mask.sum(dim=1).tolist() == [1, 4]


def test_cache_is_bounded_and_changes_nothing() -> None:
    encoder = WordEncoder(TextConfig(dim=16, max_tokens=4))
    captions = [f"number {i}" for i in range(20)]
    first, _ = encoder.encode(captions)
    row_bytes = 2 * 16 * 4
    assert encoder._cache.size == 20 * row_bytes
    encoder._cache.room = 5 * row_bytes
    encoder.encode(["one more"])
    assert encoder._cache.size <= 5 * row_bytes and len(encoder._cache) == 5
    assert torch.equal(encoder.encode(captions)[0], first)


def test_cached_captions_are_not_encoded_again(monkeypatch) -> None:
    encoder = WordEncoder(TextConfig(dim=16, max_tokens=4))
    encoder.encode(["red", "red", "blue"])
    monkeypatch.setattr(encoder, "_encode", lambda captions: pytest.fail(f"encoded again: {captions}"))
    encoder.encode(["blue", "red "])


def test_words_lists_token_places() -> None:
    encoder = WordEncoder(TextConfig(dim=8, max_tokens=3))
    assert encoder.words("a red, circle here") == [("a", [0]), ("red", [1]), ("circle", [2])]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_t5_loads_frozen_from_disk(t5_path: str, dtype: str) -> None:
    encoder = build_text_encoder(t5_config(t5_path, dtype=dtype))
    assert isinstance(encoder, T5Encoder) and encoder.dim == 16
    assert not any(p.requires_grad or encoder._model.training for p in encoder._model.parameters())
    assert next(encoder._model.parameters()).dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    text, mask = encoder.encode([CAPTION, "red circle", ""])
    assert text.shape == (3, 24, 16) and text.dtype == torch.float32 and not text.requires_grad
    assert mask[1].sum() == 3  # two pieces and </s>
    assert mask[2].sum() == 0 and text[~mask].abs().max() == 0


def test_t5_pads_change_nothing(t5_path: str) -> None:
    alone, _ = T5Encoder(t5_config(t5_path)).encode(["red circle"])
    beside, _ = T5Encoder(t5_config(t5_path)).encode([CAPTION, "red circle"])
    assert torch.allclose(alone[0], beside[1], atol=1e-5)


def test_t5_equals_transformers_itself(t5_path: str) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    ids = AutoTokenizer.from_pretrained(t5_path)(CAPTION, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(t5_path)(ids).last_hidden_state[0]
    text, mask = T5Encoder(t5_config(t5_path, max_tokens=64)).encode([CAPTION])
    assert torch.allclose(text[0, mask[0]], expected, atol=1e-5)


def test_t5_words_lists_token_places(t5_path: str) -> None:
    assert T5Encoder(t5_config(t5_path)).words("red zq circle") == [("red", [0]), ("zq", [1, 2, 3]), ("circle", [4])]


def test_byt5_takes_chinese(byt5_path: str) -> None:
    encoder = T5Encoder(t5_config(byt5_path, max_tokens=30))
    text, mask = encoder.encode(["蓝天白云下的沙滩", "沙滩"])
    assert mask.sum(dim=1).tolist() == [25, 7]  # three bytes per character and </s>
    assert torch.isfinite(text).all() and text[0].abs().sum() > 0
    assert encoder.words("蓝天 at") == [("蓝", [0, 1, 2]), ("天", [3, 4, 5]), ("at", [7, 8])]


def test_mt5_takes_chinese(tmp_path: Path) -> None:
    encoder = T5Encoder(t5_config(tiny_t5(tmp_path / "mt5", multilingual=True)))
    assert "(mt5, 16 wide" in encoder.name
    text, mask = encoder.encode(["蓝天白云下的沙滩"])
    assert torch.isfinite(text).all() and text[mask].abs().sum() > 0
    assert mask.sum() in (6, 7)  # five pieces and </s>, perhaps the mark of a word's begin
    words = encoder.words("蓝天白云下的沙滩")
    assert [word for word, _ in words] == ["蓝天", "白云", "下", "的", "沙滩"], "characters of one piece are one word"
    places = [place for _, some in words for place in some]
    assert places == sorted(set(places)) and not encoder.is_cut("蓝天") and encoder.is_cut("蓝天白云" * 40)


def test_t5_width_must_match(t5_path: str) -> None:
    with pytest.raises(ConfigError, match=r"text\.dim=384: .* outputs 16; set text\.dim=16"):
        T5Encoder(t5_config(t5_path, dim=384))


def test_a_missing_t5_is_reported_in_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text\.path=.*hf download google/t5-v1_1-xxl --local-dir") as local:
        T5Encoder(t5_config(str(tmp_path / "absent")))
    with pytest.raises(UserError, match="hf download google/byt5-small") as hub:
        T5Encoder(t5_config("google/byt5-small"))
    assert "\n" not in str(local.value) and "\n" not in str(hub.value)


def test_incomplete_t5_is_refused(tmp_path: Path) -> None:
    """transformers would fill missing weights with random numbers."""
    with pytest.raises(DataError, match="weights are missing"):
        T5Encoder(t5_config(tiny_t5(tmp_path / "lacking", drop="encoder.block.0.layer.0.SelfAttention.q")))
    no_weights = tiny_t5(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="weights are missing"):
        T5Encoder(t5_config(no_weights))
    no_tokenizer = tiny_t5(tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    with pytest.raises(DataError, match="tokenizer"):
        T5Encoder(t5_config(no_tokenizer))


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 16}))
    with pytest.raises(ConfigError, match="a bert model"):
        T5Encoder(t5_config(str(tmp_path)))
