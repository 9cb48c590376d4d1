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
RARE, COPY = 0.01, 0.5
"""See `closeness`."""
ROUNDING = 1e-12
"""Fraction of |x|^2 + |y|^2 up to which |x - y|^2 is rounding error: of the difference of nearly equal numbers, or of a
network's fp32 features of the same picture in different batches."""


def fidelity_and_variety(samples: FeatureRows, reference: FeatureRows) -> dict[str, Figure]:
    """Return four figures, from four passes over the distances.

    `precision`, `recall` (Kynkaanniemi et al. 2019): the fraction of samples in a ball around any reference picture
    that reaches its neighbour number `NEIGHBOURS`, and the fraction of reference pictures in such a ball around a
    sample. `density`, `coverage` (Naeem et al. 2020), with balls to neighbour number k = `DENSITY_NEIGHBOURS`: the
    number of reference balls that contain a sample, divided by k, which outliers of the reference hardly affect; and
    the fraction of reference balls that contain a sample.

    Influences are the jackknife's: how much a figure changes, times N - 1, if a picture is left out, with its ball and
    as a neighbour of others (Efron & Stein 1981: on average, this variance is not too small).

    Raises:
        ValueError: too few samples or reference pictures to have such neighbours, or features that are not finite.
    """
    near_reference, near_samples = _neighbours(reference, DENSITY_NEIGHBOURS), _neighbours(samples, NEIGHBOURS)
    narrow, wide = near_reference.balls(NEIGHBOURS), near_reference.balls(DENSITY_NEIGHBOURS)
    around_samples = near_samples.balls(NEIGHBOURS)
    precise, recalled = _Union(len(samples)), _Union(len(reference))
    density, inside, beyond = np.zeros(len(samples)), np.zeros(len(reference)), np.zeros(len(reference))
    two, first = np.full((len(reference), 2), np.inf), np.zeros(len(reference), np.int64)
    for rows, columns, distances in _tiles(samples, reference):
        precise.add(rows, columns, distances <= narrow.radius[columns])
        recalled.add(columns, rows, (distances <= around_samples.radius[rows, None]).T)
        within = distances <= wide.radius[columns]
        density[rows] += within.sum(axis=1)
        inside[columns] += within.sum(axis=0)
        beyond[columns] += (distances <= wide.wider[columns]).sum(axis=0)
        first[columns] = np.where(
            distances.min(axis=0) < two[columns, 0], rows.start + distances.argmin(axis=0), first[columns]
        )
        two[columns] = np.sort(np.concatenate([two[columns], np.sort(distances, axis=0)[:2].T], axis=1), axis=1)[:, :2]
    for rows, columns, distances in _tiles(samples, reference):
        precise.add_shells(rows, columns, _shell(distances, narrow.radius[columns], narrow.wider[columns]))
        shell = _shell(distances, around_samples.radius[rows, None], around_samples.wider[rows, None])
        recalled.add_shells(columns, rows, shell.T)
    precision = Figure.mean(precise.count > 0, is_share=True)
    recall = Figure.mean(recalled.count > 0, of="reference", is_share=True)
    dense = Figure.mean(density / DENSITY_NEIGHBOURS)
    covered = two[:, 0] <= wide.radius
    coverage = Figure.mean(covered, of="reference", is_share=True)
    only = np.bincount(first[covered & (two[:, 1] > wide.radius)], minlength=len(samples))
    uncovered = np.bincount(wide.neighbours[~covered & (two[:, 0] <= wide.wider)].ravel(), minlength=len(reference))
    gained = np.bincount(wide.neighbours.ravel(), np.repeat(beyond - inside, DENSITY_NEIGHBOURS), len(reference))
    most, fewer = len(samples), len(reference) - 1
    return {
        "precision": replace(precision, reference=precise.influences(narrow)),
        "recall": replace(recall, samples=recalled.influences(around_samples)),
        "density": replace(
            dense, reference=_centred(fewer * (inside - gained) / (DENSITY_NEIGHBOURS * most)), least=0.0
        ),
        "coverage": replace(
            coverage,
            samples=_centred((most - 1) * only / len(reference)),
            reference=coverage.reference - _centred(uncovered.astype(np.float64)),
        ),
    }


@dataclass(frozen=True)
class _Balls:
    """A ball around each of C centres, as far as its k-th neighbour."""

    radius: np.ndarray
    """float64 (C,)."""
    wider: np.ndarray
    """float64 (C,): the radius without one of these neighbours."""
    neighbours: np.ndarray
    """int (C, k)."""


@dataclass(frozen=True)
class _Neighbours:
    """The nearest other rows of each row, nearest first: distances and indices, (N, k + 1)."""

    distances: np.ndarray
    places: np.ndarray

    def balls(self, k: int) -> _Balls:
        return _Balls(self.distances[:, k - 1], self.distances[:, k], self.places[:, :k])


class _Union:
    """Which of P points are in any ball: `count` (P,) of the balls, and which it is if it is one."""

    def __init__(self, points: int) -> None:
        self.count, self._sum = np.zeros(points, np.int64), np.zeros(points)
        self._shells: list[np.ndarray] = []

    def add(self, points: slice, centres: slice, inside: np.ndarray) -> None:
        """Take in whether points are inside balls, bool (points, centres)."""
        self.count[points] += inside.sum(axis=1)
        self._sum[points] += inside @ np.arange(centres.start, centres.stop, dtype=np.float64)

    def add_shells(self, points: slice, centres: slice, shells: np.ndarray) -> None:
        """Take in whether points are in a ball only if it is wider, bool (points, centres), after all of `add`."""
        point, centre = np.nonzero(shells & (self.count[points] < 2)[:, None])
        self._shells.append(np.stack([point + points.start, centre + centres.start]))

    def influences(self, balls: _Balls) -> np.ndarray:
        """Return the influence of each centre on the fraction of points that are in any ball, (C,)."""
        centres, k = balls.neighbours.shape
        only = np.where(self.count == 1, self._sum, -1).astype(np.int64)
        lost = np.bincount(only[only >= 0], minlength=centres)
        point, centre = np.concatenate(self._shells, axis=1)
        without, point = balls.neighbours[centre].ravel(), np.repeat(point, k)
        found = (self.count[point] == 0) | (only[point] == without)
        regained = np.bincount(np.unique(np.stack([without, point])[:, found], axis=1)[0], minlength=centres)
        return _centred((centres - 1) * (lost - regained) / len(self.count))


def _centred(influences: np.ndarray) -> np.ndarray:
    return np.asarray(influences - influences.mean())


def _shell(distances: np.ndarray, radius: np.ndarray, wider: np.ndarray) -> np.ndarray:
    return np.asarray((radius < distances) & (distances <= wider))


def kth_distances(features: FeatureRows, k: int) -> np.ndarray:
    """Return the distance of each row to its k-th nearest other row, (N,).

    Raises:
        ValueError: there are too few rows.
    """
    return _neighbours(features, k).distances[:, k - 1]


def _neighbours(features: FeatureRows, k: int) -> _Neighbours:
    """Return the k + 1 nearest other rows of each row (N, d); the last is at an infinite distance if N is k + 1.

    Raises:
        ValueError: there are too few rows for k.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures: neighbour number {k} needs at least {k + 1}")
    least = np.full((len(features), k + 2), np.inf)
    places = np.zeros((len(features), k + 2), np.int64)
    for rows, columns, distances in _tiles(features, features):
        if rows == columns:
            np.fill_diagonal(distances, -1.0)  # the row itself, before its duplicates
        here = np.broadcast_to(np.arange(columns.start, columns.stop), distances.shape)
        both, at = np.concatenate([least[rows], distances], axis=1), np.concatenate([places[rows], here], axis=1)
        order = np.argpartition(both, k + 1, axis=1)[:, : k + 2]
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
