"""Frechet distance between two sets of features, from mergeable float64 moments.

Shapes: N samples, d features; arrays or `FeatureRows`, of which one block at a time is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.rows import FeatureRows, blocks

SMALLEST = -1e-3
"""Lowest value, relative to the traces, to which rounding may take a distance of zero; anything lower is an error."""
SINGULAR = 1e-10
"""Fraction of the largest eigenvalue below which eigenvalues are rounding errors."""


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and scatter (d, d) = sum of (x - mean)(x - mean)^T of a set of features, in float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: FeatureRows) -> Moments:
        """Return the moments of features (N, d), N >= 1, any dtype. Raises `ValueError` if they are not finite."""
        mean = sum(block.sum(axis=0) for _, block in blocks(features)) / len(features)
        scatter = np.zeros((features.shape[1], features.shape[1]))
        for _, block in blocks(features):
            centred = block - mean
            scatter += centred.T @ centred
        return cls(len(features), np.asarray(mean), scatter)

    def merged(self, other: Moments) -> Moments:
        """Return the moments of the union of two sets (Chan et al. 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (d, d), with divisor N - 1. Raises `ValueError` for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    With S_a = L L^T, the product has the eigenvalues of L^T S_b L, which is symmetric: a Cholesky factor and `eigvalsh`
    or, if S_a is singular, its root by `eigh`. Unlike `sqrtm`, neither becomes complex, even for N < d. The distance is
    biased upwards by about 1/N: only compare values with equal N.

    Raises:
        ValueError: different widths, fewer than 2 samples, or moments that are not finite.
    """
    first, second = _covariances(a, b)
    try:
        factor = np.linalg.cholesky(first)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(first)
        factor = vectors * np.sqrt(np.clip(values, 0, None))
    return _distance(a, b, np.linalg.eigvalsh(factor.T @ second @ factor))


def frechet_figure(samples: FeatureRows, reference: FeatureRows) -> Figure:
    """Return the distance of two sets of features, (N, d) and (M, d), with its uncertainty.

    The influence of a picture x is 2 (m_a - m_b)(x - m_a) + (x - m_a)^T (1 - T)(x - m_a), minus the mean of this, where
    T is the linear map that transports one Gaussian to the other (from the gradient of the distance by S_a). Singular
    directions of S_a are left out of T. The interval does not include the bias of about 1/N.

    Raises:
        ValueError: as for `frechet_distance`.
    """
    a, b = Moments.of(samples), Moments.of(reference)
    first, second = _covariances(a, b)
    values, vectors = _spectrum(samples, a.mean, first)
    roots = np.sqrt(np.clip(values, 0, None))
    back = vectors * _inverse(roots, values)
    root = vectors * roots
    cross, axes = np.linalg.eigh(root.T @ second @ root)
    cross = np.clip(cross, 0, None)
    there, again = back @ axes, root @ axes
    there = (there * np.sqrt(cross)) @ there.T
    again = (again * _inverse(np.sqrt(cross), cross)) @ again.T
    shift = a.mean - b.mean
    return Figure(
        _distance(a, b, cross),
        _influences(samples, a, shift, there),
        _influences(reference, b, -shift, again),
        least=0.0,
    )


def _spectrum(features: FeatureRows, mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues (r,) of the covariance in ascending order, and its eigenvectors (d, r).

    With N <= d samples at most N eigenvalues are not zero, and only these are computed, from the Gram matrix: with
    d = 2048 and a few hundred pictures this takes milliseconds instead of seconds.
    """
    count, width = features.shape
    if count > width:
        values, vectors = np.linalg.eigh(covariance)
        return values, vectors
    centred = np.concatenate([block for _, block in blocks(features)]) - mean
    values, rows = np.linalg.eigh(centred @ centred.T / (count - 1))
    return values, centred.T @ (rows * _inverse(np.sqrt(np.clip(values, 0, None) * (count - 1)), values))


def _inverse(roots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return 1 / roots, and 0 for eigenvalues (`values`, ascending) that are only rounding error."""
    solid = values > SINGULAR * max(float(values[-1]), 1e-300)
    return np.where(solid, 1 / np.where(solid, roots, 1), 0)


def _influences(features: FeatureRows, moments: Moments, shift: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """Return the influences (N,), with mean 0."""
    values = np.zeros(len(features))
    for where, block in blocks(features):
        x = block - moments.mean
        values[where] = 2 * (x @ shift) + np.square(x).sum(axis=1) - ((x @ carried) * x).sum(axis=1)
    return np.asarray(values - values.mean())


def _covariances(a: Moments, b: Moments) -> tuple[np.ndarray, np.ndarray]:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of different width: {a.mean.shape[0]} and {b.mean.shape[0]}")
    first, second = a.covariance, b.covariance
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("the features are not finite")
    return first, second


def _distance(a: Moments, b: Moments, cross: np.ndarray) -> float:
    """Return the distance from the eigenvalues of the product of the covariances."""
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    shift = a.mean - b.mean
    distance = float(shift @ shift) + traces - 2 * float(np.sqrt(np.clip(cross, 0, None)).sum())
    if distance < SMALLEST * max(traces, 1.0):
        raise ValueError(f"a Frechet distance of {distance} is below rounding error")
    return max(distance, 0.0)
