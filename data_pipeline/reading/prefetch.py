"""Fetches samples by position: local ones on demand, remote ones ahead of time by ranged requests."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.common.pool import DaemonPool
from data_pipeline.order.mixture import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.reading.rows import RowReader, Sample, runs_of
from data_pipeline.shards.mixture import window_bytes

logger = logging.getLogger(__name__)

SMALL_GAP, GAP = 64 << 10, 1 << 20
"""Gaps in bytes between two wanted samples up to which one request covers both: always, and if at least half of what it
reads is wanted (the samples in between may belong to other workers or be filtered out)."""
RANGE = 4 << 20
"""Largest request in bytes when whole windows are read."""
CONNECTIONS = 16
_AT_A_TIME = 256
"""Most samples whose units are requested before the next sample is delivered."""
LOCATED = 512
"""Positions located at once: one at a time, each would cost several times as much."""


@dataclass
class _Unit:
    """Neighbouring samples of one shard, fetched by one request."""

    shard: int
    rows: dict[int, tuple[int, int, int]]
    """Position -> (row, first byte, end byte)."""
    begin: int
    end: int
    scattered: int = 0
    """Bytes of the unit's only sample if its members lie far apart, so that each run takes a request; otherwise 0."""
    future: Future[dict[int, Any]] | None = None
    """By position, the bytes of each sample not yet collected; of a scattered one the sample itself."""

    @property
    def size(self) -> int:
        """The bytes to request."""
        return self.scattered or self.end - self.begin

    def is_near(self, begin: int) -> bool:
        """Return whether a sample that starts here is close enough to extend this unit to."""
        gap = begin - self.end
        if self.scattered or begin < self.begin or gap > GAP:
            return False
        if gap <= SMALL_GAP:
            return True
        wanted = sum(last - first for _, first, last in self.rows.values())
        return begin - self.begin <= 2 * wanted


class Prefetcher:
    """Iterates over positions in order, yielding for each a function that returns its sample; prefetches remote bytes.

    If the windows of all lanes fit into the budget, neighbouring samples of a window are fetched in ranges of a few
    megabytes and wait in memory for their turn; with a disk cache they wait there. Otherwise every sample is a request
    of its own.

    Args:
        reader: reads the samples.
        order: maps positions to shards and rows.
        positions: the positions to deliver, in batches, ascending within each lane.
        lanes: number of lanes whose windows are held, to estimate memory; fractional if workers share a lane.
        budget: most bytes of raw samples to hold.
        wanted: tells which positions this process will deliver, (n,) -> bool (n,); None: all in the windows it reads.
    """

    def __init__(
        self,
        reader: RowReader,
        order: Order | MixedOrder,
        positions: Iterable[np.ndarray],
        lanes: float,
        budget: int,
        wanted: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._reader, self._order, self._wanted = reader, order, wanted
        self._places = self._locate(iter(positions))
        self._ahead: deque[tuple[int, int, int]] = deque()  # located, not yet delivered
        self._requested = 0  # how many of these have their unit requested
        self._units: dict[int, _Unit] = {}
        self._budget, self._held = budget, 0
        self._lock = threading.Lock()
        self._said_scattered = False
        window = window_bytes(reader.dataset, reader.config) * lanes
        self.whole_windows = window <= budget and reader.cache is None  # a disk cache keeps neighbours anyway
        self._pool: DaemonPool | None = None
        self._all_direct = all(map(reader.is_direct, range(len(reader.dataset.urls))))
        if window > budget and reader.cache is None and not self._all_direct:
            logger.warning(
                "%.0f lanes of windows need about %.1f GB and data.prefetch_mb allows %.1f: samples are requested one "
                "by one, which is slow; increase data.prefetch_mb, reduce data.window, or set data.cache_dir",
                lanes,
                window / 1e9,
                budget / 1e9,
            )

    def __iter__(self) -> Iterator[tuple[int, int, int, Callable[[], Sample]]]:
        """Yield (position, shard, row, a function that waits for the sample and returns it)."""
        if self._all_direct:
            for position, shard, row in self._places:
                yield position, shard, row, partial(self._reader.read, shard, row)
        while self._fill(1):
            position, shard, row = self._ahead[0]
            if self._reader.is_direct(shard):
                self._ahead.popleft()
                self._requested = max(self._requested - 1, 0)
                yield position, shard, row, partial(self._reader.read, shard, row)
                continue
            self._pump()
            self._ahead.popleft()
            self._requested -= 1
            unit = self._units.pop(position)
            yield position, shard, row, _Wait(self, unit, position)

    def _locate(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[int, int, int]]:
        """Yield (position, shard, row) of every position in order."""
        while True:
            several: list[np.ndarray] = []
            while sum(map(len, several)) < LOCATED and (batch := next(batches, None)) is not None:
                several.append(batch)
            if not several:
                return
            positions = np.concatenate(several)
            _, shards, rows = self._order.locate_many(positions)
            yield from zip(positions.tolist(), shards.tolist(), rows.tolist(), strict=True)

    def _fill(self, count: int) -> bool:
        """Locate positions until `count` are ahead; return whether there are any."""
        self._ahead.extend(islice(self._places, max(count - len(self._ahead), 0)))
        return bool(self._ahead)

    def _pump(self) -> None:
        """Request units in the order of need: always the one needed next, others as the budget allows.

        The number per call is limited: otherwise tens of thousands of small units would be requested before the first
        sample is delivered.
        """
        for _ in range(_AT_A_TIME):
            if self._requested >= len(self._ahead) and not self._fill(self._requested + 1):
                return
            if self._requested >= len(self._ahead):
                return
            position, shard, _ = self._ahead[self._requested]
            if not self._reader.is_direct(shard):
                unit = self._units.get(position) or self._plan(position, shard)
                if unit.future is None:
                    size = unit.size
                    with self._lock:
                        if self._requested > 0 and self._held + size > self._budget:
                            return
                        self._held += size
                    self._pool = self._pool or DaemonPool(CONNECTIONS, "fetch")
                    unit.future = self._pool.submit(self._bring, unit)
            self._requested += 1

    def _plan(self, position: int, shard: int) -> _Unit:
        """Create the units of the window around a position; return the unit of the position itself."""
        compressed = self._reader.dataset.summaries[shard].compressed
        if self.whole_windows or compressed:
            positions = self._order.window_of(position)
            wanted = (
                positions >= position if self._wanted is None else self._wanted(positions) & (positions >= position)
            )
            positions = positions[wanted]
        else:
            positions = np.array([position])
        _, shards, rows = self._order.locate_many(positions)
        limit = (1 << 40) if compressed else RANGE
        unit: _Unit | None = None
        for place, number, row in zip(positions.tolist(), shards.tolist(), rows.tolist(), strict=True):
            if self._reader.is_direct(number):
                continue
            index, kept = self._reader.dataset.index(number)
            places = self._reader.places(index, int(kept[row]))
            begin, end = places[0][1], max(offset + size for _, offset, size, _ in places)
            runs = runs_of(places)
            if len(runs) > 1 and not compressed:
                size = sum(last - first for first, last in runs)
                self._units[place] = _Unit(number, {place: (row, begin, end)}, begin, end, scattered=size)
                self._say_scattered(number)
                continue
            near = unit is not None and unit.shard == number and (compressed or unit.is_near(begin))
            if unit is None or not near or end - unit.begin > limit:
                unit = _Unit(number, {}, begin, end)
            unit.rows[place] = row, begin, end
            unit.end = max(unit.end, end)
            self._units[place] = unit
        return self._units[position]

    def _say_scattered(self, shard: int) -> None:
        if not self._said_scattered:
            self._said_scattered = True
            logger.warning(
                "%s: the members of a sample are far apart, so each needs its own request, which is slow; `cascade "
                "prepare prepare.kind=shards` packs samples together",
                self._reader.dataset.urls[shard],
            )

    def _bring(self, unit: _Unit) -> dict[int, Any]:
        """Fetch a unit and cut it up, so that the memory of each sample is released when it is collected."""
        if unit.scattered:
            return {position: self._reader.read(unit.shard, row) for position, (row, _, _) in unit.rows.items()}
        data = self._reader.read_range(unit.shard, unit.begin, unit.end)
        wanted = {position: data[a - unit.begin : b - unit.begin] for position, (_, a, b) in unit.rows.items()}
        with self._lock:
            self._held -= len(data) - sum(map(len, wanted.values()))
        return wanted

    def collect(self, unit: _Unit, position: int) -> Sample:
        """Wait for a unit and take one sample out of it. Raises what reading it raised; see `RowReader.read`."""
        assert unit.future is not None
        if unit.scattered:
            try:
                return unit.future.result().pop(position)
            finally:
                with self._lock:
                    self._held -= unit.scattered
        data = unit.future.result().pop(position)
        with self._lock:
            self._held -= len(data)
        row, begin, _ = unit.rows[position]
        return self._reader.sample_from(unit.shard, row, begin, data)

    def close(self) -> None:
        """Discard what has been requested but not delivered."""
        if self._pool is not None:
            self._pool.close()


@dataclass
class _Wait:
    prefetcher: Prefetcher
    unit: _Unit
    position: int

    def __call__(self) -> Sample:
        return self.prefetcher.collect(self.unit, self.position)
