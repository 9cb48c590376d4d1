"""Maps each position of a mixture to a data set and a position in that data set's own order.

Position p lies in lane l = p mod L and is the k-th of that lane, k = p div L. Each lane deals out its positions
independently: of two data sets, the first gets the k-th position whenever floor(w (k + 1) + t) > floor(w k + t), where
w is its share and t the lane's *phase*. The c-th position that lane l gives to a data set is own position c L + l of
that data set, which is again in lane l. A process therefore reads each data set as sequentially as if it were alone,
on any number of processes. More than two data sets are handled by a tree of such splits.

*Each own position occurs exactly once*: c counts up by one in each lane, so (l, c) -> c L + l neither skips nor repeats
a position, and `Order` permutes the own positions of each epoch.

*Shares are exact*: the phases of the L lanes are i / L for i = 0 .. L - 1 in some order. By Hermite's identity sum_i
floor(x + i / L) = floor(L x) with x = w k, a data set has exactly floor(w n) of the first n = k L positions, for every
k. Within a round, and in the deeper splits of more than two data sets, the order of the phases keeps the count within a
few samples of w n: the phase of lane l is the rank of the fractional part of (l + 1) sqrt(prime) among the lanes, with
another prime on each level, so that any run of lanes has its share of every interval of phases.

When the weights change, all lanes start over at that round; positions dealt before are unaffected. Everything is
invertible integer arithmetic; memory is one number per change, data set and lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_pipeline.order.order import Order

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_LARGEST = 1 << 20
"""Largest denominator of a share: weights with up to six digits are exact, others accurate to 1 in 10^12."""


@dataclass(frozen=True)
class _Split:
    """Deals each lane's positions between two schedule changes to two branches; `part` of `whole` go left."""

    part: int
    whole: int
    phase: np.ndarray
    """Phase of each lane times the number of lanes, int64 (L,)."""
    left: _Split | int
    right: _Split | int
    """The number of a data set, or another split."""

    def before(self, count: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Return how many of the first `count` positions of a lane go left."""
        lanes = len(self.phase)
        full, rest = np.divmod(count, self.whole)
        return self.part * full + (self.part * rest * lanes + self.whole * self.phase[lane]) // (self.whole * lanes)

    def of_left(self, number: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Return which position of the lane is the `number`-th (from 0) to go left."""
        lanes, part = len(self.phase), self.part
        full, rest = np.divmod(number + 1, part)
        top = (rest * lanes - self.phase[lane]) * self.whole
        return self.whole * full - (-top // (part * lanes)) - 1

    def of_right(self, number: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Return which position of the lane is the `number`-th (from 0) to go right."""
        lanes, part = len(self.phase), self.whole - self.part
        full, rest = np.divmod(number, part)
        return self.whole * full + (rest * lanes + self.phase[lane]) * self.whole // (part * lanes)


class Shares:
    """Deals positions to data sets.

    Args:
        lanes: the number of lanes, L.
        schedule: (position, weight of each data set from there on); the first position is 0, each is a multiple of L.
            Weights are not negative and at least one per row is positive; only their ratios matter.
        ranking: the order in which the data sets are split; it makes the result independent of the order in which
            they are listed. By default the listed order.
    """

    def __init__(
        self, lanes: int, schedule: Sequence[tuple[int, Sequence[Fraction]]], ranking: Sequence[int] | None = None
    ) -> None:
        self.lanes = lanes
        ranking = range(len(schedule[0][1])) if ranking is None else ranking
        self._weights = np.array([[float(weight) for weight in row] for _, row in schedule])
        self._starts = np.array([position // lanes for position, _ in schedule], np.int64)
        self._trees = [self._tree([n for n in ranking if row[n] > 0], row, 0) for _, row in schedule]
        sets, every = len(schedule[0][1]), np.arange(lanes)
        dealt = np.zeros((len(schedule) + 1, sets, lanes), np.int64)
        for number, tree in enumerate(self._trees[:-1]):
            rounds = self._starts[number + 1] - self._starts[number]
            dealt[number + 1] = dealt[number]
            self._count(tree, np.full(lanes, rounds), every, dealt[number + 1])
        dealt[-1] = dealt[-2]
        for dataset in self._leaves(self._trees[-1]):
            dealt[-1, dataset] = np.iinfo(np.int64).max
        self._dealt = dealt
        """Positions each lane has given to each data set by the start of each row, int64 (rows + 1, data sets, L)."""

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, position in its own order) of each position, int64 (n,) each."""
        positions = np.asarray(positions, np.int64)
        rounds, lane = np.divmod(positions, self.lanes)
        row = np.searchsorted(self._starts, rounds, side="right") - 1
        datasets, own = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(row):
            here = np.flatnonzero(row == number)
            self._deal(self._trees[number], rounds[here] - self._starts[number], lane[here], here, datasets, own)
        own = (own + self._dealt[row, datasets, lane]) * self.lanes + lane
        return datasets, own

    def before(self, row: int) -> np.ndarray:
        """Return the positions each lane has given to each data set by the start of a schedule row, int64
        (data sets, L)."""
        return self._dealt[row]

    def expected(self, positions: np.ndarray) -> np.ndarray:
        """Return the share of each data set at each position, float64 (n, data sets); each row sums to 1."""
        row = np.searchsorted(self._starts, np.asarray(positions) // self.lanes, side="right") - 1
        return self._weights[row] / self._weights[row].sum(axis=1, keepdims=True)

    def join(self, dataset: int, own: np.ndarray) -> np.ndarray:
        """Return the positions of a data set's own positions, int64 (n,), the inverse of `split`.

        -1 marks own positions that are never reached, because the data set's share drops to 0 first.
        """
        number, lane = np.divmod(np.asarray(own, np.int64), self.lanes)
        bounds = self._dealt[:, dataset, :][:, lane]
        row = (number >= bounds[1:]).sum(axis=0)
        positions = np.full(len(number), -1, np.int64)
        for one in np.unique(row[row < len(self._trees)]):
            here = row == one
            place = number[here] - bounds[one, here]
            for split, is_left in self._path(self._trees[one], dataset):
                place = (split.of_left if is_left else split.of_right)(place, lane[here])
            positions[here] = (place + self._starts[one]) * self.lanes + lane[here]
        return positions

    def _tree(self, members: Sequence[int], weights: Sequence[Fraction], level: int) -> _Split | int:
        if len(members) == 1:
            return members[0]
        low, high = members[: len(members) // 2], members[len(members) // 2 :]
        whole = sum((weights[n] for n in members), Fraction(0))
        share = (sum((weights[n] for n in low), Fraction(0)) / whole).limit_denominator(_LARGEST)
        share = min(max(share, Fraction(1, _LARGEST)), 1 - Fraction(1, _LARGEST))
        root = math.isqrt(_PRIMES[level] << 64) % 2**32
        places = np.arange(1, self.lanes + 1, dtype=np.uint64) * np.uint64(root) % np.uint64(2**32)
        phase = np.empty(self.lanes, np.int64)
        phase[np.argsort(places, kind="stable")] = np.arange(self.lanes)
        left, right = self._tree(low, weights, level + 1), self._tree(high, weights, level + 1)
        return _Split(share.numerator, share.denominator, phase, left, right)

    def _leaves(self, tree: _Split | int) -> list[int]:
        return [tree] if isinstance(tree, int) else [*self._leaves(tree.left), *self._leaves(tree.right)]

    def _path(self, tree: _Split | int, dataset: int) -> list[tuple[_Split, bool]]:
        """Return the splits from a data set up to the root, each with whether the data set is on its left."""
        if isinstance(tree, int):
            return []
        is_left = dataset in self._leaves(tree.left)
        return [*self._path(tree.left if is_left else tree.right, dataset), (tree, is_left)]

    def _count(self, tree: _Split | int, count: np.ndarray, lane: np.ndarray, total: np.ndarray) -> None:
        """Add to `total`, (data sets, L), how many of each lane's first `count` positions each data set gets."""
        if isinstance(tree, int):
            total[tree] += count
            return
        left = tree.before(count, lane)
        self._count(tree.left, left, lane, total)
        self._count(tree.right, count - left, lane, total)

    def _deal(
        self,
        tree: _Split | int,
        count: np.ndarray,
        lane: np.ndarray,
        here: np.ndarray,
        datasets: np.ndarray,
        own: np.ndarray,
    ) -> None:
        """Write to `datasets` and `own`, at `here`, the data set of each lane's `count`-th position and how many
        positions of the lane that data set got before."""
        if isinstance(tree, int):
            datasets[here], own[here] = tree, count
            return
        left = tree.before(count, lane)
        goes_left = tree.before(count + 1, lane) > left
        for branch, chosen, before in ((tree.left, goes_left, left), (tree.right, ~goes_left, count - left)):
            self._deal(branch, before[chosen], lane[chosen], here[chosen], datasets, own)


class StepShares:
    """Deals whole steps: all samples of a step come from one part, consecutive in its order.

    Args:
        global_batch: samples per step, a multiple of the number of lanes.
        shares: deals the steps to the parts, with one lane.
    """

    def __init__(self, global_batch: int, shares: Shares) -> None:
        self._batch, self._shares = global_batch, shares

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Shares.split`."""
        steps, inside = np.divmod(np.asarray(positions, np.int64), self._batch)
        parts, own = self._shares.split(steps)
        return parts, own * self._batch + inside

    def expected(self, positions: np.ndarray) -> np.ndarray:
        """As `Shares.expected`."""
        return self._shares.expected(np.asarray(positions, np.int64) // self._batch)

    def join(self, part: int, own: np.ndarray) -> np.ndarray:
        """As `Shares.join`."""
        steps, inside = np.divmod(np.asarray(own, np.int64), self._batch)
        return self._shares.join(part, steps) * self._batch + inside


class MixedSteps:
    """Deals whole steps to buckets, and the positions of each bucket's steps to data sets.

    Every step then has one shape, and the data sets have exact shares within each bucket. A *part* is the samples of
    one data set in one bucket.

    Args:
        global_batch: samples per step, a multiple of `lanes`.
        lanes: the number of lanes, as for `Shares`.
        places: (bucket, data set) of each part.
        schedule: (position, weight of each part from there on); the first position is 0, each is a multiple of
            `global_batch`.
        ranking: the order in which the data sets are split, as for `Shares`.
    """

    def __init__(
        self,
        global_batch: int,
        lanes: int,
        places: Sequence[tuple[int, int]],
        schedule: Sequence[tuple[int, Sequence[Fraction]]],
        ranking: Sequence[int],
    ) -> None:
        buckets = 1 + max(bucket for bucket, _ in places)
        self._places = list(places)
        self._parts = np.full((buckets, 1 + max(ranking)), -1, np.int64)
        for part, place in enumerate(places):
            self._parts[place] = part
        self._starts = np.array([position for position, _ in schedule], np.int64)
        self._weights = np.array([[float(weight) for weight in row] for _, row in schedule])

        def weights(row: Sequence[Fraction], bucket: int) -> list[Fraction]:
            own = [Fraction(0)] * self._parts.shape[1]
            for (of, dataset), weight in zip(places, row, strict=True):
                own[dataset] += weight if of == bucket else 0
            return own

        steps = [
            (position // global_batch, [sum(weights(row, bucket), Fraction(0)) for bucket in range(buckets)])
            for position, row in schedule
        ]
        shares = Shares(1, steps)
        self._steps = StepShares(global_batch, shares)
        self._inside = []
        for bucket in range(buckets):
            rows = [
                (int(shares.before(number)[bucket, 0]) * global_batch, weights(row, bucket))
                for number, (_, row) in enumerate(schedule)
            ]
            taken = [(start, own) for start, own in rows if any(own)]  # in the other rows the bucket gets no step
            self._inside.append(Shares(lanes, [(0, taken[0][1]), *taken[1:]], ranking))

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (part, position in its own order) of each position, like `Shares.split`."""
        buckets, own = self._steps.split(positions)
        parts = np.empty_like(buckets)
        for bucket in np.unique(buckets):
            here = np.flatnonzero(buckets == bucket)
            datasets, own[here] = self._inside[bucket].split(own[here])
            parts[here] = self._parts[bucket, datasets]
        return parts, own

    def expected(self, positions: np.ndarray) -> np.ndarray:
        """Return the share of each part at each position, float64 (n, parts); each row sums to 1."""
        row = np.searchsorted(self._starts, np.asarray(positions), side="right") - 1
        return self._weights[row] / self._weights[row].sum(axis=1, keepdims=True)

    def join(self, part: int, own: np.ndarray) -> np.ndarray:
        """As `Shares.join`."""
        bucket, dataset = self._places[part]
        inside = self._inside[bucket].join(dataset, own)
        positions = np.full(len(inside), -1, np.int64)
        comes = inside >= 0
        positions[comes] = self._steps.join(bucket, inside[comes])
        return positions


class MixedOrder:
    """The order of a mixture.

    Combines the `Order` of each part: data sets by `Shares`, buckets by `StepShares`, or the data sets of each bucket
    by `MixedSteps`. Shards are numbered consecutively, part after part.
    """

    def __init__(self, orders: Sequence[Order], shares: Shares | StepShares | MixedSteps) -> None:
        self.orders, self.shares = list(orders), shares
        self.counts = np.concatenate([order.counts for order in orders])
        self.samples = int(self.counts.sum())
        ends = np.cumsum([len(order.counts) for order in orders])
        self._first = ends - np.array([len(order.counts) for order in orders])

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (epoch of its data set, shard, row) of one position."""
        epochs, shards, rows = self.locate_many(np.array([position], np.int64))
        return int(epochs[0]), int(shards[0]), int(rows[0])

    def locate_many(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (epochs, shards, rows) of many positions, int64 (n,) each."""
        datasets, own = self.shares.split(np.asarray(positions, np.int64))
        epochs, shards, rows = (np.empty_like(own) for _ in range(3))
        for dataset in np.unique(datasets):
            here = datasets == dataset
            epochs[here], found, rows[here] = self.orders[dataset].locate_many(own[here])
            shards[here] = found + self._first[dataset]
        return epochs, shards, rows

    def window_of(self, position: int) -> np.ndarray:
        """Return all positions in the same window of the same data set as `position`, int64 (k,), in order on disk."""
        datasets, own = self.shares.split(np.array([position], np.int64))
        dataset = int(datasets[0])
        positions = self.shares.join(dataset, self.orders[dataset].window_of(int(own[0])))
        return positions[positions >= 0]
