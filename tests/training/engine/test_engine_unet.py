"""The real U-Net under ZeRO: options that save memory or time change no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.training.ranks import run_ranks
from training.config.experiment import Experiment
from training.config.unet import UNetConfig, for_stage
from training.engine.start import build_engine
from training.model.unet import UNet
from training.processes.collectives import all_sum
from training.processes.ranks import Ranks

BATCH, STEPS = 4, 2
WAYS = {"plain": 1, "channels_last": 1, "compiled": 3, "checkpointed": 3}
"""Maps each option to the ZeRO stage at which it is tried, with two processes."""


def train(way: str, stage: int, ranks: Ranks) -> dict[str, Any]:
    config = Experiment()
    config.stage.model.preset, config.text.dim, config.data.global_batch = "tiny_base", 32, BATCH
    config.zero.stage, config.precision.channels_last = stage, way == "channels_last"
    if way == "checkpointed":
        config.stage.model.overrides = {"checkpoint_blocks": True}
    unet: UNetConfig = for_stage(config.stage, config.text.dim)
    torch.manual_seed(0)
    model = UNet(unet)
    with torch.no_grad():  # the last layer of each block begins at zero: nothing would depend on what is before it
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if way == "compiled":
        model.compile_blocks(backend="eager")
    with mock.patch("torch._tensor_str._str", side_effect=AssertionError("a parameter's values are put into words")):
        engine: Any = build_engine(model, config, ranks)
    layouts = []
    model.conv_out.register_forward_hook(
        lambda _, inputs, __: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, level = torch.randn(BATCH, 3, 16, 16, generator=generator), torch.randn(BATCH, generator=generator)
        text, mask = torch.randn(BATCH, 6, 32, generator=generator), torch.ones(BATCH, 6, dtype=torch.bool)
        mine = [part.chunk(ranks.world_size)[ranks.rank] for part in (x, level, text, mask)]
        loss = (engine(*mine) - mine[0].flip(2)).square().mean()
        engine.backward(loss)
        engine.step(step)
        losses.append(all_sum([loss.item()], ranks)[0] / ranks.world_size)
    return {"losses": [*losses, engine.norm()], "channels_last": all(layouts)}


def two_ranks(ranks: Ranks) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {way: train(way, stage, ranks) for way, stage in WAYS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = run_ranks(two_ranks, 2, Path(tmp_path_factory.mktemp("unet")))
    assert first == second
    return first


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_the_same_numbers(found: dict[str, Any], way: str) -> None:
    assert found[way]["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-5)


def test_pictures_stay_channels_last(found: dict[str, Any]) -> None:
    """Throughout the network, although ZeRO stores the weights flat."""
    assert found["channels_last"]["channels_last"] and not found["plain"]["channels_last"]
