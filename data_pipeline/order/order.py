"""The order of samples: pure arithmetic on (sample counts, seed, position).

L *lanes* are interleaved: position p (samples consumed since step 0, over all ranks) lies in lane p mod L. Epoch e = p
div N covers each of the N samples once; a batch may straddle two epochs. In epoch e the shards are permuted by (seed,
e), laid end to end and rotated by a random offset. This *walk* is cut into L runs, one per lane, each as long as the
lane has positions in the epoch. Within a run, windows of consecutive samples are permuted by (seed, e, run, window).
A rank serves a fixed set of lanes, so its reads stay sequential while every batch mixes L places of the data set.
Nothing depends on the number of ranks or workers. Locating a position costs one permutation of the shards per epoch and
one of `window` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.recent import Recent
from data_pipeline.config import divisors

_SHARDS, _TURN, _WINDOW = 1, 2, 3


def permutation(n: int, seed: int, *counter: int) -> np.ndarray:
    """Return a permutation of range(n), int64 (n,), from the Philox 4x64 generator with key (seed, counter[0]).

    It sorts n random words instead of calling numpy's shuffle: numpy keeps the words stable across versions, but not
    the shuffle.
    """
    words = _philox(seed, *counter).random_raw(n)
    return np.argsort(words, kind="stable")


def _philox(seed: int, kind: int, *counter: int) -> np.random.Philox:
    start = np.zeros(4, np.uint64)
    start[1 : 1 + len(counter)] = np.array(counter, np.int64).astype(np.uint64)
    key = np.array([seed & (2**64 - 1), kind], np.uint64)
    return np.random.Philox(key=key, counter=start)


class Order:
    """The order of all samples over all epochs.

    Args:
        counts: samples per shard after filters, (shards,).
        seed: the run's seed.
        lanes: number of interleaved substreams, at least 1.
        window: samples shuffled together within a lane, at least 1.

    Raises:
        ConfigError: there are no samples, or `lanes` or `window` is below 1.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, lanes: int, window: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.lanes, self.window = int(seed), int(lanes), int(window)
        self.samples = int(self.counts.sum())
        if self.samples < 1:
            raise ConfigError("data.shards: no sample remains, so there is nothing to order")
        if self.lanes < 1 or self.window < 1:
            raise ConfigError(f"data.lanes={lanes}, data.window={window}: both must be at least 1")
        self._epochs: Recent[int, tuple[np.ndarray, np.ndarray, int]] = Recent(2)
        self._windows: Recent[tuple[int, int, int], np.ndarray] = Recent(2 * self.lanes + 2)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, shard, row) of one position; `row` counts the samples of the shard that pass the filters."""
        epochs, shards, rows = self.locate_many(np.array([position], np.int64))
        return int(epochs[0]), int(shards[0]), int(rows[0])

    def locate_many(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (epochs, shards, rows) of many positions, int64 (n,) each."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, walk = self._walk(positions)
        shards, rows = np.empty_like(walk), np.empty_like(walk)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shards[here], rows[here] = self._shard_of(int(epoch), walk[here])
        return epochs, shards, rows

    def window_of(self, position: int) -> np.ndarray:
        """Return all positions in the same window as `position`, int64 (k,), in the order of the walk (as on disk)."""
        epoch, first = position // self.samples, position // self.samples * self.samples
        turn = (position - first) % self.lanes
        low, high = (
            int(x[0]) for x in self._bounds(np.array([turn]), np.array([(position - first) // self.lanes]))[1:]
        )
        phase = turn * self.window // self.lanes
        shuffled = self._window((epoch, turn, (low + phase) // self.window), high - low)
        return first + turn + (low + np.argsort(shuffled)) * self.lanes

    def _bounds(self, turn: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (window, its start, its end) in the lane's run, for an index in that run."""
        # Each lane's windows have another offset: otherwise all lanes would start, and read, a new window at once.
        phase = turn * self.window // self.lanes
        length = self.samples // self.lanes + (turn < self.samples % self.lanes)
        window = (index + phase) // self.window
        low = np.maximum(window * self.window - phase, 0)
        return window, low, np.minimum((window + 1) * self.window - phase, length)

    def _walk(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the place in the walk of each position."""
        epochs = positions // self.samples
        first = epochs * self.samples  # first position of the epoch
        turn = (positions - first) % self.lanes  # the run, numbered from the lane of that first position
        base, rest = divmod(self.samples, self.lanes)
        begin = turn * base + np.minimum(turn, rest)
        index = (positions - first) // self.lanes  # in the lane's run
        window, low, high = self._bounds(turn, index)
        place = index - low
        shuffled = np.empty_like(place)
        groups = np.stack([epochs, turn, window])
        order = np.lexsort(groups[::-1])
        changes = np.flatnonzero(np.any(np.diff(groups[:, order], axis=1) != 0, axis=0)) + 1
        for members in np.split(order, changes):
            if len(members):
                one = members[0]
                key = (int(epochs[one]), int(turn[one]), int(window[one]))
                shuffled[members] = self._window(key, int(high[one] - low[one]))[place[members]]
        return epochs, begin + low + shuffled

    def _window(self, key: tuple[int, int, int], size: int) -> np.ndarray:
        found = self._windows.get(key)
        if found is None:
            found = self._windows.put(key, permutation(size, self.seed, _WINDOW, *key[::-1]).astype(np.int32))
        return found

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return (shards in order, end of each in the walk, rotation) of an epoch."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = permutation(len(self.counts), self.seed, _SHARDS, epoch)
            turn = int(_philox(self.seed, _TURN, epoch).random_raw() % self.samples)
            found = self._epochs.put(epoch, (shards, np.cumsum(self.counts[shards]), turn))
        return found

    def _shard_of(self, epoch: int, walk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, ends, turn = self._epoch(epoch)
        walk = (walk + turn) % self.samples
        which = np.searchsorted(ends, walk, side="right")
        shard = shards[which]
        return shard, walk - (ends[which] - self.counts[shard])


def check_position(position: int) -> int:
    """Return `position` as an int. Raises `ConfigError` unless it is an integer in [0, 2^62)."""
    if not isinstance(position, (int, np.integer)) or not 0 <= position < 2**62:
        raise ConfigError(f"position={position}: it must be a whole number of samples, from 0 to 2**62")
    return int(position)


def check_world_size(world_size: int, global_batch: int, lanes: int, micro_batch: int = 0) -> int:
    """Return the effective micro-batch: `micro_batch`, or a rank's whole share of the global batch if it is 0.

    Raises:
        ConfigError: the batch cannot be divided this way; the message lists the possible values.
    """
    if world_size not in divisors(lanes):
        allowed = ", ".join(map(str, divisors(lanes)))
        raise ConfigError(
            f"world size {world_size}: it must divide data.lanes={lanes} (data.global_batch={global_batch}); "
            f"possible numbers of processes are {allowed}"
        )
    share = global_batch // world_size
    if micro_batch and micro_batch not in divisors(share):
        allowed = ", ".join(map(str, divisors(share)))
        raise ConfigError(
            f"data.micro_batch={micro_batch}: it must divide the {share} samples per step of each of the {world_size} "
            f"processes; possible are {allowed}"
        )
    return micro_batch or share


def rank_positions(step: int, global_batch: int, lanes: int, rank: int, world_size: int, start: int = 0) -> np.ndarray:
    """Return the positions one rank reads in one optimizer step, int64 (global_batch / world_size,), lane by lane.

    Rank r serves the lanes l with floor(l world_size / lanes) = r. The concatenated positions of all ranks are the same
    for every world size that divides `lanes`.

    Args:
        step: optimizer step, counted from `start`.
        start: position of step 0.

    Raises:
        ConfigError: see `check_world_size`.
    """
    check_world_size(world_size, global_batch, lanes)
    first = start + step * global_batch
    mine = np.arange(rank * lanes // world_size, (rank + 1) * lanes // world_size, dtype=np.int64)
    rounds = np.arange(global_batch // lanes, dtype=np.int64)
    return (first + (mine - first) % lanes)[:, None].repeat(len(rounds), 1).ravel() + np.tile(rounds * lanes, len(mine))
