from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.order.mixing import mixing
from data_pipeline.order.order import Order


def test_one_lane_with_a_window_of_everything_is_a_perfect_shuffle() -> None:
    found = mixing(Order(np.full(50, 40), 0, 1, 2000), 100, batches=20)
    assert found["distinct_shards"] == pytest.approx(found["perfect_distinct_shards"], rel=0.03)
    assert found["neighbour_correlation"] == pytest.approx(1, abs=0.25)


def test_without_any_mixing_neighbours_stay_together() -> None:
    found = mixing(Order(np.full(50, 40), 0, 1, 1), 100, batches=20)
    assert found["distinct_shards"] < 5
    assert found["neighbour_correlation"] > 15  # 95 of the 98 pairs of a batch, where chance brings 5


def test_as_many_lanes_as_samples_in_a_batch_keep_neighbours_apart() -> None:
    found = mixing(Order(np.full(50, 400), 0, 100, 200), 100, position=20_000, batches=20)
    assert found["distinct_shards"] > found["perfect_distinct_shards"]
    assert found["neighbour_correlation"] < 0.5
