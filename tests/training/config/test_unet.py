"""The sizes that the presets claim, and the refusals of structures that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.config.diffusion import DiffusionConfig
from training.config.experiment import ModelConfig, StageConfig
from training.config.unet import PRESETS, for_stage, resolve
from training.model.unet import UNet

SIZES = {"base64": 2e9, "sr256": 600e6, "sr1024": 400e6, "base64_400m": 400e6}
SIZES |= {"base64_100m": 100e6, "sr256_100m": 100e6}


def parameters(preset: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(PRESETS[preset]).parameters())


@pytest.mark.parametrize("preset", ["base64", "sr256", "sr1024"])
def test_the_papers_three_are_within_five_percent_of_its_sizes(preset: str) -> None:
    assert parameters(preset) == pytest.approx(SIZES[preset], rel=0.05)


@pytest.mark.parametrize("preset", ["base64_400m", "base64_100m", "sr256_100m"])
def test_mid_size_presets_have_the_sizes_in_their_names(preset: str) -> None:
    assert parameters(preset) == pytest.approx(SIZES[preset], rel=0.1)


def test_the_papers_structure() -> None:
    base, sr256, sr1024 = (PRESETS[name] for name in ("base64", "sr256", "sr1024"))
    assert base.widths == (512, 1024, 1536, 2048) and base.blocks == (3, 3, 3, 3)
    assert base.self_attention == (False, True, True, True)  # 32, 16 and 8 of 64 pixels
    assert sr256.widths == sr1024.widths == (128, 256, 512, 1024) and sr256.blocks == (2, 4, 8, 8)
    assert sr256.efficient and sr1024.efficient and sr256.low_res and sr1024.low_res
    assert not any(sr1024.self_attention) and any(sr1024.cross_attention)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nonsense": 1}, "stage.model.overrides.nonsense"),
    ({"blocks": [2]}, "stage.model.overrides.blocks"),
    ({"self_attention": [True]}, "stage.model.overrides.self_attention"),
    ({"head_dim": 48}, "stage.model.overrides.head_dim=48"),
    ({"text_pool_heads": 7}, "stage.model.overrides.text_pool_heads=7"),
    ({"widths": [64, 0]}, "stage.model.overrides.widths"),
    ({"null_text": "maybe"}, "null_text=maybe"),
    ({"patch": 0}, "stage.model.overrides.patch=0"),
    ({"widths": 64}, "stage.model.overrides.widths=64: it must be a list, for each level a whole number"),
    ({"widths": [64, "a"]}, "stage.model.overrides.widths=.*a whole number"),
    ({"blocks": [2, 1.5]}, "stage.model.overrides.blocks=.*a whole number"),
    ({"head_dim": "a"}, "stage.model.overrides.head_dim=a: it must be a whole number"),
    ({"efficient": "maybe"}, "stage.model.overrides.efficient=maybe: it must be true or false"),
    ({"dropout": 2}, "stage.model.overrides.dropout=2"),
    ({"ff_mult": -1}, "stage.model.overrides.ff_mult=-1"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_impossible_structures_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("demo_base", overrides)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"stage.model.preset=huge.*base64"):
        resolve("huge", {})


def test_a_stage_decides_what_it_must_know() -> None:
    stage = StageConfig(
        name="sr", image_size=64, low_res_size=16, model=ModelConfig("tiny_sr"),
        diffusion=DiffusionConfig(null_text="learned"),
    )  # fmt: skip
    config = for_stage(stage, 48)
    assert config.text_dim == 48 and config.low_res and config.null_text == "learned"


def test_a_picture_size_that_does_not_halve_often_enough_is_refused() -> None:
    stage = StageConfig(name="base", image_size=36, model=ModelConfig("base64"))
    with pytest.raises(ValueError, match=r"stage.image_size=36: it must be a multiple of 8"):
        for_stage(stage, 384)
    crop = StageConfig(name="sr", image_size=256, low_res_size=64, crop_size=100, model=ModelConfig("sr256"))
    with pytest.raises(ValueError, match=r"stage.crop_size=100"):
        for_stage(crop, 384)
