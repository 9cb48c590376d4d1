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

from training.evaluation.metrics.student import student_cdf, student_quantile

Z, POWER_Z = 1.959963984540054, 0.8416212335729143
"""Standard normal quantiles of a two-sided 95 % interval, and of 80 % power: together, the multiple of the standard
error that a 5 % test detects four times in five."""
MARGIN = 1.1
"""Factor for standard errors from halves: balls among half as many pictures are larger, so that paired pictures differ
less there. Without it, they are 0.82 to 1.25 times the true ones (simulated)."""
MANY = 1000
"""Number of degrees of freedom from which on Student's quantiles are those of the normal distribution, within 0.2 %."""


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
    outcomes: np.ndarray = field(default_factory=_none)
    """Of a share, the fraction of pictures that count: 1 for these and 0 for others; of the difference of two shares,
    1, 0 or -1; otherwise empty. A share has Wilson's interval, which is also valid at 0 and 1, a difference Bonett and
    Price's."""
    halves: np.ndarray = field(default_factory=_none)
    """float64 (D, 2): the value on each half of D random divisions of all pictures, samples and reference; empty if the
    influences say how uncertain it is. The jackknife counts a dependence of second order twice, of third order three
    times and so on (Efron & Stein 1981), and nearest neighbours depend on each other in all orders. Halves are
    independent, and have the variance of the whole times 2 in all of them."""
    of: str = "samples"
    """Whether the value is a mean over `samples` or over `reference` pictures."""
    is_difference: bool = False
    """See `minus`."""
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
        made = cls(value, outcomes=x if is_share else _none(), of=of)
        return replace(made, samples=x - value) if of == "samples" else replace(made, reference=x - value)

    @property
    def n(self) -> int:
        """Number of samples, or of reference pictures if the value is a mean over these."""
        return len(getattr(self, self.of))

    @property
    def is_share(self) -> bool:
        """Whether it is a fraction of pictures, or the difference of two."""
        return len(self.outcomes) > 0

    def standard_error(self, prompts: np.ndarray | None = None) -> float:
        """Return the standard error of the value.

        Args:
            prompts: int (N,): the prompt of each sample, by number; None: every sample has its own.
        """
        if len(self.halves):
            return MARGIN * math.sqrt(float(np.square(self.halves[:, 0] - self.halves[:, 1]).mean())) / 2
        total = variance(self.samples, prompts) + variance(self.reference)
        return math.sqrt(max(total - self.twice, self.twice))

    def interval(self, prompts: np.ndarray | None = None) -> tuple[float, float]:
        """Return the 95 % confidence interval; `prompts` as for `standard_error`.

        Of means it is Student's, with as many degrees of freedom as the fewer of prompts and reference pictures allow.
        A share has the interval of as many independent pictures as would give its standard error.
        """
        error, wide = self.standard_error(prompts), self._quantile(0.975, prompts)
        if not self.is_share:
            return max(self.least, self.value - wide * error), self.value + wide * error
        more, fewer = float((self.outcomes > 0).mean()), float((self.outcomes < 0).mean())
        spread = more + fewer - self.value**2 if self.is_difference else self.value * (1 - self.value)
        count: float = self._groups(prompts, self.of)
        if spread > 0 and error:
            count = spread / error**2
        return bonett_price(more, fewer, count) if self.is_difference else wilson(self.value, count)

    def _groups(self, prompts: np.ndarray | None, of: str) -> int:
        """Return the number of independent pictures among the samples or the reference."""
        return len(getattr(self, of)) if prompts is None or of != "samples" else len(np.unique(prompts))

    def _freedom(self, prompts: np.ndarray | None) -> int:
        """Return the degrees of freedom of Student's distribution."""
        sides = [self._groups(prompts, of) for of in ("samples", "reference") if len(getattr(self, of))]
        return min(sides, default=MANY + 1) - 1

    def _quantile(self, share: float, prompts: np.ndarray | None) -> float:
        """Return the quantile of Student's distribution for this figure; infinite if a single prompt leaves it
        unknown."""
        freedom = self._freedom(prompts)
        if freedom < 1:
            return math.inf
        return student_quantile(share, freedom) if freedom < MANY else {0.975: Z, 0.8: POWER_Z}[share]

    def chance(self, prompts: np.ndarray | None = None) -> float:
        """Return the probability of a value this far from 0, on either side, if the truth is 0 (below 0.05 where the
        interval excludes 0)."""
        low, high = self.interval(prompts)
        if not math.isfinite(low) or low == high:
            return 1.0 if low <= 0 <= high or not math.isfinite(low) else 0.0
        distance = abs(low + high) / (high - low)
        freedom = self._freedom(prompts)
        if self.is_share or freedom >= MANY:
            return math.erfc(distance * Z / math.sqrt(2))
        return 2 * (1 - student_cdf(distance * self._quantile(0.975, prompts), freedom))

    def plus_minus(self) -> float:
        """Return half the width of the 95 % interval, before `least` bounds it."""
        low, high = replace(self, least=-math.inf).interval()
        return (high - low) / 2

    def as_dict(self, prompts: np.ndarray | None = None) -> dict[str, Any]:
        """Return the entry for result.json: value, interval, n, and `detectable`, the smallest difference between two
        checkpoints that this many samples reveal (independent noise, 80 % power; with the same noise, `compare` detects
        smaller ones); of a difference, the smallest that it would reveal."""
        low, high = self.interval(prompts)
        by_samples = len(self.samples) and not self.is_share and not len(self.halves)
        wide = self._quantile(0.975, prompts)
        error = math.sqrt(variance(self.samples, prompts)) if by_samples else (high - low) / (2 * wide)
        sides = 1 if self.is_difference else math.sqrt(2)
        return {
            "value": self.value,
            "interval": [low, high],
            "n": self.n,
            "detectable": (wide + self._quantile(0.8, prompts)) * sides * error,
        }

    def minus(self, other: Figure) -> Figure:
        """Return the difference of two figures with the same prompts, noise and reference, paired by picture.

        Raises:
            ValueError: the numbers of pictures differ.
        """
        for name in ("samples", "reference", "halves"):
            mine, theirs = len(getattr(self, name)), len(getattr(other, name))
            if mine != theirs:
                raise ValueError(f"{mine} and {theirs} pictures among the {name}")
        return Figure(
            self.value - other.value,
            self.samples - other.samples,
            self.reference - other.reference,
            outcomes=self.outcomes - other.outcomes if self.is_share and other.is_share else _none(),
            halves=self.halves - other.halves,
            of=self.of,
            is_difference=True,
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


def bonett_price(more: float, fewer: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two fractions of the same `count` pictures (Bonett & Price 2012):
    Wald's, after adding one picture to those that are right in the first only, and one to those in the second only."""
    a, b = (more * count + 1) / (count + 2), (fewer * count + 1) / (count + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (count + 2))
    return max(-1.0, a - b - half), min(1.0, a - b + half)
