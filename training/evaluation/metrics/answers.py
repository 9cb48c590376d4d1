"""From probabilities of right answers to scores (Soft-TIFA, Kamath et al. 2025, arXiv 2512.16853).

Shapes: N samples, up to K questions about each.
"""

from __future__ import annotations

import numpy as np

LEAST = 1e-300
"""A probability of 0 would make a geometric mean 0 by rounding alone."""


def arithmetic_mean(chances: np.ndarray) -> np.ndarray:
    """(N,) Soft-TIFA AM of (N, K) probabilities."""
    return np.asarray(np.nanmean(chances, axis=1))


def geometric_mean(chances: np.ndarray) -> np.ndarray:
    """(N,) Soft-TIFA GM of (N, K) probabilities."""
    return np.asarray(np.exp(np.nanmean(np.log(np.maximum(chances, LEAST)), axis=1)))
