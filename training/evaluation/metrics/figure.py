"""A measured value with what each picture contributed to it: confidence intervals, and paired differences.

Every metric here is, to first order, a mean over pictures: value = theta + mean of the samples' influences + mean of
the reference pictures' influences (Hampel 1974; the infinitesimal jackknife of Efron & Stein 1981). So one pass gives
the standard error that a bootstrap over pictures converges to, without resampling. Pictures of one prompt depend on
each other: their influences are added up before the variance is taken. Of two checkpoints that drew the same prompts
from the same noise, the influences are subtracted picture by picture, which removes what the prompts have in common.

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
"""Times the standard error: the difference that a 5 % test finds four times in five."""


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class Figure:
    """One value and where its uncertainty comes from."""

    value: float
    samples: np.ndarray = field(default_factory=_none)
    """float64 (N,): influence of each sample, of mean 0; empty where samples play no part."""
    reference: np.ndarray = field(default_factory=_none)
    """float64 (M,): influence of each reference picture, of mean 0; empty where they play no part."""
    twice: float = 0.0
    """Variance that the influences count twice: the second-order part of a U-statistic, which both pictures of a pair
    carry. Between equal distributions it is all there is."""
    is_share: bool = False
    """A share of pictures, 0 to 1: its interval is Wilson's, which is right at 0 and 1 too."""
    least: float = -math.inf
    """What the value cannot be below, nor its interval."""

    @classmethod
    def mean(cls, values: np.ndarray, of: str = "samples", is_share: bool = False) -> Figure:
        """The mean of one value per picture, (N,).

        Args:
            of: `samples` or `reference`: whose pictures they are.
        """
        x = np.asarray(values, dtype=np.float64)
        value = float(x.mean())
        made = cls(value, is_share=is_share)
        return replace(made, samples=x - value) if of == "samples" else replace(made, reference=x - value)

    @property
    def n(self) -> int:
        """Pictures that the value is made of: the samples, or the reference where only that counts."""
        return len(self.samples) or len(self.reference)

    def standard_error(self, prompts: np.ndarray | None = None) -> float:
        """Of the value.

        Args:
            prompts: int (N,): which prompt each sample belongs to; None: every sample has its own.
        """
        total = variance(self.samples, prompts) + variance(self.reference)
        return math.sqrt(max(total - self.twice, self.twice))

    def interval(self, prompts: np.ndarray | None = None) -> tuple[float, float]:
        """The 95 % confidence interval."""
        error = self.standard_error(prompts)
        if not self.is_share:
            return max(self.least, self.value - Z * error), self.value + Z * error
        spread = self.value * (1 - self.value)
        clusters = self.n if prompts is None or not len(self.samples) else len(np.unique(prompts))
        return wilson(self.value, spread / error**2 if error else clusters)

    def plus_minus(self) -> float:
        """Half the width of the 95 % interval, before `least` cuts it."""
        low, high = replace(self, least=-math.inf).interval()
        return (high - low) / 2

    def as_dict(self, prompts: np.ndarray | None = None) -> dict[str, Any]:
        """What stands in result.json: value, interval, n, and `detectable`: the smallest difference between two
        checkpoints that this many samples show (independent noise, 80 % power; with the same noise `compare` sees
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
        """The difference of two figures of the same prompts, noise and reference, picture by picture.

        Raises:
            ValueError: other numbers of pictures.
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
    """Of the mean of (N,) influences, those of one group added up before; 0 where there are fewer than two groups."""
    total = len(influences)
    if groups is not None and total:
        influences = np.bincount(np.unique(groups, return_inverse=True)[1], weights=influences)
    count = len(influences)
    if count < 2:
        return 0.0
    return float(np.square(influences - influences.mean()).sum()) * count / (count - 1) / total**2


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (
        0.0 if share <= 0 else centre - half,
        1.0 if share >= 1 else centre + half,
    )  # as the formula, but for rounding
