"""Averages compared with their definitions, and reconstructed widths with those that were kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.config.experiment import EmaConfig, OptimizerConfig
from training.optim.adafactor import Adafactor
from training.optim.adamw import AdamW
from training.optim.adamw8bit import AdamW8bit
from training.optim.averages import (
    decay_at,
    decays_at,
    gamma_of,
    posthoc_weights,
    power_decay_at,
    state_name,
)
from training.optim.base import TrainOptimizer


def profile(sigma_rel: float, steps: int) -> np.ndarray:
    """The weights of the parameters of steps 1 to `steps` in the average after `steps`."""
    weights = np.zeros(steps)
    for step in range(steps):
        decay = power_decay_at(sigma_rel, step)
        weights *= decay
        weights[step] += 1 - decay
    return weights


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2])
def test_the_width_is_the_one_that_was_asked_for(sigma_rel: float) -> None:
    steps = 4000
    weights, at = profile(sigma_rel, steps), np.arange(1, steps + 1)
    assert weights.sum() == pytest.approx(1)
    mean = (weights * at).sum()
    assert np.sqrt((weights * (at - mean) ** 2).sum()) / steps == pytest.approx(sigma_rel, rel=0.01)


def test_gamma_of_a_known_width() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.13])
def test_another_width_afterwards(sigma_rel: float) -> None:
    """Stored every 100 steps with two widths: the sum of profiles comes close to the wanted profile."""
    stored = [(t, width) for t in range(100, 2001, 100) for width in (0.05, 0.1)]
    weights, left = posthoc_weights(stored, 2000, sigma_rel)
    assert weights.sum() == pytest.approx(1) and left < 0.1
    made = np.zeros(2000)
    for weight, (t, width) in zip(weights, stored, strict=True):
        made[:t] += weight * profile(width, t)
    wanted = profile(sigma_rel, 2000)
    assert np.linalg.norm(made - wanted) < 0.05 * np.linalg.norm(wanted)
    assert made.sum() == pytest.approx(1, abs=0.01)


def test_a_stored_average_is_its_own_reconstruction() -> None:
    stored = [(500.0, 0.05), (1000.0, 0.05), (1000.0, 0.1)]
    weights, left = posthoc_weights(stored, 1000, 0.1)
    assert weights == pytest.approx([0, 0, 1], abs=1e-6) and left == pytest.approx(0, abs=1e-6)


def test_constant_decay_is_ramped_up() -> None:
    assert decay_at(0.999, 0) == 0.1
    assert decay_at(0.999, 10**6) == 0.999
    assert decays_at(EmaConfig(decays=[0.9, 0.5]), 90) == (0.9, 0.5)
    assert decays_at(EmaConfig(decays=[0.05, 0.1], profile="power"), 0) == (0.0, 0.0)


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit, Adafactor])
def test_the_step_is_the_base_class_step(kind: type[TrainOptimizer]) -> None:
    """Same weights as the optimizer without averages, and the averages follow them."""
    torch.manual_seed(0)
    start = torch.randn(5, 4)
    mine, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    config = OptimizerConfig(lr=0.1)
    optimizer, base = kind.build([mine], config, False), kind.build([plain], config, False)
    if kind is AdamW:
        base = torch.optim.AdamW([plain], lr=0.1, betas=(0.9, 0.99), eps=config.eps, weight_decay=config.weight_decay)  # type: ignore[assignment]
    optimizer.averaging = (0.9, 0.0)
    average = start.clone()
    for step in range(3):
        for parameter in (mine, plain):
            parameter.grad = torch.full_like(start, 0.1 * step - 0.05) * parameter.detach()
        optimizer.step()
        base.step()
        average.lerp_(mine.detach(), 0.1)
    assert torch.equal(mine, plain)
    assert torch.allclose(optimizer.state[mine][state_name(0)], average)
    assert torch.equal(optimizer.state[mine][state_name(1)], mine.detach())
