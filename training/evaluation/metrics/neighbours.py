"""Fidelity and variety as separate figures, by nearest neighbours; and the training pictures nearest to a sample.

Shapes: N samples, M reference pictures, d features; arrays or `FeatureRows`. Distances are computed tile by tile, never
as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
    """Return four figures, from three passes over the distances. The intervals treat the balls as fixed.

    `precision`, `recall` (Kynkaanniemi et al. 2019): the fraction of samples in a ball around any reference picture
    that reaches its neighbour number `NEIGHBOURS`, and the fraction of reference pictures in such a ball around a
    sample. `density`, `coverage` (Naeem et al. 2020), with balls to neighbour number k = `DENSITY_NEIGHBOURS`: the
    number of reference balls that contain a sample, divided by k, which outliers of the reference hardly affect; and
    the fraction of reference balls that contain a sample.

    Raises:
        ValueError: too few samples or reference pictures to have such neighbours, or features that are not finite.
    """
    around_reference = kth_distances(reference, NEIGHBOURS, DENSITY_NEIGHBOURS)
    around_samples = kth_distances(samples, NEIGHBOURS)[:, 0]
    precise, density = np.zeros(len(samples), bool), np.zeros(len(samples))
    recalled, nearest_sample = np.zeros(len(reference), bool), np.full(len(reference), np.inf)
    for rows, columns, distances in _tiles(samples, reference):
        precise[rows] |= (distances <= around_reference[columns, 0]).any(axis=1)
        recalled[columns] |= (distances <= around_samples[rows, None]).any(axis=0)
        density[rows] += (distances <= around_reference[columns, 1]).sum(axis=1)
        nearest_sample[columns] = np.minimum(nearest_sample[columns], distances.min(axis=0))
    covered = nearest_sample <= around_reference[:, 1]
    return {
        "precision": Figure.mean(precise, is_share=True),
        "recall": Figure.mean(recalled, of="reference", is_share=True),
        "density": replace(Figure.mean(density / DENSITY_NEIGHBOURS), least=0.0),
        "coverage": Figure.mean(covered, of="reference", is_share=True),
    }


def kth_distances(features: FeatureRows, *ks: int) -> np.ndarray:
    """Return the distance of each row to its k-th nearest other row, for each k, (N, len(ks)).

    Raises:
        ValueError: there are too few rows.
    """
    most = max(ks)
    if len(features) <= most:
        raise ValueError(f"{len(features)} pictures: neighbour number {most} needs at least {most + 1}")
    least = np.full((len(features), most + 1), np.inf)  # of each row, including itself
    for rows, _, distances in _tiles(features, features):
        both = np.concatenate([least[rows], distances], axis=1)
        least[rows] = np.partition(both, most, axis=1)[:, : most + 1]
    return np.sort(least, axis=1)[:, list(ks)]


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
