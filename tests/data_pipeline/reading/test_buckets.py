"""Pictures sorted by shape: one shape in each step, every sample once per epoch of its bucket, on any number of
processes."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.content.images import bucket_shape, training_pair
from data_pipeline.order.mixture import MixedOrder, Shares, StepShares
from data_pipeline.order.order import Order
from data_pipeline.reading.loader import Batch, Loader
from data_pipeline.reading.state import check_state
from data_pipeline.shards.mixture import open_dataset
from tests.data_pipeline.shapes import write_shapes

BUCKETS = ["1x1", "4x3", "3x4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shapes(tmp_path_factory.mktemp("of any shape"))


def config(folder: str, **others: Any) -> DataConfig:
    return DataConfig(shards=folder, buckets=BUCKETS, global_batch=8, lanes=4, window=5, **others)


def steps(data: DataConfig, count: int, **options: Any) -> list[list[Batch]]:
    loader = Loader(data, **{"image_size": 32, "low_res_size": 16, "multiple": 4, "seed": 1, **options})
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_a_step_has_one_shape_and_no_sample_is_lost(folder: str) -> None:
    found = steps(config(folder), 80)
    shapes = {"1x1": (32, 32), "4x3": (28, 36), "3x4": (36, 28)}
    seen: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for (batch,) in found:
        assert tuple(batch.images.shape[2:]) in shapes.values()
        assert batch.low_res is not None and tuple(2 * n for n in batch.low_res.shape[2:]) == batch.images.shape[2:]
        assert set(batch.datasets) == {""}, "one data set"
        seen[tuple(batch.images.shape[2:])] += batch.keys
    counts = {name: len(set(seen[shape])) for name, shape in shapes.items()}
    assert sum(counts.values()) == 63, "every sample, each in one bucket"
    dataset = open_dataset(config(folder))
    per_bucket = dataset.counts.reshape(3, 3).sum(axis=1).tolist()
    assert dataset.samples == 63 and dict(zip(["3x4", "1x1", "4x3"], per_bucket, strict=True)) == counts
    for name, shape in shapes.items():
        times = Counter(seen[shape])
        assert max(times.values()) - min(times.values()) <= 1, "batches straddle epochs, none is cut short"
        assert len(seen[shape]) / 640 == pytest.approx(counts[name] / 63, abs=3 * 8 / 640)


def test_ranks_micro_batches_and_stops_change_nothing(folder: str) -> None:
    whole = [step[0] for step in steps(config(folder), 12)]
    parts = [steps(config(folder, micro_batch=2), 8, rank=rank, world_size=2, position=32) for rank in (0, 1)]
    for number, expected in enumerate(whole[4:]):
        mine = [batch for rank in parts for batch in rank[number]]
        assert len(mine) == 4
        assert torch.equal(torch.cat([batch.images for batch in mine]), expected.images)
        assert [key for batch in mine for key in batch.keys] == expected.keys


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    lanes=st.sampled_from([1, 2, 4]),
    rounds=st.integers(1, 4),
    first=st.integers(0, 50),
)
def test_each_step_is_of_one_bucket_and_each_sample_comes_once_per_epoch(
    counts: list[int], lanes: int, rounds: int, first: int
) -> None:
    batch = lanes * rounds
    orders = [Order([count], 3, lanes, 4) for count in counts]
    order = MixedOrder(orders, StepShares(batch, Shares(1, [(0, counts)])))  # type: ignore[list-item]
    positions = np.arange(batch * 200)
    epochs, shards, rows = order.locate_many(positions)
    assert all(len(set(step.tolist())) == 1 for step in shards.reshape(-1, batch))
    assert set(Counter(zip(epochs.tolist(), shards.tolist(), rows.tolist(), strict=True)).values()) == {1}
    for bucket, count in enumerate(counts):
        here = shards == bucket
        assert np.array_equal(epochs[here], np.arange(here.sum()) // count), "epoch after epoch, without a gap"
        assert abs(here.sum() / batch - 200 * count / sum(counts)) < 4
    window = order.window_of(first * batch)
    assert first * batch in window and len(set(order.locate_many(window)[1].tolist())) == 1


def test_other_buckets_are_another_order(folder: str) -> None:
    state = Loader(config(folder), image_size=32).state()
    check_state(state, state)
    fewer = replace(config(folder), buckets=["1x1", "4x3"])
    with pytest.raises(ConfigError, match=r"data.buckets from \['1x1', '4x3', '3x4'\] to \['1x1', '4x3'\]"):
        check_state(Loader(fewer, image_size=32).state(), state)
    with pytest.raises(ConfigError, match=r"data.buckets from \['1x1', '4x3', '3x4'\] to \[\]"):
        check_state(Loader(replace(fewer, buckets=[]), image_size=32).state(), state)
    with pytest.raises(ConfigError, match="the pictures of a bucket"):
        check_state(Loader(config(folder, filter=FilterConfig(min_side=32)), image_size=32).state(), state)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_picture_is_cut_to_the_shape_undistorted(crop: str) -> None:
    grey = np.repeat(np.linspace(0, 255, 80).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    high, low = training_pair(out.getvalue(), size=32, low_res_size=16, shape=(40, 24), crop=crop, seed=4, position=2)
    assert high.shape == (24, 40, 3) and low is not None and low.shape == (12, 20, 3)
    slope = (high[12, 39, 0].astype(float) - high[12, 0, 0]) / 39
    assert slope == pytest.approx(255 / 79 * 40 / 24, rel=0.03), "both axes have one scale"


def test_shapes_have_about_the_pixels_of_the_square() -> None:
    shapes = [bucket_shape(ratio, 64, 8) for ratio in (1, 4 / 3, 3 / 4, 16 / 9)]
    assert shapes == [(64, 64), (72, 56), (56, 72), (88, 48)]


@pytest.mark.parametrize(
    "buckets, message",
    [(["4:3"], "no shape; write WIDTHxHEIGHT"), (["1x1", "2x2"], "2x2 is there twice"), (["9x1"], "may be 8 times")],
)
def test_a_wrong_bucket_is_refused(buckets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.buckets: .*{message}"):
        DataConfig(buckets=buckets)
    with pytest.raises(ConfigError, match="a mixture of data sets trains on squares"):
        DataConfig(buckets=BUCKETS, shards=[{"name": "a", "shards": "x"}])
