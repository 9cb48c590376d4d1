"""Statistics of paired runs: the mean gain, Student's interval, and the seeds needed to detect a smaller effect.

A *difference* is between two runs with the same seed, and so with the same data, order, initial weights and noise.
Differences of different seeds are independent; the held-out samples are the same for all, and add no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.evaluation.metrics.student import student_quantile

CONFIDENCE, POWER = 0.975, 0.8
"""Quantile of a two-sided 95 % interval; probability of detecting an effect of the `detectable` size."""
MOST_SEEDS = 10_000
"""Upper limit of the search for enough seeds."""


def standard_errors_seen(seeds: int) -> float:
    """Return the smallest effect, in standard errors of its mean over `seeds`, whose interval excludes 0 with a
    probability of about POWER: t_0.975 + t_0.8 with seeds - 1 degrees of freedom."""
    return student_quantile(CONFIDENCE, seeds - 1) + student_quantile(POWER, seeds - 1)


@dataclass(frozen=True)
class Gain:
    """Mean and uncertainty of paired differences over `seeds`."""

    mean: float
    half: float
    """Half the width of the 95 % interval."""
    detectable: float
    """The smallest effect that this many seeds would detect about four times in five."""
    seeds: int
    seeds_for_half: int
    """Seeds needed to detect half of `detectable`, if their differences scatter as these do."""

    @property
    def is_seen(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half


def gain(differences: Sequence[float]) -> Gain:
    """Return the mean of several seeds' differences with its interval.

    Raises:
        ValueError: fewer than two differences; one gives no interval.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"{n} paired difference: an interval needs at least two")
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (n - 1))
    error = spread / math.sqrt(n)
    detectable = standard_errors_seen(n) * error
    return Gain(mean, student_quantile(CONFIDENCE, n - 1) * error, detectable, n, seeds_for_half(n))


def seeds_for_half(seeds: int) -> int:
    """Return the number of seeds needed to detect half of what `seeds` detect: about four times as many, or fewer if
    `seeds` is small (with three, half of the uncertainty is about the spread itself). At most MOST_SEEDS."""
    wanted = standard_errors_seen(seeds) / math.sqrt(seeds) / 2
    more = seeds + 1
    while more < MOST_SEEDS and standard_errors_seen(more) / math.sqrt(more) > wanted:
        more += 1
    return more


def verdict(found: Gain, lower_is_better: bool = True) -> str:
    """Return `helps`, `hurts`, or `undecided` if the interval includes 0."""
    if not found.is_seen:
        return "undecided"
    return "helps" if (found.mean < 0) == lower_is_better else "hurts"


def percent(logarithm: float) -> float:
    """Convert a difference of natural logarithms to a change in per cent."""
    return 100 * math.expm1(logarithm)
