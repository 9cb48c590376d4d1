"""Frechet distance between two sets of features, from mergeable float64 moments; no model and no pictures here.

Shapes: N samples, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = -1e-3
"""Rounding may take a distance of zero this far below it, relative to the traces; anything lower is an error."""


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and scatter (d, d) = sum of (x - mean)(x - mean)^T of a set of features, in float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of features (N, d), N >= 1, any dtype."""
        x = np.asarray(features, dtype=np.float64)
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Of the two sets together (Chan et al. 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), with divisor N - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    The root of the symmetric product by two `eigh` calls: unlike `sqrtm` it never turns complex, also for N < d.
    Biased upwards by about 1/N: compare only values of equal N.

    Raises:
        ValueError: different widths, fewer than 2 samples, or moments that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of different width: {a.mean.shape[0]} and {b.mean.shape[0]}")
    first, second = a.covariance, b.covariance
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("the features are not finite")
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root)
    traces = float(np.trace(first) + np.trace(second))
    shift = a.mean - b.mean
    distance = float(shift @ shift) + traces - 2 * float(np.sqrt(np.clip(cross, 0, None)).sum())
    if distance < SMALLEST * max(traces, 1.0):
        raise ValueError(f"a Frechet distance of {distance} is below rounding error")
    return max(distance, 0.0)
