"""The Frechet distance against closed forms and scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from training.evaluation.metrics.frechet import Moments, frechet_distance, frechet_figure


def moments(mean: np.ndarray, covariance: np.ndarray, count: int = 1001) -> Moments:
    return Moments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def by_sqrtm(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root))


def features(count: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def test_diagonal_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    s, t, mean = rng.uniform(0.1, 3, 64), rng.uniform(0.1, 3, 64), rng.normal(size=64)
    expected = mean @ mean + np.square(np.sqrt(s) - np.sqrt(t)).sum()
    assert frechet_distance(moments(mean, np.diag(s)), moments(0 * mean, np.diag(t))) == pytest.approx(
        expected, rel=1e-12
    )


def test_rotation_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    s, t = rng.uniform(0.1, 3, 32), rng.uniform(0.1, 3, 32)
    expected = np.square(np.sqrt(s) - np.sqrt(t)).sum()
    turned = [moments(np.zeros(32), turn @ np.diag(v) @ turn.T) for v in (s, t)]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-10)


def test_equal_moments_are_at_distance_zero_and_a_shift_at_its_square() -> None:
    a = Moments.of(features(500, 20, 0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shifted = Moments(a.count, a.mean + 0.5, a.scatter)
    assert frechet_distance(a, shifted) == pytest.approx(20 * 0.25, rel=1e-9)


def test_agrees_with_scipy_and_is_symmetric() -> None:
    a, b = Moments.of(features(300, 40, 2)), Moments.of(features(400, 40, 3))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_fewer_samples_than_features_neither_fail_nor_turn_complex() -> None:
    a = Moments.of(features(20, 64, 4))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(a, Moments.of(features(20, 64, 5))) > 1


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_merging_parts_equals_one_pass(parts: int) -> None:
    x = features(101, 16, 6).astype(np.float32)
    whole = Moments.of(x)
    merged = None
    for part in np.array_split(x, parts):
        merged = Moments.of(part) if merged is None else merged.merged(Moments.of(part))
    assert merged is not None and merged.count == 101
    assert np.allclose(merged.mean, whole.mean, atol=1e-12)
    assert np.allclose(merged.covariance, whole.covariance, atol=1e-10)


def test_impossible_inputs_are_refused() -> None:
    good = Moments.of(features(10, 4, 0))
    with pytest.raises(ValueError, match="different width: 4 and 5"):
        frechet_distance(good, Moments.of(features(10, 5, 0)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(good, Moments.of(features(1, 4, 0)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, Moments(10, good.mean, good.scatter * np.nan))


def test_an_influence_is_the_change_when_a_picture_is_left_out() -> None:
    x, y = features(400, 5, 7), features(500, 5, 8)
    figure = frechet_figure(x, y)
    assert figure.value == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9)
    for side, influences in ((0, figure.samples), (1, figure.reference)):
        for place in (0, 17):
            sets = [x, y]
            sets[side] = np.delete(sets[side], place, axis=0)
            change = figure.value - frechet_distance(*(Moments.of(s) for s in sets))
            assert influences[place] / len((x, y)[side]) == pytest.approx(change, rel=0.05, abs=2e-4 * figure.value)


def test_the_interval_is_as_wide_as_repeated_draws_spread() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(8, 8))
    figures = [
        frechet_figure(rng.normal(size=(300, 8)) @ mix, rng.normal(size=(300, 8)) @ mix * 1.2 + 0.5) for _ in range(60)
    ]
    spread = np.std([figure.value for figure in figures], ddof=1)
    assert np.mean([figure.standard_error() for figure in figures]) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("counts", [(20, 20), (20, 90), (90, 20)])
def test_few_samples_give_the_result_of_the_full_covariance(counts: tuple[int, int]) -> None:
    x, y = features(counts[0], 64, 4), features(counts[1], 64, 5)
    figure = frechet_figure(x, y)
    a, b = Moments.of(x), Moments.of(y)
    assert figure.value == pytest.approx(frechet_distance(a, b), rel=1e-6)
    root = scipy.linalg.sqrtm(a.covariance).real
    back = np.linalg.pinv(root, rtol=1e-5)
    cross = scipy.linalg.sqrtm(root @ b.covariance @ root).real
    carried = back @ cross @ back  # from the Gaussian of the samples to that of the reference
    centred = x - a.mean
    expected = 2 * centred @ (a.mean - b.mean) + ((centred @ (np.eye(64) - carried)) * centred).sum(axis=1)
    assert figure.samples == pytest.approx(expected - expected.mean(), rel=1e-4, abs=1e-4 * np.abs(expected).max())


def test_a_singular_covariance_has_finite_influences() -> None:
    figure = frechet_figure(features(20, 64, 4), features(20, 64, 5))
    assert np.isfinite(figure.samples).all() and np.isfinite(figure.reference).all() and figure.value > 1
    constant = frechet_figure(np.ones((5, 3)), features(20, 3, 5))
    assert np.isfinite(constant.samples).all()
