"""Encoders other than T5 as people have them on disk: tiny random models of each architecture, loaded in the real
way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.text.tiny_models import NAMES, tiny_model
from tests.training.text.tiny_t5 import tiny_t5
from training.config.experiment import TextConfig
from training.text.cost import text_cost
from training.text.encoder import ModelEncoder, PairEncoder, build_text_encoder
from training.text.identity import identity, pinned

CAPTION = "a red circle on white"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("some models")
    return {name: tiny_model(name, folder / name) for name in NAMES}


def config(path: str, kind: str = "hidden", **settings: Any) -> TextConfig:
    return TextConfig(**{"kind": kind, "path": path, "dim": 16, "max_tokens": 12} | settings)


def kind_of(name: str) -> str:
    return "clip" if name == "clip" else "hidden"


@pytest.mark.parametrize("name", NAMES)
def test_each_architecture_encodes_masked_frozen_and_by_layer(models: dict[str, str], name: str) -> None:
    encoder = build_text_encoder(config(models[name], kind_of(name)))
    text, mask = encoder.encode([CAPTION, "red circle", ""])
    assert text.shape == (3, 12, 16) and text.dtype == torch.float32 and text.isfinite().all()
    assert mask.sum(dim=1).tolist() == [5, 2, 0] and text[~mask].abs().max() == 0
    alone, _ = build_text_encoder(config(models[name], kind_of(name))).encode(["red circle"])
    assert torch.allclose(alone[0], text[1], atol=1e-5), "padding changes nothing"
    earlier, _ = build_text_encoder(config(models[name], kind_of(name), layer=-2)).encode([CAPTION])
    assert not torch.allclose(earlier[0], text[0], atol=1e-2)
    assert encoder.words("red circle") == [("red", [0]), ("circle", [1])]
    assert isinstance(encoder, ModelEncoder)
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
    assert not [part for part, _ in encoder._model.named_modules() if "vision" in part or "visual" in part]


@pytest.mark.parametrize("name", NAMES)
def test_its_cost_is_counted(models: dict[str, str], name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    settings = config(models[name], kind_of(name))
    encoder = build_text_encoder(settings)
    assert isinstance(encoder, ModelEncoder)
    cost = text_cost(settings)
    assert cost.basis == "counted"
    assert cost.parameters == sum(parameter.numel() for parameter in encoder._model.parameters())
    encoder._model.set_attn_implementation("eager")  # whose products the counter sees
    ids = torch.full((1, 12), 7)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder._model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert cost.flops_per_caption == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_hidden_layers_equal_those_of_transformers(models: dict[str, str]) -> None:
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(models["qwen3"])(CAPTION, return_tensors="pt").input_ids
    with torch.no_grad():
        states = AutoModel.from_pretrained(models["qwen3"])(ids, output_hidden_states=True).hidden_states
    for layer in (-1, -2, -4):
        text, mask = build_text_encoder(config(models["qwen3"], layer=layer)).encode([CAPTION])
        assert torch.allclose(text[0, mask[0]], states[layer][0], atol=1e-5)
    with pytest.raises(ConfigError, match=r"text.layer=-5: .* has 3 layers: give -4 to -1"):
        build_text_encoder(config(models["qwen3"], layer=-5))


def test_an_instruction_is_encoded_and_its_tokens_are_dropped(models: dict[str, str]) -> None:
    prefix = "describe the picture : "
    encoder = build_text_encoder(config(models["gemma2"], prefix=prefix, max_tokens=6))
    text, mask = encoder.encode([CAPTION, "red"])
    assert mask.sum(dim=1).tolist() == [5, 1]
    whole, whole_mask = build_text_encoder(config(models["gemma2"])).encode([prefix + CAPTION])
    assert torch.allclose(text[0, :5], whole[0, 4:9], atol=1e-5) and whole_mask.sum() == 9
    plain, _ = build_text_encoder(config(models["gemma2"])).encode([CAPTION])
    assert not torch.allclose(text[0, :5], plain[0, :5], atol=1e-2), "it has an effect"
    assert encoder.words("red circle") == [("red", [0]), ("circle", [1])]
    costs = [
        text_cost(config(models["gemma2"], **keys))
        for keys in ({"max_tokens": 6, "prefix": prefix}, {"max_tokens": 10})
    ]
    assert costs[0] == costs[1], "the model reads the instruction's 4 tokens with each caption"
    assert encoder.is_cut("red " * 7) and not encoder.is_cut("red " * 6)


def test_another_layer_or_instruction_is_another_encoder(models: dict[str, str]) -> None:
    shas = {
        pinned(config(models["gemma2"], **settings)).sha
        for settings in ({}, {"layer": -2}, {"prefix": "the "}, {"prefix": "a "}, {"layer": -2, "prefix": "a "})
    }
    assert len(shas) == 5


def test_two_encoders_are_concatenated(models: dict[str, str], tmp_path: Path) -> None:
    t5 = tiny_t5(tmp_path / "t5")
    clip = {"kind": "clip", "path": models["clip"], "dim": 16, "max_tokens": 4, "layer": -2}
    pair = config(t5, "t5", max_tokens=24, also=clip)
    encoder = build_text_encoder(pair)
    assert isinstance(encoder, PairEncoder) and encoder.max_tokens == 24
    text, mask = encoder.encode(["red circle", "a red circle on white", ""])
    first, first_mask = build_text_encoder(config(t5, "t5", max_tokens=20)).encode(["red circle"])
    second, _ = build_text_encoder(TextConfig(**clip)).encode(["red circle"])
    assert mask.sum(dim=1).tolist() == [5, 10, 0] and first_mask.sum() == 3
    assert torch.allclose(text[0, :3], first[0, :3], atol=1e-5)
    assert torch.allclose(text[0, 3:5], second[0, :2], atol=1e-5)
    assert encoder.words("red circle") == [("red", [0, 3]), ("circle", [1, 4])]
    words = config(
        str(models["clip"]), "clip", max_tokens=20, dim=32, also={"kind": "words", "dim": 32, "max_tokens": 8}
    )
    text, mask = build_text_encoder(words).encode(["red circle"])
    assert text.shape == (1, 20, 32) and text[0, :2, 16:].abs().max() == 0 < text[0, 2:4, 16:].abs().max()
    cost = text_cost(pair)
    assert cost.parameters == sum(text_cost(one).parameters for one in pair.encoders()) and cost.basis == "counted"
    other = config(t5, "t5", max_tokens=24, also={**clip, "layer": -1})
    assert identity(pair)["weights"] != identity(other)["weights"]
    with pytest.raises(ConfigError, match=r"text.dim=48: the wider of .* has 16; set text.dim=16"):
        build_text_encoder(config(t5, "t5", max_tokens=24, dim=48, also=clip))
    for also, message in (
        ({"kid": "clip"}, "text.also: unknown key 'kid'; the keys are kind, path"),
        ({**clip, "max_tokens": 24}, "it covers both encoders, so it must be larger than text.also.max_tokens=24"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(t5, "t5", max_tokens=24, also=also)


def pipeline(source: str, home: Path) -> Path:
    """An encoder as pipelines ship it: weights in text_encoder_2, its tokenizer in tokenizer_2."""
    (home / "tokenizer_2").mkdir(parents=True)
    shutil.copytree(source, home / "text_encoder_2")
    for path in [*(home / "text_encoder_2").glob("*token*"), *(home / "text_encoder_2").glob("spiece*")]:
        shutil.move(path, home / "tokenizer_2")
    (home / "model_index.json").write_text("{}")
    return home / "text_encoder_2"


@pytest.fixture
def t5(tmp_path: Path) -> str:
    return tiny_t5(tmp_path / "t5")


def same(path: Path | str, reference: str, **settings: Any) -> None:
    wanted, _ = build_text_encoder(config(reference, "t5")).encode([CAPTION])
    found, _ = build_text_encoder(config(str(path), "t5", **settings)).encode([CAPTION])
    assert torch.equal(found, wanted)


def test_a_pipelines_encoder_finds_its_tokenizer(t5: str, tmp_path: Path) -> None:
    folder = pipeline(t5, tmp_path / "a pipeline")
    same(folder, t5)
    assert identity(config(str(folder), "t5"))["tokenizer"] == identity(config(t5, "t5"))["tokenizer"]
    shutil.move(folder.parent / "tokenizer_2", tmp_path / "words")
    same(folder, t5, tokenizer=str(tmp_path / "words"))
    with pytest.raises(DataError, match=r"tokenizer files are missing.*set text.tokenizer to their folder"):
        build_text_encoder(config(str(folder), "t5"))
    with pytest.raises(DataError, match=r"this is a pipeline; give one of its encoders: .*text_encoder_2"):
        build_text_encoder(config(str(folder.parent), "t5"))


def test_variants_shards_and_encoders_alone(t5: str, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    tensors = load_file(f"{t5}/model.safetensors")
    half = tmp_path / "half"
    shutil.copytree(t5, half)
    (half / "model.safetensors").rename(half / "model.fp16.safetensors")
    same(half, t5)
    alone = tmp_path / "alone"
    shutil.copytree(t5, alone)
    (alone / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(t5).save_pretrained(alone, max_shard_size="4KB")
    assert len(list(alone.glob("model-*.safetensors"))) > 1
    same(alone, t5)
    next(alone.glob("model-00001*")).unlink()
    with pytest.raises(DataError, match=r"index.json lists \d+ weight files, of which model-00001"):
        build_text_encoder(config(str(alone), "t5"))
    odd = tmp_path / "odd"
    shutil.copytree(t5, odd)
    (odd / "model.safetensors").rename(odd / "t5_fp16.safetensors")
    with pytest.raises(DataError, match=r"its weights are called t5_fp16.safetensors; rename the file"):
        build_text_encoder(config(str(odd), "t5"))
    (half / "config.json").unlink()
    with pytest.raises(DataError, match=r"config.json is missing"):
        build_text_encoder(config(str(half), "t5"))
    assert tensors


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("kind", ["umt5", "t5"])
def test_the_token_embedding_is_read_from_the_file_whatever_its_name(
    t5: str, tmp_path: Path, name: str, kind: str
) -> None:
    """Under the last of these names, transformers would leave it at random numbers."""
    folder = tmp_path / "encoder"
    shutil.copytree(t5, folder)
    tensors = {key: value for key, value in load_file(f"{t5}/model.safetensors").items() if "decoder" not in key}
    embedding = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    tensors.pop("lm_head.weight", None)
    settings = json.loads((folder / "config.json").read_text())
    if kind == "umt5":
        settings.update(model_type="umt5", architectures=["UMT5EncoderModel"])
        (folder / "config.json").write_text(json.dumps(settings))
    save_file({**tensors, name: embedding}, folder / "model.safetensors", {"format": "pt"})
    encoder = build_text_encoder(config(str(folder), "t5"))
    assert isinstance(encoder, ModelEncoder)
    assert torch.equal(encoder._model.get_input_embeddings().weight, embedding)
    if kind == "umt5":  # each layer has biases of its own there
        return
    same(folder, t5)


def test_the_embedding_of_every_architecture_is_read_from_the_file(models: dict[str, str]) -> None:
    for name, path in models.items():
        encoder = build_text_encoder(config(path, kind_of(name)))
        assert isinstance(encoder, ModelEncoder)
        own = encoder._model.get_input_embeddings().weight
        stored = [
            tensor
            for key, tensor in load_file(f"{path}/model.safetensors").items()
            if key.endswith(("embed_tokens.weight", "token_embedding.weight")) and "decoder." not in key
        ]
        assert any(torch.equal(own, tensor) for tensor in stored), name


def test_another_kind_of_model_is_named(models: dict[str, str], t5: str) -> None:
    with pytest.raises(
        ConfigError, match=r"it is a gemma2 model, but text.kind=t5 accepts t5, mt5, umt5; set text.kind=hidden"
    ):
        build_text_encoder(config(models["gemma2"], "t5"))
    with pytest.raises(ConfigError, match=r"set text.kind=t5"):
        build_text_encoder(config(t5))
    for settings, message in (
        ({"kind": "t5", "layer": -2}, "text.layer: text.kind=t5 has no layers"),
        ({"kind": "clip", "prefix": "x"}, "text.prefix: text.kind=clip does not use it"),
        ({"kind": "bert"}, "it must be words, t5, hidden or clip"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(t5, **settings)
