"""Exponential moving averages of the weights, kept as states of the optimizer.

An average that is an optimizer state is sharded by ZeRO exactly like Adam's moments: fp32, no gathering, `4 /
world_size` bytes per weight. A step that DeepSpeed skips (non-finite gradient) never reaches the optimizer, so it does
not move the average either.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from training.config.experiment import EmaConfig
from training.optim.adafactor import Adafactor
from training.optim.adamw8bit import AdamW8bit

WIDEST = 12**-0.5
"""Relative width of the plain mean over all steps, the widest power profile (gamma = 0)."""


def decay_at(decay: float, updates: int) -> float:
    """The decay of update number `updates` (0 for the first): ramped up as (1 + n) / (10 + n), so that early averages
    forget the random start."""
    return min(decay, (1 + updates) / (10 + updates))


def power_decay_at(sigma_rel: float, updates: int) -> float:
    """The decay (1 - 1/t)^(gamma + 1) of update t = updates + 1 for a power profile of relative width sigma_rel
    (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", eq. 4)."""
    return (1 - 1 / (updates + 1)) ** (gamma_of(sigma_rel) + 1)


def decays_at(config: EmaConfig, updates: int) -> tuple[float, ...]:
    """One decay per average."""
    rule = power_decay_at if config.profile == "power" else decay_at
    return tuple(rule(value, updates) for value in config.decays)


@lru_cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) solved for it (EDM2, eq.
    126)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def posthoc_weights(
    stored: Sequence[tuple[float, float]], updates: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Weights with which stored averages add up to the one of another width (EDM2, appendix C.3): the least-squares
    fit of the target's profile by the stored ones, among weights that sum to one (an average of weights that do not
    move is those weights).

    Args:
        stored: (updates, sigma_rel) of each stored average, power profiles all.
        updates: where the wanted average ends.
        sigma_rel: its relative width.

    Returns:
        The weights, and what the fit leaves over: the norm of the difference of the profiles relative to the target's.
    """
    t = np.array([at for at, _ in stored], dtype=np.float64)
    gamma = np.array([gamma_of(width) for _, width in stored])
    among = _overlap(t[:, None], gamma[:, None], t[None], gamma[None])
    end, exponent = np.array(float(updates)), np.array(gamma_of(sigma_rel))
    wanted, norm = _overlap(t, gamma, end, exponent), _overlap(end, exponent, end, exponent)
    weights, unit = np.linalg.lstsq(among, np.stack([wanted, np.ones_like(wanted)], axis=1), rcond=None)[0].T
    weights = weights + unit * (1 - weights.sum()) / unit.sum()
    left = weights @ among @ weights - 2 * weights @ wanted + norm
    return weights, float(np.sqrt(max(left, 0.0) / norm))


def _overlap(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner product of two power profiles (EDM2, eq. 151)."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    longest = np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * longest)


def state_name(index: int) -> str:
    """The optimizer state that holds average `index`; also the first part of its tensors' names in a checkpoint."""
    return f"ema/{index}"


class Averaging(torch.optim.Optimizer):
    """Mix-in, left of an optimizer class: `step` also moves `state[p]["ema/I"]` towards the new weights.

    Set `averaging` (one decay per average) before each step; the engine derives it from the number of updates so far,
    because ZeRO 3 calls `step` once per group of parameters. An average begins as the weights before its first step.
    """

    averaging: tuple[float, ...] = ()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The optimizer's step, then every average moves towards the new weights."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        names = [state_name(index) for index in range(len(self.averaging))]
        fresh = {p: p.detach().clone() for p in parameters if any(name not in self.state[p] for name in names)}
        base = super().step
        # torch's wrapper around it (gradients off, as they are here) imports the compiler: 5 s at the first step
        plain = getattr(base, "__wrapped__", None)
        result = base(closure) if plain is None else plain(self, closure)
        for name, decay in zip(names, self.averaging, strict=True):
            for p in fresh:
                self.state[p].setdefault(name, fresh[p].clone())
            averages = [self.state[p][name] for p in parameters]
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        return result


class AveragingAdamW(Averaging, torch.optim.AdamW):
    """AdamW with moving averages."""


class AveragingAdamW8bit(Averaging, AdamW8bit):
    """AdamW with moments of 8 bits, with moving averages in fp32."""


class AveragingAdafactor(Averaging, Adafactor):
    """Adafactor with moving averages."""
