"""A measured value with the contribution of each picture, for confidence intervals and paired differences.

Every metric here is, to first order, a mean over pictures: value = theta + mean of the samples' influences + mean of
the reference pictures' influences (Hampel 1974; the infinitesimal jackknife of Efron & Stein 1981). So one pass gives
the standard error that a bootstrap over pictures converges to, without resampling. Pictures of one prompt are not
independent, so their influences are summed before computing the variance. For two checkpoints that drew the same
prompts from the same noise, influences are subtracted picture by picture, which removes what they have in common.

Shapes: N samples, M reference pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""
POWER_Z = Z + 0.8416212335729143
"""Multiple of the standard error that a 5 % test detects four times in five."""


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class Figure:
    """One value with the sources of its uncertainty."""

    value: float
    samples: np.ndarray = field(default_factory=_none)
    """float64 (N,): influence of each sample, with mean 0; empty if the value does not depend on samples."""
    reference: np.ndarray = field(default_factory=_none)
    """float64 (M,): influence of each reference picture, with mean 0; empty if the value does not depend on them."""
    twice: float = 0.0
    """Variance that the influences count twice: the second-order part of a U-statistic, which appears in both pictures
    of a pair. Between equal distributions it is the only part."""
    is_share: bool = False
    """A fraction of pictures, 0 to 1, with Wilson's interval, which is also valid at 0 and 1."""
    least: float = -math.inf
    """Lower bound of the value and of its interval."""

    @classmethod
    def mean(cls, values: np.ndarray, of: str = "samples", is_share: bool = False) -> Figure:
        """Return the mean of one value per picture, (N,).

        Args:
            of: whether the pictures are the `samples` or the `reference`.
        """
        x = np.asarray(values, dtype=np.float64)
        value = float(x.mean())
        made = cls(value, is_share=is_share)
        return replace(made, samples=x - value) if of == "samples" else replace(made, reference=x - value)

    @property
    def n(self) -> int:
        """Number of samples, or of reference pictures if the value only depends on these."""
        return len(self.samples) or len(self.reference)

    def standard_error(self, prompts: np.ndarray | None = None) -> float:
        """Return the standard error of the value.

        Args:
            prompts: int (N,): the prompt of each sample, by number; None: every sample has its own.
        """
        total = variance(self.samples, prompts) + variance(self.reference)
        return math.sqrt(max(total - self.twice, self.twice))

    def interval(self, prompts: np.ndarray | None = None) -> tuple[float, float]:
        """Return the 95 % confidence interval; `prompts` as for `standard_error`."""
        error = self.standard_error(prompts)
        if not self.is_share:
            return max(self.least, self.value - Z * error), self.value + Z * error
        spread = self.value * (1 - self.value)
        clusters = self.n if prompts is None or not len(self.samples) else len(np.unique(prompts))
        return wilson(self.value, spread / error**2 if error else clusters)

    def plus_minus(self) -> float:
        """Return half the width of the 95 % interval, before `least` bounds it."""
        low, high = replace(self, least=-math.inf).interval()
        return (high - low) / 2

    def as_dict(self, prompts: np.ndarray | None = None) -> dict[str, Any]:
        """Return the entry for result.json: value, interval, n, and `detectable`, the smallest difference between two
        checkpoints that this many samples reveal (independent noise, 80 % power; with the same noise, `compare` detects
        smaller ones)."""
        low, high = self.interval(prompts)
        by_samples = len(self.samples) and not self.is_share
        error = math.sqrt(variance(self.samples, prompts)) if by_samples else (high - low) / (2 * Z)
        return {
            "value": self.value,
            "interval": [low, high],
            "n": self.n,
            "detectable": POWER_Z * math.sqrt(2) * error,
        }

    def minus(self, other: Figure) -> Figure:
        """Return the difference of two figures with the same prompts, noise and reference, paired by picture.

        Raises:
            ValueError: the numbers of pictures differ.
        """
        for name in ("samples", "reference"):
            mine, theirs = len(getattr(self, name)), len(getattr(other, name))
            if mine != theirs:
                raise ValueError(f"{mine} and {theirs} pictures among the {name}")
        return Figure(
            self.value - other.value,
            self.samples - other.samples,
            self.reference - other.reference,
        )


def variance(influences: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Return the variance of the mean of influences (N,), after summing those of each group; 0 for fewer than two
    groups."""
    total = len(influences)
    if groups is not None and total:
        influences = np.bincount(np.unique(groups, return_inverse=True)[1], weights=influences)
    count = len(influences)
    if count < 2:
        return 0.0
    return float(np.square(influences - influences.mean()).sum()) * count / (count - 1) / total**2


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a fraction of `count` independent trials (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (
        0.0 if share <= 0 else centre - half,
        1.0 if share >= 1 else centre + half,
    )  # the formula gives the same, except for rounding
