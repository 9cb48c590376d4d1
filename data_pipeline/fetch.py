"""Raw samples by place and by position: local files by `pread`, remote shards by ranged requests ahead of need."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_pipeline import store
from data_pipeline.chance import below
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Dataset
from data_pipeline.errors import BadSample, DataError
from data_pipeline.order import Order
from data_pipeline.pool import DaemonPool
from data_pipeline.shard_index import Part, ShardIndex
from data_pipeline.tar import Gunzip

logger = logging.getLogger(__name__)

GAP = 1 << 20
"""Bytes between two wanted samples that are read through rather than skipped by a new request."""
RANGE = 4 << 20
"""Bytes per request where whole windows are read."""
CONNECTIONS = 16
_OPEN_FILES = 64
_REREADS = 2
_SAME_SHARD, _ANYWHERE = 16, 64

Sample = dict[str, Any]


class RowReader:
    """Reads any sample of a data set, every member verified against the index. Safe to use from several threads."""

    def __init__(self, dataset: Dataset, config: DataConfig) -> None:
        self.dataset, self.config = dataset, config
        self._files: OrderedDict[int, int] = OrderedDict()
        self._in_use: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> Sample:
        """One sample: `__key__`, `__url__` and the bytes of each member by extension.

        Raises:
            BadSample: `checksum`, when the bytes differ from the index however often they are read.
            DataError, StoreError: the shard is gone, changed or out of reach.
        """
        index, rows = self.dataset.index(shard)
        physical = int(rows[row])
        parts = index.parts(physical)
        begin, end = min(part.offset for part in parts), max(part.offset + part.size for part in parts)
        for _ in range(1 + _REREADS):
            if self.is_direct(shard):
                members = {part.extension: self._pread(shard, index.url, part) for part in parts}
            else:
                data = self.read_range(shard, begin, end)
                members = {part.extension: data[part.offset - begin :][: part.size] for part in parts}
            wrong = _mismatch(members, parts)
            if not wrong:
                return {"__key__": index.key(physical), "__url__": index.url, **members}
        raise BadSample("checksum", f"{wrong} differs from its index; the shard was changed or damaged")

    def is_direct(self, shard: int) -> bool:
        """A plain local file, of which any sample is at hand for one system call."""
        summary = self.dataset.summaries[shard]
        return not summary.compressed and not store.is_s3(summary.entry.url)

    def read_range(self, shard: int, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a shard, after decompression."""
        summary = self.dataset.summaries[shard]
        url, etag, patience = summary.entry.url, summary.entry.etag, self.dataset.patience
        if not summary.compressed:
            return store.read_range(url, begin, end, etag, patience)
        with store.open_stream(url, etag=etag if store.is_s3(url) else None, patience=patience) as stream:
            return _skip_and_read(Gunzip(stream), begin, end, url)

    def sample_from(self, shard: int, row: int, begin: int, data: bytes) -> Sample:
        """The sample out of bytes [begin, ...) of its shard; one that does not verify is read again by itself."""
        index, rows = self.dataset.index(shard)
        physical = int(rows[row])
        parts = index.parts(physical)
        members = {part.extension: data[part.offset - begin :][: part.size] for part in parts}
        if _mismatch(members, parts):
            logger.warning("%s: %s does not verify; reading it again", index.url, index.key(physical))
            return self.read(shard, row)
        return {"__key__": index.key(physical), "__url__": index.url, **members}

    def _pread(self, shard: int, url: str, part: Part) -> bytes:
        handle = self._open(shard, url)
        try:
            data = os.pread(handle, part.size, part.offset)
            while 0 < len(data) < part.size:
                more = os.pread(handle, part.size - len(data), part.offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise DataError(f"{url}: {error.strerror or error}") from error
        finally:
            self._release(handle)
        if len(data) < part.size:
            raise DataError(
                f"{url}: it ends inside a sample that its index places at byte {part.offset}; run `cascade index` again"
            )
        return data

    def _open(self, shard: int, url: str) -> int:
        """The shard's file descriptor, counted as in use; the least recently used idle ones are closed."""
        with self._lock:
            handle = self._files.get(shard)
            if handle is None:
                try:
                    handle = os.open(store.local_path(url), os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise DataError(f"{url}: {error.strerror or error}") from error
                self._files[shard] = handle
            self._files.move_to_end(shard)
            self._in_use[handle] = self._in_use.get(handle, 0) + 1
            idle = [old for old, file in self._files.items() if not self._in_use.get(file)]
            for old in idle[: max(len(self._files) - _OPEN_FILES, 0)]:
                os.close(self._files.pop(old))
            return handle

    def _release(self, handle: int) -> None:
        with self._lock:
            self._in_use[handle] -= 1

    def close(self) -> None:
        with self._lock:
            for handle in self._files.values():
                os.close(handle)
            self._files.clear()


def _mismatch(members: dict[str, bytes], parts: list[Part]) -> str:
    """The first member whose checksum is wrong, or an empty string."""
    for part in parts:
        if xxhash.xxh3_64_intdigest(members[part.extension]) != part.checksum:
            return f"member .{part.extension} at byte {part.offset}"
    return ""


def _skip_and_read(stream: Gunzip, begin: int, end: int, url: str) -> bytes:
    position, kept = 0, bytearray()
    while position < end:
        piece = stream.read(1 << 20)
        if not piece:
            raise DataError(f"{url}: the compressed shard ends at byte {position}, its index says {end}")
        kept += piece[max(begin - position, 0) : end - position]
        position += len(piece)
    return bytes(kept)


def substitutes(dataset: Dataset, seed: int, position: int, shard: int) -> Iterator[tuple[int, int]]:
    """Places to try instead of a bad sample, always the same: first in its own shard, then anywhere."""
    for attempt in range(_ANYWHERE):
        if attempt < _SAME_SHARD:
            yield shard, below(int(dataset.counts[shard]), seed, position, f"substitute/{attempt}")
        else:
            ends = np.cumsum(dataset.counts)
            place = below(dataset.samples, seed, position, f"substitute/{attempt}")
            other = int(np.searchsorted(ends, place, side="right"))
            yield other, int(place - (ends[other] - dataset.counts[other]))


@dataclass
class Taken:
    """A sample that was delivered for a position, and the bad ones that it stands in for."""

    position: int
    value: Any
    failures: list[dict[str, Any]] = field(default_factory=list)


def take(
    reader: RowReader,
    seed: int,
    position: int,
    shard: int,
    row: int,
    first: Callable[[], Sample],
    use: Callable[[Sample], Any],
) -> Taken:
    """`use(first())`; where that raises `BadSample`, the same with deterministic substitutes.

    Raises:
        DataError: none of the substitutes can be used either.
    """
    failures: list[dict[str, Any]] = []
    places = substitutes(reader.dataset, seed, position, shard)
    get = first
    while True:
        try:
            sample = get()
            sample["__position__"] = position
            return Taken(position, use(sample), failures)
        except BadSample as bad:
            failures.append(_record(reader.dataset, position, shard, row, bad))
        place = next(places, None)
        if place is None:
            reasons = ", ".join(sorted({failure["reason"] for failure in failures}))
            raise DataError(
                f"{failures[0]['shard']}: sample {failures[0]['key']!r} and all {_ANYWHERE} substitutes for it are bad "
                f"({reasons}); check the data with `cascade verify`"
            )
        shard, row = place
        get = _Read(reader, shard, row)


@dataclass
class _Read:
    reader: RowReader
    shard: int
    row: int

    def __call__(self) -> Sample:
        return self.reader.read(self.shard, self.row)


def _record(dataset: Dataset, position: int, shard: int, row: int, bad: BadSample) -> dict[str, Any]:
    index, rows = dataset.index(shard)
    physical = int(rows[row])
    return {
        "shard": index.url,
        "key": index.key(physical),
        "offset": min(part.offset for part in index.parts(physical)),
        "reason": bad.reason,
        "detail": bad.detail,
        "position": position,
    }


@dataclass
class _Unit:
    """Neighbouring samples of one shard that one request brings."""

    shard: int
    rows: dict[int, tuple[int, int, int]]
    """Position -> (row, first byte, end byte)."""
    begin: int
    end: int
    future: Future[dict[int, bytes]] | None = None
    """The bytes of each sample that has not been collected, by position."""


class Prefetcher:
    """Walks positions in order and hands out, for each, how to get its sample; remote bytes are requested ahead.

    Where the windows of all lanes fit into the budget, a window's neighbours come in ranges of some megabytes and
    wait in memory for their turn; else every sample is its own request.

    Args:
        positions: the positions to deliver, ascending inside each lane.
        wanted: which of given positions this process will deliver, (n,) -> bool (n,); None: all of the lanes it meets.
        lanes: number of lanes it meets, for the estimate of memory.
        budget: bytes of raw samples held.
    """

    def __init__(
        self,
        reader: RowReader,
        order: Order,
        positions: Iterable[np.ndarray],
        lanes: int,
        budget: int,
        wanted: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._reader, self._order, self._wanted = reader, order, wanted
        self._batches = iter(positions)
        self._ahead: deque[tuple[int, int, int]] = deque()  # located, not yet handed out
        self._requested = 0  # how many of those have had their unit requested
        self._units: dict[int, _Unit] = {}
        self._budget, self._held = budget, 0
        self._lock = threading.Lock()
        window = order.window * reader.dataset.mean_bytes * lanes
        self.whole_windows = window <= budget
        self._pool: DaemonPool | None = None
        if not self.whole_windows and not all(map(reader.is_direct, range(len(reader.dataset.urls)))):
            logger.warning(
                "%d lanes of windows need about %.1f GB and data.prefetch_mb allows %.1f: samples are requested one "
                "by one; a smaller data.window, more processes or data.cache_dir make reading faster",
                lanes, window / 1e9, budget / 1e9,
            )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, int, int, Callable[[], Sample]]]:
        """(position, shard, row, a function that waits for the sample and returns it)."""
        while self._fill(1):
            position, shard, row = self._ahead[0]
            if self._reader.is_direct(shard):
                self._ahead.popleft()
                self._requested = max(self._requested - 1, 0)
                yield position, shard, row, _Read(self._reader, shard, row)
                continue
            self._pump()
            self._ahead.popleft()
            self._requested -= 1
            unit = self._units.pop(position)
            yield position, shard, row, _Wait(self, unit, position)

    def _fill(self, count: int) -> bool:
        """Locates positions until `count` are known ahead; whether any are."""
        while len(self._ahead) < count:
            batch = next(self._batches, None)
            if batch is None:
                break
            _, shards, rows = self._order.locate_many(batch)
            self._ahead.extend(zip(batch.tolist(), shards.tolist(), rows.tolist(), strict=True))
        return bool(self._ahead)

    def _pump(self) -> None:
        """Requests units in the order of need: always the one that is needed now, others as the budget allows."""
        while True:
            if self._requested >= len(self._ahead) and not self._fill(self._requested + 1):
                return
            if self._requested >= len(self._ahead):
                return
            position, shard, _ = self._ahead[self._requested]
            if not self._reader.is_direct(shard):
                unit = self._units.get(position) or self._plan(position, shard)
                if unit.future is None:
                    size = unit.end - unit.begin
                    with self._lock:
                        if self._requested > 0 and self._held + size > self._budget:
                            return
                        self._held += size
                    self._pool = self._pool or DaemonPool(CONNECTIONS, "fetch")
                    unit.future = self._pool.submit(self._bring, unit)
            self._requested += 1

    def _plan(self, position: int, shard: int) -> _Unit:
        """Makes the units of the window around a position."""
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
            index, kept = self._reader.dataset.index(number)
            begin, end = _span(index, int(kept[row]))
            near = unit is not None and unit.shard == number and begin >= unit.begin and begin - unit.end <= GAP
            if unit is None or not near or end - unit.begin > limit:
                unit = _Unit(number, {}, begin, end)
            unit.rows[place] = row, begin, end
            unit.end = max(unit.end, end)
            self._units[place] = unit
        return self._units[position]

    def _bring(self, unit: _Unit) -> dict[int, bytes]:
        """Requests a unit and cuts it up, so that each sample's memory is free once it is collected."""
        data = self._reader.read_range(unit.shard, unit.begin, unit.end)
        wanted = {position: data[a - unit.begin : b - unit.begin] for position, (_, a, b) in unit.rows.items()}
        with self._lock:
            self._held -= len(data) - sum(map(len, wanted.values()))
        return wanted

    def collect(self, unit: _Unit, position: int) -> Sample:
        """Waits for a unit and takes one sample out of it."""
        assert unit.future is not None
        data = unit.future.result().pop(position)
        with self._lock:
            self._held -= len(data)
        row, begin, _ = unit.rows[position]
        return self._reader.sample_from(unit.shard, row, begin, data)

    def close(self) -> None:
        """Drops what is requested and not delivered."""
        if self._pool is not None:
            self._pool.close()


@dataclass
class _Wait:
    prefetcher: Prefetcher
    unit: _Unit
    position: int

    def __call__(self) -> Sample:
        return self.prefetcher.collect(self.unit, self.position)


def _span(index: ShardIndex, row: int) -> tuple[int, int]:
    parts = index.parts(row)
    return min(part.offset for part in parts), max(part.offset + part.size for part in parts)
