"""Reads raw samples by shard and row, verified against the index; picks substitutes for bad ones."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_pipeline.common.errors import PASSING, BadSample, DataError, system_words
from data_pipeline.common.recent import Recent
from data_pipeline.config import DataConfig
from data_pipeline.content.members import IMAGE_EXTENSIONS, more_captions
from data_pipeline.order.chance import hash_below
from data_pipeline.shards.dataset import Dataset, node_cache
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.tar import MAX_MEMBER, MAX_TEXT, Gunzip
from data_pipeline.storage import store
from data_pipeline.storage.retry import Patience, persist
from data_pipeline.storage.s3_errors import changed

logger = logging.getLogger(__name__)

_OPEN_FILES = 512
FAR = 512 << 10
"""Members of a sample further apart than this many bytes are read separately."""
_ONE_READ = 24 << 10
"""Members that end within this many bytes are read together. Cutting them apart takes a copy, which for more bytes
costs more than another system call."""
_REREADS = 2
_SAME_SHARD, _ANYWHERE = 16, 64

Sample = dict[str, Any]
_digest = xxhash.xxh3_64_intdigest
_Place = tuple[str, int, int, int]
Run = tuple[int, bytes]
"""First byte of a run of a shard, and its bytes."""


class _File:
    """An open file that closes when the last reference to it is dropped."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._url, self._patience, self._descriptor = url, patience, -1
        try:
            self._descriptor = persist(url, self._open, patience)
        except OSError as error:
            raise DataError(f"{url}: {system_words(error)}") from error

    def _open(self) -> int:
        return os.open(store.local_path(self._url), os.O_RDONLY | os.O_CLOEXEC)

    def read(self, begin: int, end: int) -> bytes:
        """Read bytes [begin, end), if possible with one system call and no copy.

        Raises:
            DataError: the file is shorter, or cannot be read.
            StoreError: its file system kept failing.
        """
        try:
            try:
                return self._read(begin, end)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                return persist(self._url, lambda: self._read_again(begin, end), self._patience)
        except OSError as error:
            raise DataError(f"{self._url}: {system_words(error)}") from error

    def _read(self, begin: int, end: int) -> bytes:
        data = os.pread(self._descriptor, end - begin, begin)
        while len(data) < end - begin:
            more = os.pread(self._descriptor, end - begin - len(data), begin + len(data))
            if not more:
                raise DataError(
                    f"{self._url}: it ends before byte {end}, where its index has a sample; run `cascade index`"
                )
            data += more
        return data

    def _read_again(self, begin: int, end: int) -> bytes:
        """Open the file again, in the place of the one that other threads may be reading, and read."""
        store.reopen(store.local_path(self._url), self._descriptor)
        return self._read(begin, end)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class RowReader:
    """Reads any sample of a data set and verifies every member against the index. Thread-safe.

    Args:
        dataset: what to read from.
        config: its `data.cache_dir` is used.
        extensions: extensions of the members to read, besides those that `data.captions.sources` names; others are
            skipped, however large. None: read all.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, extensions: Collection[str] | None = None) -> None:
        self.dataset, self.config, self._extensions = dataset, config, extensions
        self._direct = [not s.compressed and not store.is_remote(s.entry.url) for s in dataset.summaries]
        parts = config.parts() if extensions is not None else {}
        self._captions = sorted({name for own in parts.values() for name in own.captions.members})
        self._files: Recent[int, _File] = Recent(_OPEN_FILES)
        self.cache = node_cache(config)
        dataset.keep_in(self.cache)

    def read(self, shard: int, row: int) -> Sample:
        """Read one sample: `__key__`, `__url__` and the bytes of each member by extension; in a mixture `__dataset__`.

        Args:
            shard: number of the shard.
            row: row of the shard, counting only samples that pass the filters.

        Raises:
            BadSample: `checksum`, the bytes differ from the index even after rereading; `too_large`, see `check`.
            DataError, StoreError: the shard is gone, has changed or is out of reach.
        """
        index, rows = self.dataset.index(shard)
        physical = rows.item(row)
        parts = self.places(index, physical)
        self.check(parts)
        for attempt in range(1 + _REREADS):
            sample, wrong = self._read(shard, index, physical, parts, fresh=attempt > 0)
            if not wrong:
                return self._named(sample, shard)
        self._check_unchanged(shard)
        raise BadSample("checksum", f"{wrong} differs from its index; the shard has changed or is damaged")

    def _check_unchanged(self, shard: int) -> None:
        """Raise an error if an object is no longer the one that was indexed; reads over s3:// find that themselves."""
        entry = self.dataset.summaries[shard].entry
        if entry.etag and store.is_remote(entry.url):
            found = store.entry(entry.url, self.dataset.patience)
            if (found.size, found.etag) != (entry.size, entry.etag):
                raise changed(entry.url)

    def places(self, index: ShardIndex, row: int) -> list[_Place]:
        """Return (extension, first byte, size, checksum) of each wanted member; `row` counts all samples of the file.

        Without any wanted member, all members are returned.
        """
        places = index.places(row)
        if self._extensions is None:
            return places
        wanted = [place for place in places if place[0] in self._extensions or self._is_caption(place[0])]
        return [place for place in wanted if place[0] in IMAGE_EXTENSIONS or place[2] <= MAX_TEXT] or places

    def _is_caption(self, name: str) -> bool:
        return bool(self._captions) and bool(more_captions([name], self._captions))

    def check(self, places: list[_Place]) -> None:
        """Raise `BadSample` (`too_large`) for a picture above `MAX_MEMBER` bytes, if this reader chooses members.

        Newer indexes do not list such samples.
        """
        extension, _, size, _ = max(places, key=lambda place: place[2])
        if self._extensions is not None and size > MAX_MEMBER:
            limit = MAX_MEMBER >> 20
            raise BadSample("too_large", f"member .{extension} has {size} bytes; at most {limit} MiB are read")

    def _read(self, shard: int, index: ShardIndex, row: int, parts: list[_Place], fresh: bool) -> tuple[Sample, str]:
        if self._direct[shard]:
            # The bound method keeps the file open even if another thread evicts it from the cache.
            return _cut(index, row, parts, (self._files.get(shard) or self._open(shard)).read)
        return _cut(index, row, parts, _among(self.read_ranges(shard, runs_of(parts), fresh)))

    def _open(self, shard: int) -> _File:
        return self._files.put(shard, _File(self.dataset.urls[shard], self.dataset.patience))

    def is_direct(self, shard: int) -> bool:
        """Return whether the shard is a plain local file, any sample of which takes a system call or two."""
        return self._direct[shard]

    def read_range(self, shard: int, begin: int, end: int, fresh: bool = False) -> bytes:
        """Read bytes [begin, end) of a shard, after decompression; `fresh` bypasses the disk cache.

        Raises:
            DataError, StoreError: the shard is gone, has changed or is out of reach.
        """
        summary = self.dataset.summaries[shard]
        url, etag, patience = summary.entry.url, summary.entry.etag, self.dataset.patience
        if not summary.compressed:
            if self.cache is None or not store.is_remote(url):
                return store.read_range(url, begin, end, etag, patience)
            return self.cache.read(
                etag or url,
                summary.entry.size,
                begin,
                end,
                lambda a, b: store.read_range(url, a, b, etag, patience),
                fresh,
            )
        return self.read_ranges(shard, [(begin, end)])[0][1]

    def read_ranges(self, shard: int, runs: Sequence[tuple[int, int]], fresh: bool = False) -> list[Run]:
        """Read several (first byte, end byte) runs of a shard, of a compressed one in a single pass.

        Returns:
            (first byte, bytes) of each, in the same order.
        """
        summary = self.dataset.summaries[shard]
        if not summary.compressed or not runs:
            return [(begin, self.read_range(shard, begin, end, fresh)) for begin, end in runs]
        url = summary.entry.url
        etag = summary.entry.etag if store.is_remote(url) else None
        with store.open_stream(url, etag=etag, patience=self.dataset.patience) as stream:
            return list(zip((begin for begin, _ in runs), _gather(Gunzip(stream), runs, url), strict=True))

    def sample_from(self, shard: int, row: int, runs: Sequence[Run]) -> Sample:
        """Cut a sample out of runs of its shard, (first byte, bytes); if it does not verify, read it again."""
        index, rows = self.dataset.index(shard)
        physical = int(rows[row])
        sample, wrong = _cut(index, physical, self.places(index, physical), _among(runs))
        if wrong:
            key = sample["__key__"]
            logger.warning("%s: %s of %s does not match its checksum; reading it again", index.url, wrong, key)
            return self.read(shard, row)
        return self._named(sample, shard)

    def _named(self, sample: Sample, shard: int) -> Sample:
        """Add the name of the data set, in a mixture."""
        name = self.dataset.name_of(shard)
        if name:
            sample["__dataset__"] = name
        return sample

    def close(self) -> None:
        """Close all files; those that a thread is reading close when it is done."""
        self._files.clear()


def runs_of(parts: list[_Place]) -> list[tuple[int, int]]:
    """Return the (first byte, end byte) runs of a shard that hold a sample.

    There is one run unless the members lie far apart, as in a tar that was packed by file type.
    """
    runs: list[tuple[int, int]] = []
    for _, offset, size, _ in parts:
        if runs and offset - runs[-1][1] <= FAR:
            runs[-1] = runs[-1][0], max(runs[-1][1], offset + size)
        else:
            runs.append((offset, offset + size))
    return runs


def _cut(index: ShardIndex, row: int, parts: list[_Place], read: Callable[[int, int], bytes]) -> tuple[Sample, str]:
    """Return the sample and a description of the first member that does not verify, or "".

    `read` returns bytes [begin, end) of the shard.
    """
    sample: Sample = {"__key__": index.key(row), "__url__": index.url}
    wrong, data = "", b""
    begin = end = -1
    _, last, size, _ = parts[-1]
    last += size
    for extension, offset, size, checksum in parts:
        stop = offset + size
        if stop > end:
            begin, end = offset, last if last - offset <= _ONE_READ else stop
            data = read(begin, end)
        member = data[offset - begin : stop - begin]
        if _digest(member) != checksum:
            wrong = wrong or f"member .{extension} at byte {offset}"
        sample[extension] = member
    return sample, wrong


def _among(runs: Sequence[Run]) -> Callable[[int, int], bytes]:
    """Return a function that returns bytes [first, end) of a shard of which these runs are known."""

    def get(first: int, end: int) -> bytes:
        begin, data = next(run for run in runs if run[0] <= first and end <= run[0] + len(run[1]))
        return data[first - begin : end - begin]

    return get


def _gather(stream: Gunzip, runs: Sequence[tuple[int, int]], url: str) -> list[bytes]:
    """Return the bytes of each (first byte, end byte) run, in any order, and keep nothing else in memory."""
    found = [b""] * len(runs)
    waiting = sorted(range(len(runs)), key=lambda number: runs[number], reverse=True)
    open_runs: dict[int, io.BytesIO] = {}
    position = 0
    while waiting or open_runs:
        piece = stream.read(1 << 20)
        if not piece:
            end = max(runs[number][1] for number in (*waiting, *open_runs))
            raise DataError(
                f"{url}: the compressed shard ends at byte {position}, but its index says {end}; "
                "run `cascade index` again"
            )
        after = position + len(piece)
        while waiting and runs[waiting[-1]][0] < after:
            open_runs[waiting.pop()] = io.BytesIO()
        for number in list(open_runs):
            begin, end = runs[number]
            open_runs[number].write(memoryview(piece)[max(begin - position, 0) : end - position])
            if end <= after:
                found[number] = open_runs.pop(number).getvalue()
        position = after
    return found


def substitutes(dataset: Dataset, seed: int, position: int, shard: int) -> Iterator[tuple[int, int]]:
    """Yield (shard, row) of substitutes for a bad sample: first in its shard, then anywhere in its data set.

    The same arguments always give the same substitutes.
    """
    for attempt in range(_ANYWHERE):
        if attempt < _SAME_SHARD:
            yield shard, hash_below(int(dataset.counts[shard]), seed, position, f"substitute/{attempt}")
        else:
            first, counts = dataset.alike(shard)
            ends = np.cumsum(counts)
            place = hash_below(int(ends[-1]), seed, position, f"substitute/{attempt}")
            other = int(np.searchsorted(ends, place, side="right"))
            yield first + other, int(place - (ends[other] - counts[other]))


@dataclass
class Taken:
    """The sample delivered for a position, and records of the bad ones it replaces."""

    position: int
    value: Any
    failures: list[dict[str, Any]] = field(default_factory=list)


def replace(
    reader: RowReader, seed: int, position: int, shard: int, row: int, bad: BadSample, use: Callable[[Sample], Any]
) -> Taken:
    """Replace a bad sample by the first substitute for which `use` does not raise `BadSample`.

    Raises:
        DataError: all substitutes are bad, too.
    """
    failures = [_record(reader.dataset, position, shard, row, bad)]
    for other, place in substitutes(reader.dataset, seed, position, shard):
        try:
            sample = reader.read(other, place)
            sample["__position__"] = position
            return Taken(position, use(sample), failures)
        except BadSample as worse:
            failures.append(_record(reader.dataset, position, other, place, worse))
    reasons = ", ".join(sorted({failure["reason"] for failure in failures}))
    raise DataError(
        f"{failures[0]['shard']}: sample {failures[0]['key']!r} and all {_ANYWHERE} substitutes for it are bad "
        f"({reasons}: {failures[0]['detail'][:300]}); check the data with `cascade verify`"
    )


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
