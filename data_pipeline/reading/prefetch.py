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

import numpy as np

from data_pipeline.common.errors import BadSample
from data_pipeline.common.pool import DaemonPool
from data_pipeline.order.mixture import MixedOrder
from data_pipeline.order.order import Order
from data_pipeline.reading.rows import RowReader, Run, Sample, runs_of
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
    """Samples of one shard, fetched together: neighbours by one request, those of a compressed shard in one pass."""

    shard: int
    rows: dict[int, tuple[int, int, int]]
    """Position -> (row, first byte, end byte)."""
    begin: int
    end: int
    runs: dict[int, list[tuple[int, int]]] | None = None
    """Position -> runs to read, (first byte, end byte), in a compressed shard, or if the members of the unit's only
    sample lie far apart; else None: everything from `begin` to `end` is read."""
    future: Future[dict[int, list[Run]]] | None = None
    """By position, the runs of each sample not yet collected."""

    @property
    def size(self) -> int:
        """The bytes to request."""
        if self.runs is None:
            return self.end - self.begin
        return sum(end - begin for runs in self.runs.values() for begin, end in runs)

    def is_near(self, begin: int) -> bool:
        """Return whether a sample that starts here is close enough to extend this unit to."""
        gap = begin - self.end
        if self.runs is not None or begin < self.begin or gap > GAP:
            return False
        if gap <= SMALL_GAP:
            return True
        wanted = sum(last - first for _, first, last in self.rows.values())
        return begin - self.begin <= 2 * wanted


class Prefetcher:
    """Iterates over positions in order, yielding for each a function that returns its sample; prefetches remote bytes.

    If the windows of all lanes fit into the budget, neighbouring samples of a window are fetched in ranges of a few
    megabytes and wait in memory for their turn; with a disk cache they wait there. Otherwise every sample is a request
    of its own. Of a compressed shard, which can only be read from its beginning, one pass fetches as many samples of a
    window as a lane's share of the budget holds.

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
        self._late: deque[_Unit] = deque()  # delivered before there was room to request them
        windows = max(lanes, 1) * (len(order.orders) if isinstance(order, MixedOrder) else 1)
        self._pass = int(budget / windows)  # most bytes that one pass over a compressed shard keeps
        self._lock = threading.Lock()
        self._said_scattered = False
        window = window_bytes(reader.dataset, reader.config) * lanes
        self.whole_windows = window <= budget and reader.cache is None  # a disk cache keeps neighbours anyway
        self._pool: DaemonPool | None = None
        self._all_direct = all(map(reader.is_direct, range(len(reader.dataset.urls))))
        some_plain = not all(one.compressed for one in reader.dataset.summaries)
        if window > budget and reader.cache is None and some_plain and not self._all_direct:
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
            self._requested = max(self._requested - 1, 0)
            unit = self._units.pop(position)
            with self._lock:
                if unit.future is None:
                    self._late.append(unit)
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
        """Request units in the order of need as the budget allows, but one if nothing is held.

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
                with self._lock:
                    if unit.future is None and (self._late or not self._fits(unit)):
                        return
                    self._request(unit)
            self._requested += 1

    def _fits(self, unit: _Unit) -> bool:
        return not self._held or self._held + unit.size <= self._budget

    def _request(self, unit: _Unit) -> Future[dict[int, list[Run]]]:
        """Request a unit unless it is; the lock is held."""
        if unit.future is None:
            self._held += unit.size
            self._pool = self._pool or DaemonPool(CONNECTIONS, "fetch")
            unit.future = self._pool.submit(self._bring, unit)
        return unit.future

    def _plan(self, position: int, shard: int) -> _Unit:
        """Create the units of the window around a position; return the unit of the position itself."""
        if self._reader.dataset.summaries[shard].compressed:
            return self._plan_pass(position, shard)
        positions = self._window(position) if self.whole_windows else np.array([position])
        _, shards, rows = self._order.locate_many(positions)
        unit: _Unit | None = None
        for place, number, row in zip(positions.tolist(), shards.tolist(), rows.tolist(), strict=True):
            if self._reader.is_direct(number) or self._reader.dataset.summaries[number].compressed:
                continue
            runs = self._runs(number, row)
            if len(runs) != 1:
                self._units[place] = _Unit(number, {place: (row, 0, 0)}, 0, 0, runs={place: runs})
                self._say_scattered(number, runs)
                continue
            ((begin, end),) = runs
            near = unit is not None and unit.shard == number and unit.is_near(begin)
            if unit is None or not near or end - unit.begin > RANGE:
                unit = _Unit(number, {}, begin, end)
            unit.rows[place] = row, begin, end
            unit.end = max(unit.end, end)
            self._units[place] = unit
        return self._units[position]

    def _window(self, position: int) -> np.ndarray:
        """Return the positions from `position` on that this process delivers from its window, in order on disk."""
        positions = self._order.window_of(position)
        mine = positions >= position
        return positions[mine if self._wanted is None else self._wanted(positions) & mine]

    def _plan_pass(self, position: int, shard: int) -> _Unit:
        """Create the unit of a position in a compressed shard, with those that are delivered next from its window."""
        positions = np.sort(self._window(position))
        _, shards, rows = self._order.locate_many(positions)
        unit, size = _Unit(shard, {}, 0, 0, runs={}), 0
        assert unit.runs is not None
        for place, row in zip(positions[shards == shard].tolist(), rows[shards == shard].tolist(), strict=True):
            runs = self._runs(shard, row)
            more = sum(end - begin for begin, end in runs)
            if unit.rows and size + more > self._pass:
                break
            unit.rows[place], unit.runs[place] = (row, 0, 0), runs
            self._units[place] = unit
            size += more
        return unit

    def _runs(self, shard: int, row: int) -> list[tuple[int, int]]:
        """Return the runs of the shard that hold a sample; none for one that `RowReader.read` refuses."""
        index, kept = self._reader.dataset.index(shard)
        places = self._reader.places(index, int(kept[row]))
        try:
            self._reader.check(places)
        except BadSample:
            return []
        return runs_of(places)

    def _say_scattered(self, shard: int, runs: list[tuple[int, int]]) -> None:
        if runs and not self._said_scattered:
            self._said_scattered = True
            logger.warning(
                "%s: the members of a sample are far apart, so each needs its own request, which is slow; `cascade "
                "prepare prepare.kind=shards` packs samples together",
                self._reader.dataset.urls[shard],
            )

    def _bring(self, unit: _Unit) -> dict[int, list[Run]]:
        """Fetch a unit and cut it up, so that the memory of each sample is released when it is collected."""
        if unit.runs is not None:
            wanted = [(position, run) for position, runs in unit.runs.items() for run in runs]
            found: dict[int, list[Run]] = {position: [] for position in unit.rows}
            read = self._reader.read_ranges(unit.shard, [run for _, run in wanted])
            for (position, _), run in zip(wanted, read, strict=True):
                found[position].append(run)
            return found
        data = self._reader.read_range(unit.shard, unit.begin, unit.end)
        cut = {position: [(a, data[a - unit.begin : b - unit.begin])] for position, (_, a, b) in unit.rows.items()}
        with self._lock:
            self._held -= len(data) - sum(len(kept) for ((_, kept),) in cut.values())
        return cut

    def collect(self, unit: _Unit, position: int) -> Sample:
        """Wait for a unit and take one sample out of it. Raises what reading it raised; see `RowReader.read`."""
        with self._lock:
            future = self._request(unit)
        runs = future.result().pop(position)
        with self._lock:
            self._held -= sum(len(data) for _, data in runs)
            while self._late and (self._late[0].future is not None or self._fits(self._late[0])):
                self._request(self._late.popleft())
        row = unit.rows[position][0]
        return self._reader.sample_from(unit.shard, row, runs) if runs else self._reader.read(unit.shard, row)

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
