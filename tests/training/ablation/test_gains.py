"""The arithmetic of paired runs, against tables, SciPy, and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.ablation.gains import (
    gain,
    percent,
    seeds_for_half,
    standard_errors_seen,
    verdict,
)


def test_a_gain_by_hand() -> None:
    """Differences -0.1, -0.2, -0.3: mean -0.2, standard deviation 0.1, standard error 0.1 / sqrt(3)."""
    found = gain([-0.1, -0.2, -0.3])
    error = 0.1 / math.sqrt(3)
    assert found.mean == pytest.approx(-0.2) and found.seeds == 3
    assert found.half == pytest.approx(4.30265 * error, rel=1e-5)
    assert found.detectable == pytest.approx((4.30265 + 1.06066) * error, rel=1e-5)
    assert verdict(found) == "undecided", "the interval is -0.448 to 0.048"
    assert verdict(gain([-0.1, -0.11, -0.12])) == "helps" and verdict(gain([0.1, 0.11, 0.12])) == "hurts"
    assert verdict(gain([0.1, 0.11, 0.12]), lower_is_better=False) == "helps"
    assert percent(math.log(0.9)) == pytest.approx(-10)
    with pytest.raises(ValueError, match="at least two"):
        gain([1.0])


def test_the_cost_of_half() -> None:
    for seeds in (2, 3, 5, 20):
        more, half = seeds_for_half(seeds), standard_errors_seen(seeds) / math.sqrt(seeds) / 2
        assert standard_errors_seen(more) / math.sqrt(more) <= half
        assert standard_errors_seen(more - 1) / math.sqrt(more - 1) > half
    assert seeds_for_half(3) == 6 and seeds_for_half(40) == 155


def test_a_detectable_gain_is_seen_four_times_in_five() -> None:
    """5 seeds of unit spread whose true difference is the smallest that 5 seeds detect; the rule is an
    approximation."""
    effect = standard_errors_seen(5) / math.sqrt(5)
    draws = np.random.default_rng(0).normal(effect, 1, (2000, 5))
    assert 0.75 < np.mean([gain(list(row)).is_seen for row in draws]) < 0.9
    nothing = np.random.default_rng(1).normal(0, 1, (2000, 5))
    assert 0.03 < np.mean([gain(list(row)).is_seen for row in nothing]) < 0.07
