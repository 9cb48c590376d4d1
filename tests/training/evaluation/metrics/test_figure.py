"""Intervals contain the true value as often as they claim; pairing reveals what two separate intervals cannot."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.metrics.figure import Figure, variance, wilson


def test_a_mean_has_the_textbook_error_and_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values = rng.exponential(1.0, 200)
        figure = Figure.mean(values)
        low, high = figure.interval()
        hits += low < 1 < high
    assert figure.standard_error() == pytest.approx(values.std(ddof=1) / 200**0.5)
    assert 0.91 < hits / 400 < 0.98
    assert figure.as_dict()["n"] == 200


@pytest.mark.parametrize("count", [2, 3, 5, 10, 30])
def test_a_mean_of_few_covers_the_truth(count: int) -> None:
    """With the normal distribution's 1.96 instead of Student's quantile, 2 values would cover it in 70 % of cases."""
    rng = np.random.default_rng(count)
    intervals = [Figure.mean(values).interval() for values in rng.normal(size=(1000, count))]
    assert 0.93 < np.mean([low < 0 < high for low, high in intervals]) < 0.97


@pytest.mark.parametrize("count", [2, 5, 20, 100])
@pytest.mark.parametrize(("better", "worse"), [(0.02, 0.02), (0.1, 0.1), (0.05, 0.0), (0.3, 0.1), (0.9, 0.0)])
def test_a_difference_of_shares_covers_the_truth(count: int, better: float, worse: float) -> None:
    rng = np.random.default_rng(count)
    hits = []
    for _ in range(500):
        chance, both = rng.random(count), rng.random(count) < 0.5
        a = np.where(chance < better, True, both & (chance >= better + worse))
        b = np.where(chance < better, False, both | (chance < better + worse))
        low, high = Figure.mean(a, is_share=True).minus(Figure.mean(b, is_share=True)).interval()
        hits.append(low <= better - worse <= high)
        assert low < high, "not certain, although all pictures agree"
    assert np.mean(hits) > 0.92


def test_two_right_pictures_do_not_decide() -> None:
    right, wrong = Figure.mean(np.ones(2), is_share=True), Figure.mean(np.zeros(2), is_share=True)
    low, high = right.minus(wrong).interval()
    assert low < 0 < high == 1.0


def test_pictures_of_one_prompt_count_as_one() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(50), 8)
    figure = Figure.mean(rng.normal(size=50)[prompts])
    alone = Figure.mean(figure.samples[::8] + figure.value)
    assert figure.standard_error(prompts) == pytest.approx(alone.standard_error())
    assert figure.standard_error() < figure.standard_error(prompts) / 2
    assert variance(np.ones(3), np.zeros(3)) == 0  # one prompt says nothing about the spread of prompts


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 0.9615, 1.0), (0.0, 0.0, 0.0385), (0.5, 0.4015, 0.5985)])
def test_a_share_has_wilsons_interval(share: float, low: float, high: float) -> None:
    right = np.arange(96) < share * 96
    assert Figure.mean(right, is_share=True).interval() == pytest.approx((low, high), abs=1e-3)
    assert wilson(share, 96) == pytest.approx((low, high), abs=1e-3)


def test_pairing_removes_what_the_prompts_have_in_common() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 1, 300)
    a, b = Figure.mean(hard + 0.05 + rng.normal(0, 0.1, 300)), Figure.mean(hard + rng.normal(0, 0.1, 300))
    difference = a.minus(b)
    low, high = difference.interval()
    assert 0 < low < difference.value < high < 0.1
    assert a.interval()[0] < b.value  # separately they cannot be told apart
    assert a.as_dict()["detectable"] > 4 * difference.as_dict()["detectable"]
    with pytest.raises(ValueError, match="300 and 10 pictures among the samples"):
        a.minus(Figure.mean(np.zeros(10)))
