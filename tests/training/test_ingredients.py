"""Ingredients that change the network or its data: resumed, on two processes, in a bundle, and with older
checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.common.errors import ConfigError
from tests.training import forks
from tests.training.evaluation.extractors.tiny_weights import dinov2_folder
from tests.training.runs import curve, experiment, newest, same_tensors
from training.cascade.cascade import Cascade
from training.cli.compose import load_config
from training.commands import checkpoints
from training.config.commands import PlanCommand
from training.config.experiment import Experiment
from training.config.plain import from_plain
from training.plan.checks import training_problems
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
    config = experiment(directory, shards, **changes, train__steps=2)
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
    again = resumed(tmp_path / "again", shards, 1, **SIZES, zero__stage=2, optimizer__decay="constant")
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
    plan, without = planned(whole), planned(plain)
    assert plan["parameters"] - without["parameters"] == 6 * 256 * 32 + 32 + 32 * 32 + 32
    assert plan["flops_per_image"] > without["flops_per_image"]


def test_size_condition_cannot_be_switched_during_a_run(tmp_path: Path, shards: str) -> None:
    before, now = (to_dict(experiment(tmp_path, shards, **changes)) for changes in ({}, SIZES))
    with pytest.raises(ConfigError, match=r"stage.diffusion.size_condition=true: RUN was made with .*=false"):
        check_same_run(before, now, "RUN")
    del before["stage"]["diffusion"]["size_condition"]  # a run of an earlier version
    with pytest.raises(ConfigError, match=r"stage.diffusion.size_condition=true: RUN was made with .*=false"):
        check_same_run(before, now, "RUN")
    assert not check_same_run(before, to_dict(experiment(tmp_path, shards)), "RUN")


def test_original_side_is_only_for_stages_with_size_condition(tmp_path: Path) -> None:
    from tests.training.tiny import tiny_cascade

    with pytest.raises(ConfigError, match="original_side: no stage drawn was trained with"):
        tiny_cascade().draw("a red circle", original_side=512)


@pytest.fixture(scope="module")
def repa(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The loss ends during the run, after the second of four steps."""
    folder = tmp_path_factory.mktemp("a dino")
    dinov2_folder(folder)
    settings = {"dino__path": str(folder), "dino__side": 28, "repa__weight": 0.5, "repa__until": 2, "repa__width": 16}
    return {**settings, "optimizer__decay": "constant"}


def test_repa(tmp_path: Path, shards: str, repa: dict[str, Any]) -> None:
    whole = train(experiment(tmp_path / "one", shards, **repa, train__steps=4, zero__stage=0))
    again = resumed(tmp_path / "again", shards, 1, **repa, zero__stage=0)
    assert same_tensors(newest(whole), newest(again)), "a stop at its end changes no bit"
    for stage in (1, 2, 3):
        run = train(experiment(tmp_path / f"zero {stage}", shards, **repa, train__steps=4, zero__stage=stage), 2)
        assert close(whole, run), f"ZeRO {stage} on two processes"
    plain = train(experiment(tmp_path / "plain", shards, train__steps=4, zero__stage=0, optimizer__decay="constant"))
    more = [mine[2] - other[2] for mine, other in zip(curve(whole), curve(plain), strict=True)]
    assert 0.2 < more[0] < 0.8, "0.5 (1 - cosine) at the start"
    assert abs(more[2]) < 0.1 and abs(more[3]) < 0.1, "afterwards the diffusion loss alone"

    cascade = Cascade.from_runs([whole.run.dir])
    assert not [name for name in cascade.stages[0].unet.state_dict() if name.startswith("alignment.")]
    cascade.save(str(tmp_path / "bundle"))
    loaded, other = Cascade.from_pretrained(str(tmp_path / "bundle")), Cascade.from_runs([plain.run.dir])
    assert loaded.stages[0].unet.state_dict().keys() == other.stages[0].unet.state_dict().keys()
    export = load_config(
        "checkpoints", [f"run.dir={whole.run.dir}", "action=export", f"output={tmp_path}/w.safetensors"]
    )
    checkpoints.main(export)
    loaded.stages[0].unet.load_state_dict(load_file(tmp_path / "w.safetensors"))
    after = experiment(tmp_path / "after", shards, **repa, train__steps=1, train__init_from=whole.run.dir)
    assert "starting from the weights of" in forks_text(after), (
        "a bundle's weights begin another run with a new small network"
    )


def forks_text(config: Experiment) -> str:
    Path(config.run.dir).parent.mkdir(exist_ok=True)
    running = forks.start(config)
    assert running.codes() == [0], running.text
    return running.text


def test_repa_is_planned_and_cannot_be_switched_during_a_run(tmp_path: Path, shards: str, repa: dict[str, Any]) -> None:
    config, plain = experiment(tmp_path, shards, **repa), experiment(tmp_path, shards)
    plan, without = planned(config), planned(plain)
    assert plan["ok"] and plan["parameters"] - without["parameters"] == 32 * 16 + 16 + 16 * 16 + 16 + 16 * 32 + 32
    features = plan["picture_encoder"]
    assert features["parameters"] == plan["memory"]["picture_encoder"] / 4 > 10_000
    assert features["flops_per_image"] > 0 and plan["gpu_hours"] > without["gpu_hours"]
    config.repa.until = config.train.steps
    assert planned(config)["picture_encoder"]["flops_per_image"] > 2 * features["flops_per_image"], "2 of 10 steps"
    for key, value in {"repa__weight": 0.0, "repa__until": 3, "repa__width": 8, "dino__side": 56}.items():
        now = to_dict(experiment(tmp_path, shards, **{**repa, key: value}))
        with pytest.raises(ConfigError, match=rf"{key.replace('__', '.')}=.*: RUN was made with"):
            check_same_run(to_dict(experiment(tmp_path, shards, **repa)), now, "RUN")
    unused = experiment(tmp_path, shards, **{**repa, "repa__weight": 0.0})
    assert "no loss uses this encoder" in planned(unused)["remarks"][0] and planned(unused)["ok"]
    config.dino.path = str(tmp_path)
    assert any("it has no readable config.json" in problem for problem in planned(config)["problems"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dino__path": None}, "repa.weight=0.5: it needs a frozen encoder; set dino.path"),
        ({"repa__until": 0}, "set repa.until"),
        ({"lora__rank": 4}, "it cannot be combined with adapters"),
    ],
)
def test_impossible_combinations_are_refused(
    tmp_path: Path, shards: str, repa: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    problems = training_problems(experiment(tmp_path, shards, **{**repa, **change}), 1)
    assert len(problems) == 1 and sentence in problems[0]


def test_perceptual(tmp_path: Path, shards: str, repa: dict[str, Any]) -> None:
    """Both losses by the one encoder; the perceptual one goes on after the other has ended."""
    both = {**repa, "perceptual__weight": 0.5}
    whole = train(experiment(tmp_path / "one", shards, **both, train__steps=4, zero__stage=0))
    again = resumed(tmp_path / "again", shards, 1, **both, zero__stage=0)
    assert same_tensors(newest(whole), newest(again))
    assert close(whole, train(experiment(tmp_path / "three", shards, **both, train__steps=4, zero__stage=3), 2))
    plan = planned(whole)
    alone = experiment(tmp_path, shards, **{**both, "repa__weight": 0.0}, train__steps=4)
    without = planned(alone)
    assert plan["picture_encoder"]["flops_per_image"] > without["picture_encoder"]["flops_per_image"] > 0
    assert without["parameters"] < plan["parameters"]
    assert without["memory"]["activations"] > planned(experiment(tmp_path, shards))["memory"]["activations"]
    now = to_dict(experiment(tmp_path, shards, **{**both, "perceptual__log_snr_above": 0.0}))
    with pytest.raises(ConfigError, match=r"perceptual.log_snr_above=0.0: RUN was made with"):
        check_same_run(to_dict(whole), {**now, "repa": to_dict(whole)["repa"]}, "RUN")
