"""Fidelity and variety as separate figures, by nearest neighbours; and the training pictures nearest to a sample.

Shapes: N samples, M reference pictures, d features; arrays or `FeatureRows`. Distances are computed tile by tile, never
as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.rows import FeatureRows, blocks

NEIGHBOURS = 3
"""k for precision and recall, as published."""
DENSITY_NEIGHBOURS = 5
"""k for density and coverage, as published."""
DIVISIONS = 32
"""Number of random divisions into halves, which makes standard errors correct to within about an eighth."""
WITHIN = 32
"""Number of nearest neighbours among which to look for the 5 of a half; once in 100,000 times, fewer are in it."""
RARE, COPY = 0.01, 0.5
"""See `closeness`."""
ROUNDING = 1e-12
"""Fraction of |x|^2 + |y|^2 up to which |x - y|^2 is rounding error: of the difference of nearly equal numbers, or of a
network's fp32 features of the same picture in different batches."""


def fidelity_and_variety(
    samples: FeatureRows, reference: FeatureRows, prompts: np.ndarray | None = None
) -> dict[str, Figure]:
    """Return four figures, from one pass over the distances between samples and reference pictures, and one over those
    within each.

    `precision`, `recall` (Kynkaanniemi et al. 2019): the fraction of samples in a ball around any reference picture
    that reaches its neighbour number `NEIGHBOURS`, and the fraction of reference pictures in such a ball around a
    sample. `density`, `coverage` (Naeem et al. 2020), with balls to neighbour number k = `DENSITY_NEIGHBOURS`: the
    number of reference balls that contain a sample, divided by k, which outliers of the reference hardly affect; and
    the fraction of reference balls that contain a sample.

    Args:
        prompts: int (N,): the prompt of each sample, by number; None: every sample has its own.

    Raises:
        ValueError: too few samples or reference pictures to have such neighbours, or features that are not finite.
    """
    groups = np.arange(len(samples)) if prompts is None else prompts
    divisions = DIVISIONS if len(np.unique(groups)) > 1 else 0
    sides_x, sides_y = _sides(groups, divisions), _sides(np.arange(len(reference)), divisions)
    around_y, around_x = (_neighbours(rows, DENSITY_NEIGHBOURS) for rows in (reference, samples))
    narrow, wide = (_radii(around_y, sides_y, k) for k in (NEIGHBOURS, DENSITY_NEIGHBOURS))
    around = _radii(around_x, sides_x, NEIGHBOURS)
    furthest_y, furthest_x = np.maximum(narrow, wide).max(axis=0), around.max(axis=0)
    precise, density = np.zeros(sides_x.shape, bool), np.zeros(sides_x.shape)
    recalled, covered = np.zeros(sides_y.shape, bool), np.zeros(sides_y.shape, bool)
    for rows, columns, distances in _tiles(samples, reference):
        near = distances <= np.maximum(furthest_x[rows, None], furthest_y[columns])
        x, y = (places + where.start for places, where in zip(np.nonzero(near), (rows, columns), strict=True))
        for split, apart in enumerate(_in_pieces(distances[near], sides_x, sides_y, x, y)):
            here = apart <= wide[split, y]
            precise[split, x[apart <= narrow[split, y]]] = True
            recalled[split, y[apart <= around[split, x]]] = True
            covered[split, y[here]] = True
            density[split] += np.bincount(x[here], minlength=len(samples))
    density /= DENSITY_NEIGHBOURS
    return {
        "precision": _with_halves(precise, sides_x, is_share=True),
        "recall": _with_halves(recalled, sides_y, of="reference", is_share=True),
        "density": replace(_with_halves(density, sides_x), least=0.0),
        "coverage": _with_halves(covered, sides_y, of="reference", is_share=True),
    }


def _in_pieces(
    distances: np.ndarray, sides_x: np.ndarray, sides_y: np.ndarray, x: np.ndarray, y: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield the distances (P,) of the pairs (x, y) for every division, infinite between its halves."""
    for mine, theirs in zip(sides_x, sides_y, strict=True):
        yield np.where(mine[x] == theirs[y], distances, np.inf)


def _sides(groups: np.ndarray, divisions: int) -> np.ndarray:
    """Return on which side each of N pictures is, (1 + divisions, N): all on side 0, and random divisions into halves
    that keep the pictures of a group together; the same for the same groups."""
    known, own = np.unique(groups, return_inverse=True)
    sides = np.zeros((1 + divisions, len(groups)), np.int8)
    chance = np.random.default_rng(len(known))
    for side in sides[1:]:
        side[:] = chance.permutation(np.arange(len(known)) % 2)[own]
    return sides


def _radii(near: _Neighbours, sides: np.ndarray, k: int) -> np.ndarray:
    """Return the distance of each of N pictures to its k-th neighbour on its own side, (1 + divisions, N); to the last
    of the known neighbours if fewer of these are."""
    found = np.empty(sides.shape)
    for radii, side in zip(found, sides, strict=True):
        same = (side[near.places] == side[:, None]).cumsum(axis=1) >= k
        last = np.where(same[:, -1], same.argmax(axis=1), same.shape[1] - 1)
        radii[:] = np.take_along_axis(near.distances, last[:, None], axis=1)[:, 0]
    return found


def _with_halves(values: np.ndarray, sides: np.ndarray, of: str = "samples", is_share: bool = False) -> Figure:
    """Return the mean of values (1 + divisions, N): of the whole, with the means of the halves of every division."""
    halves = [
        [value[side == half].mean() for half in (0, 1)] for value, side in zip(values[1:], sides[1:], strict=True)
    ]
    return replace(Figure.mean(values[0], of=of, is_share=is_share), halves=np.array(halves))


@dataclass(frozen=True)
class _Neighbours:
    """The nearest other rows of each row, nearest first: distances and indices, (N, k)."""

    distances: np.ndarray
    places: np.ndarray


def kth_distances(features: FeatureRows, k: int) -> np.ndarray:
    """Return the distance of each row to its k-th nearest other row, (N,).

    Raises:
        ValueError: there are too few rows.
    """
    return _neighbours(features, k, k).distances[:, k - 1]


def _neighbours(features: FeatureRows, k: int, most: int = WITHIN) -> _Neighbours:
    """Return the nearest other rows of each row (N, d): `most`, or all.

    Raises:
        ValueError: there are fewer than k.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures: neighbour number {k} needs at least {k + 1}")
    count = min(most, len(features) - 1)
    least = np.full((len(features), count + 1), np.inf)
    places = np.zeros((len(features), count + 1), np.int64)
    for rows, columns, distances in _tiles(features, features):
        if rows == columns:
            np.fill_diagonal(distances, -1.0)  # the row itself, before its duplicates
        here = np.broadcast_to(np.arange(columns.start, columns.stop), distances.shape)
        both, at = np.concatenate([least[rows], distances], axis=1), np.concatenate([places[rows], here], axis=1)
        order = np.argpartition(both, count, axis=1)[:, : count + 1]
        least[rows], places[rows] = np.take_along_axis(both, order, axis=1), np.take_along_axis(at, order, axis=1)
    order = np.argsort(least, axis=1)[:, 1:]
    return _Neighbours(np.take_along_axis(least, order, axis=1), np.take_along_axis(places, order, axis=1))


def nearest(queries: FeatureRows, features: FeatureRows, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (Q, k) of the nearest rows of features (M, d) for each query, nearest first, and their
    distances."""
    k = min(k, len(features))
    places = np.zeros((len(queries), k), dtype=np.int64)
    least = np.full((len(queries), k), np.inf)
    for rows, columns, distances in _tiles(queries, features):
        here = np.broadcast_to(np.arange(columns.start, columns.stop), distances.shape)
        both, at = np.concatenate([least[rows], distances], axis=1), np.concatenate([places[rows], here], axis=1)
        order = np.argsort(both, axis=1, kind="stable")[:, :k]
        least[rows], places[rows] = np.take_along_axis(both, order, axis=1), np.take_along_axis(at, order, axis=1)
    return places, least


def closeness(samples: FeatureRows, training: FeatureRows) -> tuple[np.ndarray, np.ndarray]:
    """Return how close each sample is to its nearest training picture, and the index of that picture.

    Returns:
        Distances (N,), in units of the distance below which only a fraction `RARE` of the training pictures (without
        duplicates) have their own nearest neighbour. New pictures of the same distribution are as rarely below 1; those
        below `COPY` are copies. And indices (N,) of the nearest training pictures.
    """
    apart = kth_distances(training, 1)
    distinct = apart[apart > 0]
    places, distances = nearest(samples, training)
    unit = float(np.quantile(distinct, RARE)) if len(distinct) else 1.0
    return distances[:, 0] / unit, places[:, 0]


def _tiles(a: FeatureRows, b: FeatureRows) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (rows of a, rows of b, Euclidean distances between them) for all pairs, with the rows of `a` in order. The
    distance of equal rows is exactly 0."""
    for rows, x in blocks(a):
        for columns, y in blocks(b):
            norms = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
            squares = norms - 2 * (x @ y.T)
            squares[squares <= ROUNDING * norms] = 0.0
            yield rows, columns, np.sqrt(squares, out=squares)
