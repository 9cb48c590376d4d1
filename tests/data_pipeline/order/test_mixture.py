from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.order.mixing import mixing, shares_kept
from data_pipeline.order.mixture import MixedOrder, Shares
from data_pipeline.order.order import Order

LANES = st.sampled_from([1, 2, 4, 8, 24])
WEIGHTS = st.lists(st.fractions(0, 1, max_denominator=1000), min_size=1, max_size=6).filter(any)
FROZEN = [1, 0, 2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[tuple[int, list[Fraction]]]]:
    """Lanes, and rows of a schedule with as many data sets each."""
    lanes, first = draw(LANES), draw(WEIGHTS)
    row = st.lists(st.fractions(0, 1, max_denominator=50), min_size=len(first), max_size=len(first)).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 40), max_size=3)))
    return lanes, [(0, first), *((lanes * start, draw(row)) for start in starts)]


@settings(max_examples=60, deadline=None)
@given(schedule=schedules())
def test_every_position_of_a_data_set_occurs_once_in_its_lane_and_is_found_again(
    schedule: tuple[int, list[tuple[int, list[Fraction]]]],
) -> None:
    lanes, rows = schedule
    shares, positions = Shares(lanes, rows), np.arange(lanes * 60)
    datasets, own = shares.split(positions)
    for dataset in range(len(rows[0][1])):
        here = datasets == dataset
        assert np.array_equal(own[here] % lanes, positions[here] % lanes), "it stays in its lane"
        for lane in range(lanes):
            numbers = own[here & (positions % lanes == lane)] // lanes
            assert np.array_equal(numbers, np.arange(len(numbers))), "no position is missed or repeated"
        assert np.array_equal(shares.join(dataset, own[here]), positions[here])
        if rows[-1][1][dataset] == 0:  # what would have come next is never reached
            assert set(shares.join(dataset, np.arange(lanes) + lanes * 60).tolist()) == {-1}
    for number, (start, weights) in enumerate(rows):
        end = rows[number + 1][0] if number + 1 < len(rows) else len(positions)
        inside = datasets[start:end]
        assert all(weights[dataset] > 0 for dataset in set(inside.tolist()))


@settings(max_examples=60, deadline=None)
@given(lanes=LANES, first=st.integers(1, 999), whole=st.just(1000), rounds=st.integers(1, 300))
def test_two_data_sets_have_their_shares_to_the_sample(lanes: int, first: int, whole: int, rounds: int) -> None:
    """Hermite's identity: after any number of complete rounds, the count is the weight times the samples, rounded
    down."""
    share = Fraction(first, whole)
    datasets, _ = Shares(lanes, [(0, [share, 1 - share])]).split(np.arange(lanes * rounds))
    ahead = np.cumsum(datasets == 0)[lanes - 1 :: lanes]
    expected = [int(share * lanes * (number + 1)) for number in range(rounds)]
    assert ahead.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(lanes=LANES, weights=WEIGHTS, far=st.integers(0, 10**10))
def test_any_stretch_of_several_data_sets_is_within_a_few_samples(
    lanes: int, weights: list[Fraction], far: int
) -> None:
    positions = far // lanes * lanes + np.arange(lanes * 100)
    order = MixedOrder([Order([5], 0, lanes, 2)] * len(weights), Shares(lanes, [(0, weights)]))
    for found in shares_kept(order, positions):
        assert found["largest_deviation"] < 14  # 24 lanes; twice the largest deviation of any point from its ideal


def test_the_shares_do_not_depend_on_the_order_of_the_data_sets() -> None:
    weights = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    one = Shares(4, [(0, weights)]).split(np.arange(200))
    other = Shares(4, [(0, weights[::-1])], ranking=[2, 1, 0]).split(np.arange(200))
    assert np.array_equal(one[0], 2 - other[0]) and np.array_equal(one[1], other[1])


def test_the_deal_is_frozen() -> None:
    """A checkpoint of an older version must find the same samples: these numbers may never change."""
    datasets, _ = Shares(4, [(0, [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10)])]).split(np.arange(400, 420))
    assert datasets.tolist() == FROZEN


@settings(max_examples=30, deadline=None)
@given(lanes=LANES, window=st.integers(1, 9), seed=st.integers(0, 99), weight=st.integers(1, 99))
def test_each_sample_once_per_epoch_of_its_data_set(lanes: int, window: int, seed: int, weight: int) -> None:
    counts = [[7, 0, 12], [5]]
    orders = [Order(one, seed, lanes, window) for one in counts]
    order = MixedOrder(orders, Shares(lanes, [(0, [Fraction(weight, 100), Fraction(100 - weight, 100)])]))
    positions = np.arange(lanes * 3000 // lanes)
    epochs, shards, rows = order.locate_many(positions)
    seen = Counter(zip(epochs.tolist(), shards.tolist(), rows.tolist(), strict=True))
    assert set(seen.values()) == {1}
    datasets, own = order.shares.split(positions)
    for number, first in ((0, 0), (1, 3)):
        here = datasets == number
        expected = orders[number].locate_many(own[here])
        assert np.array_equal(np.stack(expected), np.stack([epochs[here], shards[here] - first, rows[here]]))
        whole = len(own[here]) // orders[number].samples - 2 * lanes // orders[number].samples - 1
        for epoch in range(max(whole, 0)):
            assert (epochs[here] == epoch).sum() == orders[number].samples, "a whole epoch of it"


def test_a_window_lists_the_positions_of_the_run() -> None:
    order = MixedOrder([Order([90], 1, 4, 8), Order([70], 1, 4, 8)], Shares(4, [(0, [Fraction(7), Fraction(3)])]))
    for position in range(0, 300, 17):
        positions = order.window_of(position)
        assert position in positions and len(set(positions % 4)) == 1
        _, shards, rows = order.locate_many(positions)
        assert len(set(shards.tolist())) == 1 and {1, -(order.counts[shards[0]] - 1)} >= set(np.diff(rows).tolist())


def test_quality_of_a_mixture() -> None:
    order = MixedOrder([Order([50] * 40, 0, 32, 16), Order([50] * 10, 0, 32, 16)], Shares(32, [(0, [3, 1])]))  # type: ignore[list-item]
    found = mixing(order, 64)
    assert found["distinct_shards"] > 0.8 * found["perfect_distinct_shards"]
    assert [round(one["wanted"], 3) for one in found["datasets"]] == [0.75, 0.25]
    assert all(abs(one["share"] - one["wanted"]) < 1e-3 for one in found["datasets"])


def config(*entries: dict[str, Any], **others: Any) -> DataConfig:
    return DataConfig(shards=[{"shards": "x", **entry} for entry in entries], global_batch=8, **others)


def test_the_schedule_follows_from_weights_starts_and_ends() -> None:
    mixed = config({"name": "a", "weight": 0.7}, {"name": "b", "weight": {0: 0.3, 64: 2.1}, "end": 128}, {
        "name": "c", "start": 128, "weight": 0.35})  # fmt: skip
    assert mixed.shares() == [
        (0, {"a": "7/10", "b": "3/10"}),
        (64, {"a": "1/4", "b": "3/4"}),
        (128, {"a": "2/3", "c": "1/3"}),
    ]
    assert DataConfig(shards="x").shares() == [(0, {"": "1"})]


@pytest.mark.parametrize(
    "entries, message",
    [
        ([{"name": "a", "wieght": 1}], "unknown key 'wieght' of a data set; the keys are name, shards, weight"),
        ([{"name": "a b"}], "name='a b': each data set needs a name"),
        ([{"name": "a"}, {"name": "a"}], "two data sets are called a"),
        ([{"name": "a", "weight": -1}], "weight=-1: it must be a number of at least 0"),
        ([{"name": "a", "weight": 0}], "from position 0 on no data set has a weight"),
        ([{"name": "a", "end": 64}], "from position 64 on no data set has a weight"),
        ([{"name": "a"}, {"name": "b", "start": 12}], "at multiples of data.global_batch=8; the nearest are 8 and 16"),
        ([{"name": "a", "weight": {"soon": 1}}], "its keys must be positions"),
        ([{"name": "a", "filter": {"min_sid": 1}}], "data set a: filter=.*: its keys are min_side, max_aspect"),
        ([{"name": "a", "shards": ""}], "data set a: shards must be a pattern"),
    ],
)
def test_a_wrong_description_is_refused(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.shards: .*{message}"):
        config(*entries).check_changes()


def test_an_entry_among_patterns_is_refused() -> None:
    with pytest.raises(ConfigError, match="'x': each entry of a mixture must have the form"):
        DataConfig(shards=["x", {"name": "a", "shards": "y"}])
