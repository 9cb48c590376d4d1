"""The plan's numbers against sums done by hand, and the doctor on real shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import prepare
from data_pipeline.errors import ConfigError, UserError
from training.commands import PlanCommand
from training.plan import main, make_plan


def plan_config(**changes: Any) -> PlanCommand:
    config = PlanCommand()
    config.stage.model.preset = "tiny_base"
    config.text.dim, config.text.max_tokens = 32, 12
    config.data.global_batch = 64
    config.cluster = replace(config.cluster, kind="slurm", nodes=1, processes=4)
    config.train.steps = 100
    for key, value in changes.items():
        *path, name = key.split("__")
        section: Any = config
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
    return config


def test_state_is_what_zero_says_it_is() -> None:
    first, third = make_plan(plan_config(zero__stage=1)), make_plan(plan_config(zero__stage=3))
    n = first["parameters"]
    share = -(-n // 4)
    assert first["memory"]["weights"] == 4 * n
    assert third["memory"]["weights"] == 4 * share
    assert first["memory"]["moments"] == 8 * share
    assert first["memory"]["averages"] == 4 * share
    assert first["checkpoint_bytes"] == 16 * n
    assert first["memory"]["total"] == sum(
        value for part, value in first["memory"].items() if part not in ("total", "host", "moment")
    )


def test_activations_grow_with_the_micro_batch_and_bound_it() -> None:
    small, large = (make_plan(plan_config(data__micro_batch=size))["memory"]["activations"] for size in (4, 16))
    assert 3 < large / small < 4.5
    roomy = make_plan(plan_config())
    assert roomy["fits"]
    assert roomy["largest_micro_batch"] >= 16


def test_time_and_cost_follow_from_flops_and_the_stated_peak() -> None:
    plan = make_plan(plan_config(gpu="a100", mfu=0.5, price=3.0))
    per_second = 0.5 * 312e12 * 4 / plan["flops_per_image"]
    assert plan["images"] == 6400
    assert plan["images_per_second"] == pytest.approx(per_second)
    assert plan["cost"] == pytest.approx(6400 / per_second / 3600 * 4 * 3.0)


@pytest.mark.parametrize("wrong", [{"gpu": "abacus"}, {"mfu": 0.0}, {"mfu": 1.5}])
def test_impossible_assumptions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_plan(plan_config(**wrong))


def test_the_doctor_tries_the_real_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = plan_config(doctor=True, run__dir=str(tmp_path / "run"), data__global_batch=4)
    config.prepare.output = str(tmp_path)
    config.prepare.draw = replace(config.prepare.draw, count=8, heldout=2, size=32, samples_per_shard=8)
    prepare.main(config)
    config.data.shards = str(tmp_path / "train")
    found = main(config)["doctor"]
    assert all(said.startswith("ok") for said in found.values())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []

    config.data.shards = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="shards"):
        main(config)
    assert "nowhere" in capsys.readouterr().out
