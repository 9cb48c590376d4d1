"""Features without weights: colours by position, and the responses of fixed random filters.

Shapes: N pictures, H, W pixels, d features. Pictures are uint8 (N, H, W, 3), H and W at least 8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from training.text.words import hash_vector

CELLS = 4
FILTERS = 64
KERNEL = 5


def colour_grid(pictures: np.ndarray) -> np.ndarray:
    """Return the mean red, green and blue, 0 to 1, of each of 4 x 4 cells, float64 (N, 48). They show colours by
    position, but no detail."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(torch.float64) / 255
    return F.adaptive_avg_pool2d(x, CELLS).flatten(1).numpy()


def random_filters(pictures: np.ndarray) -> np.ndarray:
    """Return the mean positive response of 64 fixed random 5 x 5 colour filters over the picture, float64 (N, 64).

    They show edges, corners and texture at the scale of pixels, but no positions. The filters have mean 0 and norm 1.
    """
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(torch.float32) / 255
    return F.conv2d(x, _filters()).clamp(min=0).mean(dim=(2, 3)).to(torch.float64).numpy()


@lru_cache(maxsize=1)
def _filters() -> torch.Tensor:
    rows = np.stack([hash_vector(f"filter {i}", 3 * KERNEL**2) for i in range(FILTERS)])
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.reshape(FILTERS, 3, KERNEL, KERNEL))


EXTRACTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "colour_grid_4x4": colour_grid,
    "random_filters_64": random_filters,
}
"""Functions by the name of their features."""


WIDTHS = {"colour_grid_4x4": 3 * CELLS**2, "random_filters_64": FILTERS}
"""Number of features d by name."""


def pair_distances(features: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances of all pairs of different rows of (N, d), (N (N - 1) / 2,)."""
    x = np.asarray(features, dtype=np.float64)
    first, second = np.triu_indices(len(x), 1)
    return np.asarray(np.linalg.norm(x[first] - x[second], axis=-1))


def diversity(features: np.ndarray) -> float:
    """Return the mean Euclidean distance over all pairs of rows of (N, d); 0 for fewer than two."""
    return float(pair_distances(features).mean()) if len(features) > 1 else 0.0
