"""Kernel discrepancies against double loops; their intervals against repeated draws."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from training.evaluation.metrics import rows
from training.evaluation.metrics.frechet import frechet_figure
from training.evaluation.metrics.kernels import cmmd, cubic, discrepancy, gaussian, kid


def clouds(n: int, m: int, seed: int = 0, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6)) + shift, rng.normal(size=(m, 6))


def test_kid_is_the_double_loop_over_distinct_pairs(monkeypatch) -> None:
    monkeypatch.setattr(rows, "BLOCK", 7)
    x, y = clouds(20, 15)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / 6 + 1) ** 3

    among_x = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    among_y = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    across = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y).value == pytest.approx(among_x + among_y - 2 * across, rel=1e-12)
    assert kid(x, y).n == 20


def test_cmmd_is_the_double_loop_over_all_pairs_of_normalised_rows() -> None:
    x, y = clouds(20, 12)
    unit_x, unit_y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([math.exp(-float(np.square(p - q).sum()) / 200) for p in a for q in b]))

    expected = 1000 * (mean(unit_x, unit_x) + mean(unit_y, unit_y) - 2 * mean(unit_x, unit_y))
    assert cmmd(x, y).value == pytest.approx(expected, rel=1e-9)
    assert cmmd(5 * x, y).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kid_is_unbiased_and_its_interval_covers_the_truth(shift: float) -> None:
    """With shift 0 all influences vanish to first order: only the second-order part is left."""
    truth = kid(*clouds(4000, 4000, 99, shift)).value if shift else 0.0
    figures = [kid(*clouds(60, 80, seed, shift)) for seed in range(200)]
    values = np.array([figure.value for figure in figures])
    assert abs(values.mean() - truth) < 4 * values.std() / 200**0.5 + 0.01 * truth
    assert np.mean([f.standard_error() for f in figures]) == pytest.approx(values.std(), rel=0.25)
    covered = np.mean([low < truth < high for low, high in (f.interval() for f in figures)])
    assert 0.88 < covered <= 1.0


def test_incomparable_features_are_refused() -> None:
    x, y = clouds(5, 5)
    with pytest.raises(ValueError, match="different width: 6 and 5"):
        kid(x, y[:, :5])
    with pytest.raises(ValueError, match="at least 2 rows"):
        kid(x[:1], y)
    with pytest.raises(ValueError, match="not finite"):
        discrepancy(x * np.nan, y, gaussian(1.0))
    assert kid(x, x).value < 0 and cubic(x, y).shape == (5, 5)


def test_intervals_of_what_cannot_be_negative_begin_at_0() -> None:
    x, y = clouds(20, 20)
    assert [figure.least for figure in (kid(x, y), cmmd(x, y), frechet_figure(x, y))] == [-math.inf, 0, 0]
    wide = replace(cmmd(x, y), value=0.001)
    low, high = wide.interval()
    assert low == 0 and wide.plus_minus() == pytest.approx(high - wide.value) and wide.minus(wide).interval() == (0, 0)
