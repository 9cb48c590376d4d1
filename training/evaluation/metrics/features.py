"""Features that need no weights: colours by place, and the answers of fixed random filters.

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
    """Mean red, green and blue, 0 to 1, of each of 4 x 4 cells: float64 (N, 48). Sees what is where, no detail."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(torch.float64) / 255
    return F.adaptive_avg_pool2d(x, CELLS).flatten(1).numpy()


def random_filters(pictures: np.ndarray) -> np.ndarray:
    """Mean positive answer of 64 fixed random 5 x 5 colour filters over the picture: float64 (N, 64).

    Sees edges, corners and texture at the scale of pixels, not where they are. The filters have mean 0 and norm 1.
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
"""Name, as it stands beside a result -> function."""


WIDTHS = {"colour_grid_4x4": 3 * CELLS**2, "random_filters_64": FILTERS}
"""Name -> d."""


def pair_distances(features: np.ndarray) -> np.ndarray:
    """Euclidean distances over all pairs of different rows of (N, d): (N (N - 1) / 2,)."""
    x = np.asarray(features, dtype=np.float64)
    first, second = np.triu_indices(len(x), 1)
    return np.asarray(np.linalg.norm(x[first] - x[second], axis=-1))


def diversity(features: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of rows of (N, d); 0 for fewer than two."""
    return float(pair_distances(features).mean()) if len(features) > 1 else 0.0
