"""Student's distribution against SciPy."""

from __future__ import annotations

import pytest

from training.evaluation.metrics.student import student_cdf, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 101])
def test_students_distribution(freedom: int) -> None:
    from scipy import stats  # here, not for every process that collects the tests

    for t in (0.0, 0.3, 1.0, 2.5, 40.0):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for share in (0.5, 0.8, 0.975, 0.999):
        assert student_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9, abs=1e-9)
