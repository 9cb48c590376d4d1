"""Maximum mean discrepancies between two sets of features: KID and CMMD.

Shapes: N samples, M reference pictures, d features; arrays or `FeatureRows`. Kernel matrices are computed tile by tile,
never as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.rows import FeatureRows, blocks

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
"""Factor as published, since the discrepancy of normalised CLIP embeddings is small."""
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (x . y / d + 1)^3 of every pair of rows, KID's kernel."""
    inner = x @ y.T / x.shape[1] + 1
    return np.asarray(inner * inner * inner)  # `**` is ten times as slow


def gaussian(sigma: float) -> Kernel:
    """Return the kernel exp(-|x - y|^2 / (2 sigma^2)) of every pair of rows."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None] - 2 * (x @ y.T)
        return np.asarray(np.exp(-np.maximum(squares, 0) / (2 * sigma**2)))

    return kernel


def kid(samples: FeatureRows, reference: FeatureRows) -> Figure:
    """Return the kernel Inception distance (Binkowski et al. 2018). It is unbiased, so it is about 0, sometimes below,
    between equal distributions. Uses all pairs at once, whereas other tools average over random subsets of 1,000."""
    return discrepancy(samples, reference, cubic)


def cmmd(samples: FeatureRows, reference: FeatureRows) -> Figure:
    """Return the CLIP maximum mean discrepancy (Jayasumana et al. 2023), times 1,000: Gaussian kernel of width 10 on
    normalised embeddings; the biased estimate with the diagonal, as published."""
    gauss = gaussian(CMMD_SIGMA)
    return discrepancy(
        samples, reference, lambda x, y: gauss(_normalised(x), _normalised(y)), unbiased=False, scale=CMMD_SCALE
    )


def discrepancy(
    samples: FeatureRows, reference: FeatureRows, kernel: Kernel, unbiased: bool = True, scale: float = 1.0
) -> Figure:
    """Return the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3 without, eq. 5 with the diagonal).

    The influences are those of Hoeffding's decomposition; its second-order part, the only one between equal
    distributions, is the figure's `twice`.

    Args:
        samples, reference: (N, d) and (M, d), at least 2 rows each.
        kernel: a symmetric kernel.
        unbiased: without the diagonal.

    Raises:
        ValueError: too few rows, different widths, or values that are not finite.
    """
    _check(samples, reference)
    n, m = len(samples), len(reference)
    xx, xx_square, xx_diagonal = _among(samples, kernel)
    yy, yy_square, yy_diagonal = _among(reference, kernel)
    xy, yx, xy_square = _across(samples, reference, kernel)
    among_x, among_y = (xx - xx_diagonal) / (n - 1), (yy - yy_diagonal) / (m - 1)
    across_x, across_y = xy / m, yx / n
    cross = float(across_x.mean())
    value = (float(xx.mean() / n + yy.mean() / m)) if not unbiased else float(among_x.mean() + among_y.mean())
    twice = (
        2 * _rest(xx_square, xx_diagonal, among_x, among_x, n * (n - 1)) / (n * (n - 1))
        + 2 * _rest(yy_square, yy_diagonal, among_y, among_y, m * (m - 1)) / (m * (m - 1))
        + 4 * _rest(xy_square, None, across_x, across_y, n * m) / (n * m)
    )
    first, second = among_x - across_x, among_y - across_y
    return Figure(
        scale * (value - 2 * cross),
        scale * 2 * (first - first.mean()),
        scale * 2 * (second - second.mean()),
        scale**2 * twice,
        least=-math.inf if unbiased else 0.0,
    )


def _check(x: FeatureRows, y: FeatureRows) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of different width: {x.shape[1]} and {y.shape[1]}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a discrepancy needs at least 2 rows on each side, not {len(x)} and {len(y)}")


def _among(x: FeatureRows, kernel: Kernel) -> tuple[np.ndarray, float, np.ndarray]:
    """Return the row sums (N,), the sum of squares and the diagonal (N,) of the kernel matrix of x with itself."""
    sums, diagonal, squares = np.zeros(len(x)), np.zeros(len(x)), 0.0
    for rows, first in blocks(x):
        for columns, second in blocks(x):
            if columns.start < rows.start:
                continue  # the transpose of an earlier tile
            tile = kernel(first, second)
            sums[rows] += tile.sum(axis=1)
            if columns == rows:
                diagonal[rows] = np.diagonal(tile)
                squares += float(np.square(tile).sum())
            else:
                sums[columns] += tile.sum(axis=0)
                squares += 2 * float(np.square(tile).sum())
    return sums, squares, diagonal


def _across(x: FeatureRows, y: FeatureRows, kernel: Kernel) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the row sums (N,), the column sums (M,) and the sum of squares of the kernel matrix of x with y."""
    over_y, over_x, squares = np.zeros(len(x)), np.zeros(len(y)), 0.0
    for rows, first in blocks(x):
        for columns, second in blocks(y):
            tile = kernel(first, second)
            over_y[rows] += tile.sum(axis=1)
            over_x[columns] += tile.sum(axis=0)
            squares += float(np.square(tile).sum())
    return over_y, over_x, squares


def _rest(squares: float, diagonal: np.ndarray | None, rows: np.ndarray, columns: np.ndarray, pairs: int) -> float:
    """Return the mean square of a kernel matrix after removing its row and column means."""
    if diagonal is not None:
        squares -= float(np.square(diagonal).sum())
    spread = squares / pairs - float(rows.mean()) ** 2
    return max(0.0, spread - float(rows.var()) - float(columns.var()))


def _normalised(features: np.ndarray) -> np.ndarray:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12))
