"""Exponential moving averages of the weights: their decays, their names, and the post-hoc reconstruction of other
widths. Arithmetic only; optimizers keep the averages themselves (training/optim/base.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from training.config.experiment import EmaConfig

WIDEST = 12**-0.5
"""Relative width of the plain mean over all steps, the widest power profile (gamma = 0)."""


def decay_at(decay: float, updates: int) -> float:
    """Return the decay of update number `updates` (0 for the first), ramped up as (1 + n) / (10 + n), so that early
    averages forget the random initial weights."""
    return min(decay, (1 + updates) / (10 + updates))


def power_decay_at(sigma_rel: float, updates: int) -> float:
    """Return the decay (1 - 1/t)^(gamma + 1) of update t = updates + 1 for a power profile of relative width sigma_rel
    (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", EDM2, eq. 4)."""
    return (1 - 1 / (updates + 1)) ** (gamma_of(sigma_rel) + 1)


def decays_at(config: EmaConfig, updates: int) -> tuple[float, ...]:
    """Return one decay per average for update number `updates` (0 for the first)."""
    rule = power_decay_at if config.profile == "power" else decay_at
    return tuple(rule(value, updates) for value in config.decays)


@lru_cache
def gamma_of(sigma_rel: float) -> float:
    """Return the exponent gamma of a profile, by solving sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2,
    eq. 126)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def posthoc_weights(
    stored: Sequence[tuple[float, float]], updates: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Return the weights with which stored averages sum to an average of another width (EDM2, appendix C.3).

    This is the least-squares fit of the target's profile by the stored ones, under the constraint that the weights sum
    to one (so that constant weights are averaged to themselves).

    Args:
        stored: (updates, sigma_rel) of each stored average, all with power profiles.
        updates: number of updates at which the target average ends.
        sigma_rel: its relative width.

    Returns:
        The weights, and the residual of the fit: the norm of the difference of the profiles, relative to the target's.
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
    """Return the inner product of two power profiles (EDM2, eq. 151)."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    longest = np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * longest)


def state_name(index: int) -> str:
    """Return the name of the optimizer state that holds average `index`; also the prefix of its tensors in a
    checkpoint."""
    return f"ema/{index}"
