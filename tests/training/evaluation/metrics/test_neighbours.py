"""Precision, recall, density and coverage on clouds whose answers are known, and against double loops; copies."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.metrics import rows
from training.evaluation.metrics.neighbours import COPY, closeness, fidelity_and_variety, nearest


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


def test_influences_are_what_leaving_out_a_picture_changes(monkeypatch) -> None:
    """(N - 1) times the change, less its mean."""
    monkeypatch.setattr(rows, "BLOCK", 7)
    for spread in (0.5, 1.0, 2.0):
        x, y = cloud(24, 0) * spread, cloud(19, 1)
        x[3] = x[9]
        found = fidelity_and_variety(x, y)
        less_x = [fidelity_and_variety(np.delete(x, i, axis=0), y) for i in range(len(x))]
        less_y = [fidelity_and_variety(x, np.delete(y, j, axis=0)) for j in range(len(y))]
        for name, figure in found.items():
            for influences, less in ((figure.samples, less_x), (figure.reference, less_y)):
                changes = np.array([(len(less) - 1) * (figure.value - one[name].value) for one in less])
                assert influences == pytest.approx(changes - changes.mean(), abs=1e-9), (name, spread)


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
