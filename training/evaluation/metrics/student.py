"""Student's distribution, for intervals of means of few values."""

from __future__ import annotations

import math
from functools import lru_cache


def student_cdf(t: float, freedom: int) -> float:
    """Return P(T <= t) of Student's distribution with `freedom` >= 1 degrees of freedom (Abramowitz & Stegun, 26.7.3
    and 26.7.4)."""
    theta = math.atan2(t, math.sqrt(freedom))
    square, odd = math.cos(theta) ** 2, freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1 + odd, 2):
        total += term
        term *= square * (k - 1) / k
    inside = math.sin(theta) * total
    return 0.5 + 0.5 * ((theta + inside) * 2 / math.pi if odd else inside)


@lru_cache(maxsize=256)
def student_quantile(share: float, freedom: int) -> float:
    """Return the t with student_cdf(t) = share, for 0.5 <= share < 1."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2
