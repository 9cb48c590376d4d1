"""Scores from probabilities of right answers (Soft-TIFA, Kamath et al. 2025, arXiv 2512.16853).

Shapes: N samples, up to K questions about each.
"""

from __future__ import annotations

import numpy as np

LEAST = 1e-300
"""Lower bound on probabilities, since one that rounds to 0 would make the geometric mean 0."""


def arithmetic_mean(chances: np.ndarray) -> np.ndarray:
    """Return Soft-TIFA AM, (N,), of probabilities (N, K); NaN entries are ignored."""
    return np.asarray(np.nanmean(chances, axis=1))


def geometric_mean(chances: np.ndarray) -> np.ndarray:
    """Return Soft-TIFA GM, (N,), of probabilities (N, K); NaN entries are ignored."""
    return np.asarray(np.exp(np.nanmean(np.log(np.maximum(chances, LEAST)), axis=1)))
