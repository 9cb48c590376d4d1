"""Fidelity and variety apart, by nearest neighbours; and the training pictures nearest to a sample.

Shapes: N samples, M reference pictures, d features. Distances are made block by block, never whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from training.evaluation.metrics.figure import Figure

NEIGHBOURS = 3
"""Of precision and recall, as published."""
DENSITY_NEIGHBOURS = 5
"""Of density and coverage, as published."""
RARE, COPY = 0.01, 0.5
"""See `closeness`."""
BLOCK = 1024


def precision_recall(samples: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURS) -> dict[str, Figure]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of samples inside a ball around any reference
    picture that reaches to its k-th neighbour, and the share of reference pictures inside such a ball of a sample.
    The intervals take the balls as given.

    Raises:
        ValueError: k or fewer pictures on either side.
    """
    inside_reference = _balls(samples, reference, k) > 0
    inside_samples = _balls(reference, samples, k) > 0
    return {
        "precision": Figure.mean(inside_reference, is_share=True),
        "recall": Figure.mean(inside_samples, of="reference", is_share=True),
    }


def density_coverage(samples: np.ndarray, reference: np.ndarray, k: int = DENSITY_NEIGHBOURS) -> dict[str, Figure]:
    """Density and coverage (Naeem et al. 2020): reference balls that a sample lies in, by k, which an outlier of the
    reference moves little; and the share of reference balls that hold a sample.

    Raises:
        ValueError: k or fewer reference pictures.
    """
    radii = kth_distances(reference, k)
    covered = np.array([nearest for block in _distances(reference, samples) for nearest in block.min(axis=1)]) <= radii
    return {
        "density": Figure.mean(_balls(samples, reference, k) / k),
        "coverage": Figure.mean(covered, of="reference", is_share=True),
    }


def kth_distances(features: np.ndarray, k: int) -> np.ndarray:
    """(N,): distance of each row to its k-th nearest other row.

    Raises:
        ValueError: there is no such neighbour.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures: the {k}. neighbour needs at least {k + 1}")
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _distances(features, features)])


def nearest(queries: np.ndarray, features: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) places of the nearest rows of (M, d) features, nearest first, and their distances."""
    places, distances = [], []
    for block in _distances(queries, features):
        order = np.argsort(block, axis=1, kind="stable")[:, :k]
        places.append(order)
        distances.append(np.take_along_axis(block, order, axis=1))
    return np.concatenate(places), np.concatenate(distances)


def closeness(samples: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How near each sample is to a training picture, and which one that is.

    Returns:
        (N,) distances to the nearest training picture, in units of the distance that only `RARE` of the training
        pictures (duplicates left out) have to their own nearest one. Fresh pictures of the same distribution lie above
        1 as often; those below `COPY` are copies.
        (N,) places of the nearest training pictures.
    """
    apart = kth_distances(training, 1)
    distinct = apart[apart > 0]
    places, distances = nearest(samples, training)
    unit = float(np.quantile(distinct, RARE)) if len(distinct) else 1.0
    return distances[:, 0] / unit, places[:, 0]


def _balls(points: np.ndarray, centres: np.ndarray, k: int) -> np.ndarray:
    """(N,): in how many of the centres' balls each point lies."""
    radii = kth_distances(centres, k)
    return np.concatenate([(block <= radii).sum(axis=1) for block in _distances(points, centres)])


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean distances of rows, a block of rows of `a` at a time. A row's distance to itself is exactly 0."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features are not finite")
    squares = np.square(y).sum(axis=1)
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        found = np.square(rows).sum(axis=1)[:, None] + squares - 2 * (rows @ y.T)
        if a is b:
            np.fill_diagonal(found[:, start:], 0.0)
        yield np.sqrt(np.maximum(found, 0))
