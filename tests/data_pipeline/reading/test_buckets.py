"""Pictures sorted by shape: one shape per step, every sample once per epoch of its bucket, on any number of
processes."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
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
from data_pipeline.order.mixture import MixedOrder, MixedSteps, Shares, StepShares
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
def test_each_step_uses_one_bucket_and_each_sample_occurs_once_per_epoch(
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


def test_other_buckets_give_another_order(folder: str) -> None:
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
    [
        (["4:3"], "not a shape; write WIDTHxHEIGHT"),
        (["1x1", "2x2"], "2x2 is listed twice"),
        (["9x1"], "at most 8 times"),
    ],
)
def test_a_wrong_bucket_is_refused(buckets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.buckets: .*{message}"):
        DataConfig(buckets=buckets)


# ------------------------------------------------------------------------------------------- of several data sets


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The second one has no upright pictures."""
    homes = [tmp_path_factory.mktemp(name) for name in ("set a", "set b")]
    return [write_shapes(homes[0]), write_shapes(homes[1], ((40, 30), (36, 36)))]


def mixed(folders: list[str], *, start: int = 0, **others: Any) -> DataConfig:
    first = {"name": "a", "shards": folders[0], "weight": 0.75}
    return config(  # type: ignore[arg-type]
        [first, {"name": "b", "shards": folders[1], "weight": 0.25, "start": start}], **others
    )


def test_data_sets_share_each_step_and_each_step_has_one_shape(folders: list[str]) -> None:
    shapes = {(32, 32): "1x1", (28, 36): "4x3", (36, 28): "3x4"}
    kept: Counter[tuple[str, str]] = Counter()
    for (batch,) in steps(mixed(folders), 100):
        shape = shapes[(batch.images.shape[2], batch.images.shape[3])]
        kept.update((name, shape) for name in batch.datasets)
    parts = dict(zip(dataset_parts(folders), open_dataset(mixed(folders)).parts, strict=True))  # type: ignore[attr-defined]
    assert set(kept) == set(parts) and ("b", "3x4") not in kept
    for (name, shape), part in parts.items():
        wanted = {"a": 0.75, "b": 0.25}[name] * part.samples / 63
        assert kept[name, shape] / 800 == pytest.approx(wanted, abs=3 * 8 / 800), "as far as whole steps allow"


def dataset_parts(folders: list[str]) -> list[tuple[str, str]]:
    names = open_dataset(mixed(folders)).names_of_parts  # type: ignore[attr-defined]
    return [name.rpartition("/")[::2] for name in names]


def test_a_shape_that_no_picture_has_changes_nothing(folders: list[str]) -> None:
    found = [steps(replace(mixed(folders), buckets=buckets), 6) for buckets in (BUCKETS, ["3x1", *BUCKETS, "1x3"])]
    keys = [[step[0].keys for step in one] for one in found]
    assert keys[0] == keys[1]


def test_ranks_and_an_added_data_set_change_nothing_earlier(folders: list[str]) -> None:
    whole = [step[0] for step in steps(mixed(folders), 6)]
    parts = [steps(mixed(folders, micro_batch=2), 4, rank=rank, world_size=2, position=16) for rank in (0, 1)]
    for number, expected in enumerate(whole[2:]):
        mine = [batch for rank in parts for batch in rank[number]]
        assert torch.equal(torch.cat([batch.images for batch in mine]), expected.images)
        assert [name for batch in mine for name in batch.datasets] == expected.datasets
    alone = config([{"name": "a", "shards": folders[0]}])  # type: ignore[arg-type]
    later = mixed(folders, start=24)
    before, now = (Loader(data, image_size=32, multiple=4) for data in (alone, later))
    earlier = {**before.state(), "position": 24}
    check_state({**now.state(), "position": 24}, earlier)
    keys = [[step[0].keys for step in steps(data, 6)] for data in (alone, later)]
    assert keys[0][:3] == keys[1][:3] and any("b" in step[0].datasets for step in steps(later, 6)[3:])
    with pytest.raises(ConfigError, match="give later changes their position"):
        check_state(Loader(mixed(folders), image_size=32).state(), earlier)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    lanes=st.sampled_from([1, 2, 4]),
    change=st.integers(1, 60),
)
def test_each_part_occurs_in_its_share_and_order(
    counts: list[list[int]], weights: list[int], lanes: int, change: int
) -> None:
    """counts: of each data set by bucket. From step `change` on, the first data set has twice its weight."""
    counts = [[*row[:2], row[2] + 1] for row in counts]
    places = [(b, d) for d, row in enumerate(counts) for b in range(3) if row[b]]
    used = sorted({b for b, _ in places})
    places = [(used.index(b), d) for b, d in places]
    batch, sizes = 2 * lanes, [n for row in counts for n in row if n]

    def row(first: int) -> list[Fraction]:
        own = [first * weights[0], *weights[1:]]
        return [Fraction(own[d] * n, sum(counts[d])) for (_, d), n in zip(places, sizes, strict=True)]

    shares = MixedSteps(batch, lanes, places, [(0, row(1)), (change * batch, row(2))], range(len(counts)))
    order = MixedOrder([Order([n], 3, lanes, 4) for n in sizes], shares)
    positions = np.arange(batch * 240)
    parts, own = shares.split(positions)
    of_bucket = np.array([bucket for bucket, _ in places])[parts]
    assert all(len(set(step)) == 1 for step in of_bucket.reshape(-1, batch).tolist())
    for part in range(len(places)):
        here = parts == part
        assert np.array_equal(np.sort(own[here]), np.arange(here.sum())) or here.sum() == 0 or lanes > 1
        assert len(np.unique(own[here])) == here.sum(), "no own position twice"
        assert np.array_equal(shares.join(part, own[here]), positions[here]), "the inverse"
        expected = shares.expected(positions)[:, part].sum()
        assert abs(here.sum() - expected) <= 8 * batch
    epochs, shards, rows = order.locate_many(positions)
    assert set(Counter(zip(epochs.tolist(), shards.tolist(), rows.tolist(), strict=True)).values()) == {1}
    once = MixedSteps(batch, lanes, places, [(0, row(1))], range(len(counts)))
    past = positions[: change * batch]
    assert all(np.array_equal(a, b) for a, b in zip(once.split(past), shares.split(past), strict=True))
