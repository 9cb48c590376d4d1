"""Precision, recall, density and coverage on clouds whose answers are known, and against double loops; copies."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.metrics import rows
from training.evaluation.metrics.neighbours import (
    COPY,
    DIVISIONS,
    _sides,
    closeness,
    fidelity_and_variety,
    nearest,
)


def cloud(count: int, seed: int, width: int = 3, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) + shift


def test_disjoint_clouds_score_0_and_equal_ones_1() -> None:
    a = cloud(50, 0)
    for other, expected in ((cloud(50, 1, shift=100), 0.0), (a.copy(), 1.0)):
        found = fidelity_and_variety(a, other)
        assert [found[name].value for name in ("precision", "recall", "coverage")] == [expected] * 3
        assert found["density"].value == pytest.approx(expected, abs=0.3)


def test_samples_of_one_mode_are_precise_but_recall_half() -> None:
    reference = np.concatenate([cloud(200, 0), cloud(200, 1, shift=50)])
    found = fidelity_and_variety(cloud(200, 2), reference)
    assert found["precision"].value > 0.9 and found["recall"].value < 0.51
    assert found["recall"].n == 400 and found["precision"].interval()[1] <= 1


def test_against_double_loops(monkeypatch) -> None:
    monkeypatch.setattr(rows, "BLOCK", 7)
    x, y = cloud(30, 0), cloud(25, 1, shift=0.5)
    between = np.linalg.norm(x[:, None] - y[None], axis=-1)
    radius_x = np.sort(np.linalg.norm(x[:, None] - x[None], axis=-1), axis=1)
    radius_y = np.sort(np.linalg.norm(y[:, None] - y[None], axis=-1), axis=1)
    found = fidelity_and_variety(x, y)
    assert found["precision"].value == np.mean((between <= radius_y[:, 3]).any(axis=1))
    assert found["recall"].value == np.mean((radius_x[:, 3] >= between.T).any(axis=1))
    assert found["density"].value == pytest.approx(np.mean((between <= radius_y[:, 5]).sum(axis=1) / 5))
    assert found["coverage"].value == np.mean(between.min(axis=0) <= radius_y[:, 5])
    places, distances = nearest(x, y, 2)
    assert (places == np.argsort(between, axis=1)[:, :2]).all()
    assert distances == pytest.approx(np.sort(between, axis=1)[:, :2])


def test_halves_are_what_the_pictures_of_a_half_score_alone(monkeypatch) -> None:
    """Pictures of one prompt are in the same half."""
    monkeypatch.setattr(rows, "BLOCK", 7)
    x, y, prompts = cloud(60, 0), cloud(50, 1), np.arange(60) // 2
    x[3] = x[9]
    found = fidelity_and_variety(x, y, prompts)
    sides_x, sides_y = _sides(prompts, DIVISIONS), _sides(np.arange(50), DIVISIONS)
    assert not fidelity_and_variety(x[:9], y, np.zeros(9))["precision"].halves.size, "a single prompt"
    assert (sides_x[:, ::2] == sides_x[:, 1::2]).all() and (sides_x[1:].sum(axis=1) == 30).all()
    assert len(np.unique(sides_x, axis=0)) == 1 + DIVISIONS
    for division in range(DIVISIONS):
        for half in (0, 1):
            mine, theirs = sides_x[1 + division] == half, sides_y[1 + division] == half
            alone = fidelity_and_variety(x[mine], y[theirs])
            for name, figure in found.items():
                assert figure.halves[division, half] == pytest.approx(alone[name].value, abs=1e-12), name


def test_intervals_are_as_wide_as_the_figures_vary() -> None:
    """Between two models that draw the same prompts from the same noise, on the same reference."""
    values: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(80):
        y, common = cloud(64, seed, 4), cloud(64, 10_000 + seed, 4)
        first, second = (0.7 * (common + cloud(64, 1000 * one + seed, 4, shift=0.5)) for one in (1, 2))
        mine, theirs = fidelity_and_variety(first, y), fidelity_and_variety(second, y)
        for name in mine:
            difference = theirs[name].minus(mine[name])
            values.setdefault(name, []).append(difference.value)
            errors.setdefault(name, []).append(difference.standard_error())
    for name, found in values.items():
        ratio = np.sqrt(np.mean(np.square(errors[name])) / np.var(found))
        assert 0.75 < ratio < 1.4, (name, ratio)  # a jackknife's is 1.3 to 2


def test_a_planted_copy_is_found_and_none_is_reported_without_it() -> None:
    training, samples = cloud(400, 0, width=8), cloud(100, 1, width=8)
    found, _ = closeness(samples, training)
    assert found.min() > COPY and np.mean(found > 1) > 0.9
    samples[17] = training[42] + 1e-4
    training[7] = training[8]  # duplicates in the training data do not blind it
    found, places = closeness(samples, training)
    assert found[17] < 0.01 and places[17] == 42 and np.sort(found)[1] > COPY


def test_many_duplicates_in_the_training_data_do_not_hide_copies(monkeypatch) -> None:
    """Their distance, computed as |x|^2 + |y|^2 - 2 x y, is not exactly 0, and must not become the unit of distance."""
    monkeypatch.setattr(rows, "BLOCK", 64)
    training, samples = cloud(400, 0, width=256, shift=1), cloud(100, 1, width=256, shift=1)
    training[300:330] = training[:30]  # in the same block and in others
    samples[17] = training[42] + 1e-3
    found, places = closeness(samples, training)
    assert found[17] < 0.01 and places[17] == 42 and 0.9 < np.sort(found)[1] < 2


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 pictures: neighbour number 5 needs at least 6"):
        fidelity_and_variety(cloud(9, 0), cloud(3, 1))
    with pytest.raises(ValueError, match="not finite"):
        nearest(cloud(3, 0) * np.nan, cloud(3, 0))
