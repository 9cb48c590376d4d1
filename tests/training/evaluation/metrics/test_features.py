from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.content.synthetic import example
from training.evaluation.metrics.features import EXTRACTORS, colour_grid, diversity, random_filters
from training.evaluation.metrics.frechet import Moments, frechet_distance


def drawings(count: int, seed: int) -> np.ndarray:
    return np.stack([example(i, 32, seed)[0] for i in range(count)])


def test_colour_grid_is_the_mean_of_each_cell() -> None:
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    picture[0, :4, 4:8, 1] = 255
    grid = colour_grid(picture).reshape(3, 4, 4)
    assert grid[1, 0, 1] == 1 and grid.sum() == 1


def test_random_filters_see_edges_but_not_flat_colour() -> None:
    flat = np.full((1, 16, 16, 3), 200, np.uint8)
    edge = flat.copy()
    edge[:, :, 8:] = 0
    assert np.abs(random_filters(flat)).max() < 1e-5
    assert random_filters(edge).mean() > 0.01
    assert random_filters(edge).shape == (1, 64)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_are_fixed_and_order_degradations(name: str) -> None:
    extract = EXTRACTORS[name]
    real, other = drawings(96, 0), drawings(96, 1)
    noisy = np.clip(real + np.random.default_rng(0).normal(0, 40, real.shape), 0, 255).astype(np.uint8)
    assert np.array_equal(extract(real[:5]), extract(real[:5].copy()))
    assert np.allclose(extract(real)[:5], extract(real[:5]))
    base = Moments.of(extract(real))
    near, far = (frechet_distance(base, Moments.of(extract(x))) for x in (other, 255 - noisy))
    assert frechet_distance(base, base) == pytest.approx(0, abs=1e-6)
    assert 0 < near < far


def test_diversity_is_the_mean_pairwise_distance() -> None:
    assert diversity(np.array([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)
    assert diversity(np.zeros((1, 4))) == 0 and diversity(np.ones((4, 4))) == 0
