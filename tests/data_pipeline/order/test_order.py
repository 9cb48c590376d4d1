from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.order.order import Order, check_world_size, permutation, rank_positions
from data_pipeline.order.sharing import Chunks

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
FROZEN_PERMUTATION = [4, 0, 1, 5, 2, 7, 6, 3]
FROZEN_ORDER = [
    (2, 3),
    (3, 0),
    (4, 2),
    (0, 0),
    (2, 1),
    (2, 5),
    (4, 1),
    (2, 0),
    (2, 2),
    (2, 6),
    (4, 4),
    (0, 2),
    (2, 4),
    (4, 0),
    (4, 3),
    (0, 1),
]
LANES = st.sampled_from([1, 2, 4, 8, 24])


@settings(max_examples=80, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 2**40), lanes=LANES, window=st.integers(1, 50), epoch=st.integers(0, 3))
def test_every_sample_exactly_once_per_epoch(counts: list[int], seed: int, lanes: int, window: int, epoch: int) -> None:
    order = Order(counts, seed, lanes, window)
    n = sum(counts)
    epochs, shards, rows = order.locate_many(np.arange(epoch * n, (epoch + 1) * n))
    assert set(epochs.tolist()) == {epoch}
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    assert Counter(zip(shards.tolist(), rows.tolist(), strict=True)) == Counter(everything)


@settings(max_examples=60, deadline=None)
@given(
    counts=COUNTS,
    lanes=LANES,
    rounds=st.integers(1, 3),
    step=st.integers(0, 20),
    start=st.integers(0, 1000),
    world_size=st.sampled_from([1, 2, 4, 8]),
)
def test_world_size_does_not_change_a_global_batch(
    counts: list[int], lanes: int, rounds: int, step: int, start: int, world_size: int
) -> None:
    if lanes % world_size:
        return
    batch = lanes * rounds
    alone = rank_positions(step, batch, lanes, 0, 1, start)
    assert sorted(alone.tolist()) == list(range(start + step * batch, start + (step + 1) * batch))
    parts = [rank_positions(step, batch, lanes, rank, world_size, start) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), alone)
    assert {len(part) for part in parts} == {batch // world_size}
    for rank, part in enumerate(parts):
        assert {lane * world_size // lanes for lane in (part % lanes).tolist()} == {rank}


@settings(max_examples=60, deadline=None)
@given(
    lanes=LANES,
    rounds=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 6),
    workers=st.sampled_from([1, 2, 3, 5]),
    start=st.integers(0, 200),
    steps=st.integers(1, 6),
    stop=st.booleans(),
)
def test_workers_share_a_ranks_positions(
    lanes: int, rounds: int, world_size: int, micro: int, workers: int, start: int, steps: int, stop: bool
) -> None:
    batch = lanes * rounds
    if lanes % world_size or (batch // world_size) % micro:
        return
    config = DataConfig(global_batch=batch, lanes=lanes)
    end = start + steps * batch - (3 if stop else 0)
    for rank in range(world_size):
        everything = [rank_positions(step, batch, lanes, rank, world_size, start) for step in range(steps)]
        expected = [p for p in np.concatenate(everything).tolist() if p < end]
        dealt = [list(Chunks(config, rank, world_size, start, micro, w, workers, end)) for w in range(workers)]
        longest = max(map(len, dealt))
        in_turn = [chunks[i] for i in range(longest) for chunks in dealt if i < len(chunks)]
        delivered = [p for chunk in in_turn for p in chunk.tolist()]
        assert sorted(delivered) == sorted(expected)
        assert stop or delivered == expected
        for worker in range(workers):
            chunks = Chunks(config, rank, world_size, start, micro, worker, workers, end)
            own = {p for chunk in dealt[worker] for p in chunk.tolist()}
            candidates = np.array([p for p in range(end + 5 * lanes) if p % lanes * world_size // lanes == rank])
            assert set(candidates[chunks.mine(candidates)].tolist()) == own


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, lanes=LANES, window=st.integers(1, 30), position=st.integers(0, 400))
def test_a_window_lists_its_positions_in_the_order_of_the_disk(
    counts: list[int], lanes: int, window: int, position: int
) -> None:
    order = Order(counts, 1, lanes, window)
    positions = order.window_of(position)
    assert position in positions and len(positions) <= window
    assert len({p % lanes for p in positions.tolist()}) == 1
    epochs, shards, rows = order.locate_many(positions)
    assert len(set(epochs.tolist())) == 1
    steps = np.diff(rows)[np.diff(shards) == 0]
    turned = order.samples - 1  # the walk may wrap around once when there is a single shard
    assert all(step == 1 or step == -turned for step in steps.tolist())


def test_one_position_at_a_time_is_the_same() -> None:
    order = Order([5, 0, 9, 4], 3, 6, 4)
    positions = np.arange(60)
    together = np.stack(order.locate_many(positions)).T.tolist()
    fresh = [list(Order([5, 0, 9, 4], 3, 6, 4).locate(p)) for p in positions.tolist()]
    assert together == fresh


def test_seed_and_epoch_change_the_order() -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        _, shards, rows = Order([50, 70, 80], seed, 8, 16).locate_many(np.arange(200) + 200 * number)
        return list(zip(shards.tolist(), rows.tolist(), strict=True))

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 1)


def test_the_order_is_frozen() -> None:
    """A checkpoint of an older version must find the same samples: these numbers may never change."""
    assert permutation(8, 5, 1, 2).tolist() == FROZEN_PERMUTATION
    _, shards, rows = Order([3, 0, 7, 1, 5], 5, 4, 3).locate_many(np.arange(16, 32))
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == FROZEN_ORDER


def test_batches_mix_the_data_set() -> None:
    """A batch of 64 lanes contains about as many distinct shards as a random one."""
    order = Order([100] * 640, 0, 64, 32)
    _, shards, _ = order.locate_many(np.arange(64 * 100))
    distinct = np.mean([len(set(batch)) for batch in shards.reshape(100, 64).tolist()])
    at_random = 640 * (1 - (1 - 1 / 640) ** 64)
    assert distinct >= at_random


def test_lanes_turn_to_new_windows_at_different_times() -> None:
    order = Order([4096], 0, 16, 64)
    begins = [int(order.window_of(16 * 100 + lane).min()) // 16 for lane in range(16)]
    assert len(set(begins)) == 16


def test_a_position_in_a_billion_samples_is_found_with_little_memory() -> None:
    import tracemalloc

    counts = np.random.default_rng(0).integers(1000, 9000, 200_000)
    tracemalloc.start()
    epoch, shard, row = Order(counts, 5, 256, 1024).locate(433_668_235)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch == 0 and 0 <= row < counts[shard]
    assert peak < 50e6


def test_impossible_world_sizes_list_the_possible_ones() -> None:
    with pytest.raises(ConfigError, match=r"world size 3: .*data\.lanes=8.*1, 2, 4, 8"):
        check_world_size(3, 16, 8)
    with pytest.raises(ConfigError, match=r"data\.micro_batch=3: .*8 samples.*1, 2, 4, 8"):
        check_world_size(2, 16, 8, 3)
    assert check_world_size(2, 16, 8) == 8
    assert check_world_size(2, 16, 8, 4) == 4


def test_nothing_to_order() -> None:
    with pytest.raises(ConfigError, match="no sample"):
        Order([0, 0], 0, 1, 1)
