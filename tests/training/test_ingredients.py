"""Ingredients that change the network or its data: resumed, on two processes, in a bundle, and old checkpoints beside
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from tests.training import forks
from tests.training.runs import curve, experiment, newest, same_tensors
from training.cascade.cascade import Cascade
from training.config.commands import PlanCommand
from training.config.experiment import Experiment
from training.config.plain import from_plain
from training.plan.plan import make_plan
from training.run.directory import check_same_run, to_dict

SIZES: dict[str, Any] = {"stage__diffusion__size_condition": True, "data__crop": "random"}


def train(config: Experiment, ranks: int = 1) -> Experiment:
    Path(config.run.dir).parent.mkdir(exist_ok=True)
    running = forks.start(config, ranks)
    assert running.codes() == [0] * ranks, running.text
    return config


def resumed(directory: Path, shards: str, ranks: int, **changes: Any) -> Experiment:
    """Four steps, a stop at the second."""
    config = experiment(directory, shards, **changes, train__steps=2, optimizer__decay="constant")
    train(config, ranks)
    config.train.steps = 4
    return train(config, ranks)


def close(one: Experiment, other: Experiment) -> bool:
    pairs = zip(curve(one), curve(other), strict=True)
    return all(a[:2] == b[:2] and a[2:] == pytest.approx(b[2:], rel=1e-4) for a, b in pairs)


def planned(config: Experiment) -> dict[str, Any]:
    return make_plan(from_plain(PlanCommand, {**to_dict(config), "gpu": "h100"}))


def test_size_condition(tmp_path: Path, shards: str) -> None:
    common = {**SIZES, "train__steps": 4, "optimizer__decay": "constant"}
    whole = train(experiment(tmp_path, shards, **common, zero__stage=2, train__sample_every=4))
    again = resumed(tmp_path / "again", shards, 1, **SIZES, zero__stage=2)
    assert same_tensors(newest(whole), newest(again)), "a stop changes no bit"
    three = train(experiment(tmp_path / "three", shards, **common, zero__stage=3), 2)
    assert close(whole, three)
    learned = newest(whole).read("param/sizes.mlp.2.weight")
    assert learned.any(), "the layer has learned from the sizes"

    cascade = Cascade.from_runs([whole.run.dir])
    cascade.save(str(tmp_path / "a bundle"))
    loaded = Cascade.from_pretrained(str(tmp_path / "a bundle"))
    loaded.stages[0].unet.sizes.mlp[2].weight.copy_(100 * torch.randn_like(learned))  # type: ignore[union-attr]
    draw = lambda **given: loaded.generate("a red circle", steps=2, **given)[0].tobytes()  # noqa: E731
    assert draw() == draw(original_side=1024) != draw(original_side=64)
    plain = experiment(tmp_path, shards)
    assert planned(whole)["parameters"] - planned(plain)["parameters"] == 6 * 256 * 32 + 32 + 32 * 32 + 32
    assert planned(whole)["flops_per_image"] > planned(plain)["flops_per_image"]


def test_size_condition_is_not_switched_in_a_run(tmp_path: Path, shards: str) -> None:
    before, now = (to_dict(experiment(tmp_path, shards, **changes)) for changes in ({}, SIZES))
    with pytest.raises(ConfigError, match=r"stage.diffusion.size_condition=true: RUN was made with .*=false"):
        check_same_run(before, now, "RUN")
    del before["stage"]["diffusion"]["size_condition"]  # a run of an earlier version
    with pytest.raises(ConfigError, match=r"stage.diffusion.size_condition=true: RUN was made with .*=false"):
        check_same_run(before, now, "RUN")
    assert not check_same_run(before, to_dict(experiment(tmp_path, shards)), "RUN")


def test_original_side_belongs_to_stages_that_are_told(tmp_path: Path) -> None:
    from tests.training.tiny import tiny_cascade

    with pytest.raises(ConfigError, match="original_side: no stage that is drawn was trained with"):
        tiny_cascade().draw("a red circle", original_side=512)
