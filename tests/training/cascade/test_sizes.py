"""Pictures of shapes other than those of training: every part of the network accepts any height and width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.common.errors import ConfigError
from tests.training.tiny import tiny_cascade
from training.cascade.cascade import Cascade
from training.cascade.requests import plan_sizes
from training.commands.sample import main
from training.config.commands import SampleCommand
from training.config.experiment import StageConfig
from training.model.layers import Attention


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return tiny_cascade()


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def test_a_size_is_drawn_by_every_stage_and_the_trained_one_is_as_without(cascade: Cascade) -> None:
    (drawing,) = cascade.draw("a red circle", size=(48, 32), explain=True)
    assert [drawing.stages[name].size for name in ("base", "sr")] == [(24, 16), (48, 32)]
    assert len(drawing.words["base"]) == 3
    height, width = drawing.words["base"][0][1].shape
    assert width * 2 == height * 3, "heat maps have the picture's shape"
    assert cascade.generate("a red circle", size=64)[0].size == (64, 64)
    assert pixels(cascade.generate("red", size=(32, 32))[0]) == pixels(cascade.generate("red")[0])
    assert pixels(cascade.generate("red", size=(48, 32))[0]) == pixels(cascade.generate(["a", "red"], size=(48, 32))[1])


def test_super_resolution_img2img_and_masks_take_any_shape(cascade: Cascade) -> None:
    wide = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    assert cascade.generate("red", stages="sr", low_res=wide, size=(48, 32))[0].size == (48, 32)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 32, 64))
    kept = cascade.generate("red", image=wide, mask=mask, size=(48, 32))[0]
    expected = wide.resize((48, 32), Image.Resampling.BICUBIC)
    pairs = [(kept.getpixel((x, 9)), expected.getpixel((x, 9))) for x in range(17, 48)]
    apart = [abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)]
    assert max(apart) <= 1, "the dark part is kept"
    assert cascade.generate("red", stages=1, size=(16, 40))[0].size == (16, 40)


@pytest.mark.parametrize(
    "size, message",
    [
        ((50, 32), r"size=\[50, 32\]: with stages of 16, 32 px each side must be a multiple of 8; .*size=\[48,32\]"),
        ((3, 500), r"the nearest is size=\[8,496\]|the nearest is size=\[8,504\]"),
        ((32,), r"give the width and height"),
        ("big", r"give the width and height"),
        ((32.5, 32), r"give the width and height"),
        (0, r"give the width and height"),
    ],
)
def test_a_size_that_a_stage_cannot_draw_is_refused(cascade: Cascade, size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cascade.generate("red", size=size)


def test_sizes_of_the_stages_of_a_large_cascade() -> None:
    stages = [StageConfig(name=str(n), image_size=n, low_res_size=low) for n, low in ((64, 0), (256, 64), (1024, 256))]
    assert plan_sizes((1536, 640), stages, [8, 16, 16]) == [(96, 40), (384, 160), (1536, 640)]
    with pytest.raises(ConfigError, match="a multiple of 128"):
        plan_sizes((1536, 600), stages, [8, 16, 16])


def test_attention_has_no_positions_so_any_number_of_pixels_works() -> None:
    torch.manual_seed(0)
    layer = Attention(16, 8, 8)
    torch.nn.init.normal_(layer.out.weight)
    picture, text, mask = torch.randn(1, 16, 4, 6), torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)
    turned = torch.randperm(24)
    moved = picture.flatten(2)[..., turned].unflatten(2, (4, 6))
    expected = layer(picture, text, mask).flatten(2)[..., turned].unflatten(2, (4, 6))
    assert torch.allclose(layer(moved, text, mask), expected, atol=1e-5)


def test_text_gets_less_of_the_attention_on_a_larger_picture() -> None:
    """Text and pixels share one softmax: this is what docs/model.md says about sizes far from those of training."""
    layer = Attention(16, 8, 8)
    torch.nn.init.zeros_(layer.query.weight)
    torch.nn.init.zeros_(layer.query.bias)
    for side, share in ((4, 3 / 19), (8, 3 / 67)):
        layer.maps = []
        layer(torch.randn(1, 16, side, side), torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        assert layer.maps[0].sum(dim=1).mean().item() == pytest.approx(share, rel=1e-4)


def test_the_command_draws_a_size_and_keeps_pictures_that_have_it(cascade: Cascade, tmp_path: Path) -> None:
    cascade.save(str(tmp_path / "bundle"))
    config = SampleCommand(from_bundle=str(tmp_path / "bundle"), output=str(tmp_path / "out"), prompts=["red"])
    config.size, config.cluster.gpus = [48, 32], False
    first = main(config)
    with Image.open(tmp_path / "out" / first["images"][0]["file"]) as image:
        assert image.size == (48, 32) and json.loads(image.info["settings"])["size"] == [48, 32]
    assert main(config)["kept"] == 1
    config.size = None
    again = main(config)
    with Image.open(tmp_path / "out" / again["images"][0]["file"]) as image:
        assert again["drawn"] == 1 and image.size == (32, 32) and "size" not in json.loads(image.info["settings"])
