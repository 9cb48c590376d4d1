from __future__ import annotations

import math

import pytest

from training.config.experiment import OptimizerConfig
from training.optim.registry import learning_rate


def rates(total: int = 100, **settings: object) -> list[float]:
    config = OptimizerConfig(**{"lr": 1.0, "warmup_steps": 10, "decay_from": 0.5, **settings})  # type: ignore[arg-type]
    return [learning_rate(step, config, total) for step in range(total + 5)]


def test_warm_up_plateau_and_linear_tail() -> None:
    found = rates(decay="linear")
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:51] == [1.0] * 41
    assert found[75] == pytest.approx(0.5) and found[100:] == [0.0] * 5


def test_cosine_tail() -> None:
    found = rates(decay="cosine")
    assert found[75] == pytest.approx(0.5) and found[60] == pytest.approx(0.5 * (1 + math.cos(0.2 * math.pi)))


def test_constant_and_no_warm_up() -> None:
    assert rates(decay="constant", warmup_steps=0) == [1.0] * 105


def test_a_run_of_one_step() -> None:
    assert rates(total=1, decay="linear", warmup_steps=0)[0] == 1.0
