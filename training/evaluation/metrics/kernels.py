"""Maximum mean discrepancies between two sets of features: KID and CMMD.

Shapes: N samples, M reference pictures, d features. Kernel matrices are made block by block, never whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from training.evaluation.metrics.figure import Figure

BLOCK = 1024
"""Rows of a kernel matrix in memory at a time."""
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
"""As published: the discrepancy of normalised CLIP embeddings is a small number."""
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x . y / d + 1)^3 of every pair of rows: KID's kernel."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2)) of every pair of rows."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)[None] - 2 * (x @ y.T)
        return np.asarray(np.exp(-np.maximum(squares, 0) / (2 * sigma**2)))

    return kernel


def kid(samples: np.ndarray, reference: np.ndarray) -> Figure:
    """Kernel Inception distance (Binkowski et al. 2018): unbiased, so about 0, and sometimes below, between equal
    distributions of any size. Over all pairs at once, where other tools average over random subsets of 1,000."""
    return discrepancy(samples, reference, cubic)


def cmmd(samples: np.ndarray, reference: np.ndarray) -> Figure:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2023): Gaussian kernel of width 10 on normalised embeddings,
    1,000-fold; the biased estimate with the diagonal, as published."""
    return discrepancy(_normalised(samples), _normalised(reference), gaussian(CMMD_SIGMA), False, CMMD_SCALE)


def discrepancy(
    samples: np.ndarray, reference: np.ndarray, kernel: Kernel, unbiased: bool = True, scale: float = 1.0
) -> Figure:
    """Squared maximum mean discrepancy (Gretton et al. 2012, eq. 3 without, eq. 5 with the diagonal).

    The influences are those of Hoeffding's decomposition; its second-order part, which is all that is left between
    equal distributions, is the figure's `twice`.

    Args:
        samples, reference: (N, d) and (M, d), at least 2 rows each.

    Raises:
        ValueError: fewer rows, other widths, or values that are not finite.
    """
    x, y = _checked(samples, reference)
    n, m = len(x), len(y)
    xx, xx_square, xx_diagonal = _sums(x, x, kernel)
    yy, yy_square, yy_diagonal = _sums(y, y, kernel)
    xy, xy_square, _ = _sums(x, y, kernel)
    yx, _, _ = _sums(y, x, kernel)
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
    )


def _checked(samples: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(samples, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of different width: {x.shape[1]} and {y.shape[1]}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a discrepancy needs at least 2 rows on each side, not {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features are not finite")
    return x, y


def _sums(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, float, np.ndarray]:
    """Of the kernel matrix: its rows' sums (N,), the sum of its squares, and its diagonal (where x is y)."""
    rows, diagonal, squares = np.zeros(len(x)), np.zeros(len(x)), 0.0
    for at in _blocks(len(x)):
        block = kernel(x[at], y)
        rows[at] = block.sum(axis=1)
        squares += float(np.square(block).sum())
        if x is y:
            diagonal[at] = np.take_along_axis(block, np.arange(at.start, at.start + len(block))[:, None], 1)[:, 0]
    return rows, squares, diagonal


def _rest(squares: float, diagonal: np.ndarray | None, rows: np.ndarray, columns: np.ndarray, pairs: int) -> float:
    """Mean square of what a kernel holds beyond its row and column means."""
    if diagonal is not None:
        squares -= float(np.square(diagonal).sum())
    spread = squares / pairs - float(rows.mean()) ** 2
    return max(0.0, spread - float(rows.var()) - float(columns.var()))


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def _normalised(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)
