"""Learning rates, and that one file and one line of the table add an optimizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from training.config.experiment import Experiment, OptimizerConfig, ZeroConfig
from training.config.optimizers import OPTIMIZERS, OptimizerEntry, options_of
from training.engine.start import build_engine
from training.optim.base import TrainOptimizer
from training.optim.registry import learning_rate, states_to_load
from training.plan.checks import training_problems
from training.plan.memory import Setup, kept
from training.processes.ranks import Ranks


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


class HeavyBall(TrainOptimizer):
    """w -= lr (g + momentum v): what a contributor writes."""

    SLICED = ("velocity",)

    @classmethod
    def build(cls, parameters: Iterable[torch.Tensor], config: OptimizerConfig, fused: bool) -> HeavyBall:
        return cls(parameters, {"lr": config.lr, **options_of(config)})

    def update(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "velocity" not in self.state[p]:
                    self.begin(p)
                self.state[p]["velocity"].mul_(group["momentum"]).add_(p.grad)
                p.sub_(self.state[p]["velocity"], alpha=group["lr"])


@pytest.fixture
def heavy_ball(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    module = ModuleType("training.optim.heavy_ball")
    module.HeavyBall = HeavyBall  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(OPTIMIZERS, "heavy_ball", OptimizerEntry("heavy_ball", "HeavyBall", options={"momentum": 0.9}))
    config = Experiment(optimizer=OptimizerConfig(name="heavy_ball", lr=0.1, warmup_steps=0, clip_norm=0))
    return replace(config, zero=ZeroConfig(stage=0))


def test_one_file_and_one_line_add_an_optimizer(heavy_ball: Experiment) -> None:
    """It trains, is checked, is part of checkpoints and of the memory plan, and no other file knows its name."""
    torch.manual_seed(0)
    engine = build_engine(torch.nn.Linear(3, 2), heavy_ball, Ranks())
    weight = engine.module.weight.detach().clone()  # type: ignore[operator, union-attr]
    x, velocity = torch.randn(4, 3), torch.zeros(2, 3)
    for step in range(2):
        engine.backward(engine.module(x).square().sum())
        velocity = 0.9 * velocity + 2 * (x @ weight.T + engine.module.bias.detach()).T @ x  # type: ignore[operator, union-attr]
        weight -= 0.1 * velocity
        engine.step(step)
    saved = {name: tensor.clone() for name, tensor in engine.export_tensors().items()}
    assert torch.allclose(saved["param/weight"], weight, rtol=1e-5)
    assert torch.allclose(saved["velocity/weight"], velocity, rtol=1e-5)
    meta = {"config": {"ema": {"decays": [0.9999]}}, "updates": 2}
    kinds, _ = states_to_load(
        meta, lambda prefix: [n for n in saved if n.startswith(prefix)], "heavy_ball", heavy_ball.ema
    )
    assert kinds == {"velocity": "velocity", "ema/0": "ema/0"}
    again = build_engine(torch.nn.Linear(3, 2), heavy_ball, Ranks())
    again.import_tensors(saved.__getitem__, kinds, 2)
    restored = again.export_tensors()
    assert restored.keys() == saved.keys() and all(torch.equal(restored[name], saved[name]) for name in saved)
    parts = kept(Setup([(2, 3), (2,)], heavy_ball.zero, 4, 1, 1, "heavy_ball"))
    assert parts["moments"] == 4 * 8 and parts["host"] == 4 * 8 * 3


def test_an_optimizer_refuses_unknown_options(heavy_ball: Experiment) -> None:
    def problem() -> str:
        return " ".join(training_problems(heavy_ball, 1))

    assert not problem()
    heavy_ball.optimizer.options = {"nesterov": 1.0}
    assert "optimizer.options.nesterov: optimizer.name=heavy_ball has no such option; it has momentum" in problem()
    heavy_ball.optimizer.name = "adamw"
    assert "optimizer.name=adamw has no such option; it has none" in problem()
    heavy_ball.optimizer.name = "sgd"
    *names, last = OPTIMIZERS
    assert f"optimizer.name=sgd: it must be {', '.join(names)} or {last}" in problem() and last == "heavy_ball"
    with pytest.raises(ConfigError, match="it must be adamw"):
        build_engine(torch.nn.Linear(3, 2), heavy_ball, Ranks())
