"""The shards of a run as one data set: samples per shard after the filters, and a fingerprint of the whole."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.common.errors import CascadeError, DataError, ShardsError, main_reason
from data_pipeline.common.progress import progress
from data_pipeline.common.recent import Recent
from data_pipeline.common.team import ALONE, Team
from data_pipeline.config import CaptionConfig, DataConfig, FilterConfig, MembersConfig
from data_pipeline.content.members import advice, more_captions
from data_pipeline.shards.filters import keep_rows, score_advice
from data_pipeline.shards.index import (
    ShardIndex,
    build_index,
    index_shard,
    load_index,
    load_meta,
    parse_index,
    read_index,
    save_index,
)
from data_pipeline.shards.summaries import (
    Summary,
    read_summaries,
    summarize,
    summarize_meta,
    summary_url,
    write_summaries,
)
from data_pipeline.storage import store
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.storage.retry import Patience

logger = logging.getLogger(__name__)

NOT_INDEXED = "not indexed"
HARMLESS = ("bad_json", "bad_score", "box_labels", "json_as_caption", "unused_image", "unused_caption")
"""Problems not reported at every start, because they cost no sample."""
_CACHED = 64
"""Number of indexes kept in memory before `Dataset.expect` sets another."""
_THREADS = 16
_WINDOW_BYTES, _SMALLEST_WINDOW = 700_000_000, 8


class Dataset:
    """Shards, their sample counts after filters, and their indexes, loaded on demand. Picklable and thread-safe."""

    def __init__(
        self, summaries: list[Summary], rules: FilterConfig, patience: Patience, names: MembersConfig | None = None
    ) -> None:
        self.summaries, self.rules, self.patience = summaries, rules, patience
        self.cache: DiskCache | None = None
        """Caches indexes from an object store on the node's disk."""
        self.names = names or MembersConfig()
        self.urls = [summary.entry.url for summary in summaries]
        self.counts = np.array([summary.kept for summary in summaries], np.int64)
        self.samples = int(self.counts.sum())
        """Samples that are used."""
        self.total = sum(summary.samples for summary in summaries)
        """Samples in the shards."""
        self.dropped: Counter[str] = Counter()
        """Samples that are not used, by reason."""
        self.problems: Counter[str] = Counter()
        """Damage to shards found while indexing, by reason."""
        for summary in summaries:
            self.dropped.update(summary.dropped)
            self.problems.update(summary.problems)
        self._cache: Recent[int, tuple[ShardIndex, np.ndarray]] = Recent(_CACHED)

    @property
    def fingerprint(self) -> str:
        """Hash of what determines the order: names and contents of the shards, and filters; not their location."""
        return str(self._description["fingerprint"])

    def describe(self) -> dict[str, Any]:
        """Return the fingerprint and what it is made of, for comparing data sets."""
        return dict(self._description)

    @cached_property
    def _description(self) -> dict[str, Any]:
        names = [[store.basename(s.entry.url), s.samples, s.digest] for s in self.summaries]
        content = hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest()
        rules = self.rules.in_force()
        whole = hashlib.blake2b(json.dumps([content, rules, self.samples]).encode(), digest_size=8).hexdigest()
        return {
            "fingerprint": whole,
            "shards": len(self.urls),
            "samples": self.samples,
            "content": content,
            "filter": rules,
        }

    @cached_property
    def licences(self) -> dict[str, int]:
        """Licence -> number of used samples, most frequent first.

        Samples that state none count as `unknown`; those in indexes of earlier versions, which did not record licences,
        as `not indexed`.
        """
        counts: Counter[str] = Counter()
        for summary in self.summaries:
            counts.update(summary.licences)
            counts[NOT_INDEXED] += summary.kept - sum(summary.licences.values())
        return {name: count for name, count in counts.most_common() if count}

    @property
    def mean_bytes(self) -> float:
        """Mean size of a sample in its shard, bytes."""
        return sum(summary.entry.size for summary in self.summaries) / max(self.total, 1)

    def keep_in(self, cache: DiskCache | None) -> None:
        """Cache indexes from an object store in `cache` from now on; None: do not cache."""
        self.cache = cache

    def expect(self, lanes: float, window: int) -> None:
        """Keep as many indexes in memory as this many lanes need, each for its current window and the next."""
        shards = window * len(self.urls) / max(self.samples, 1)
        self._cache.room = math.ceil(lanes * (shards + 2)) + 8

    def index(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        """Return the index of a shard and the rows that are used, int64 (n,). Rebuilds a missing or damaged index.

        Raises:
            DataError, StoreError: the shard is gone, has changed or is out of reach.
        """
        known = self._cache.get(shard)
        if known is not None:
            return known
        summary = self.summaries[shard]
        index = self._stored_index(summary)
        if index is None:
            index = index_shard(summary.entry.url, self.patience, names=self.names)
            if index.digest != summary.digest:
                raise DataError(f"{summary.entry.url}: the shard changed while the run was using it")
            logger.warning("%s: its index is missing or damaged; rebuilding it", summary.entry.url)
            with suppress(CascadeError, OSError):
                save_index(index, summary.place, self.patience)
        return self._cache.put(shard, (index, keep_rows(index, self.rules)[0]))

    def _stored_index(self, summary: Summary) -> ShardIndex | None:
        """Load an index from the node's disk or from its place; None if it is missing, damaged or out of date."""
        url, place = summary.entry.url, summary.place
        if self.cache is not None and store.is_remote(place):
            for fresh in (False, True):  # the copy on the disk may be damaged
                content = self.cache.whole(
                    f"{place}#{summary.digest}", lambda: store.read_bytes(place, self.patience), fresh
                )
                index = None if content is None else parse_index(url, place, content)
                if index is not None and index.digest == summary.digest:
                    return index
        index = read_index(url, place, self.patience)
        return index if index is not None and index.digest == summary.digest else None

    def sets(self) -> dict[str, Dataset]:
        """Return the data sets of a mixture by name; without a mixture, {"": self}."""
        return {"": self}

    def name_of(self, shard: int) -> str:
        """Return the name of the data set that a shard belongs to; empty without a mixture."""
        return ""

    def alike(self, shard: int) -> tuple[int, np.ndarray]:
        """Return the shards that substitutes may come from: the number of the first, and the samples in each."""
        return 0, self.counts

    def key(self, shard: int, row: int) -> str:
        """Return the key of a sample; `row` counts the samples that are used."""
        index, rows = self.index(shard)
        return index.key(int(rows[row]))


def window_of(dataset: Dataset, config: DataConfig) -> int:
    """Return the effective window: `data.window`, or the largest power of two for which memory can hold all windows.

    Whole windows can then be read at once over s3://. It must not depend on the number of processes, because the order
    depends on it.
    """
    if config.window:
        return config.window
    room = _WINDOW_BYTES * max(config.global_batch / 256, 1) / config.lane_count
    samples = min(max(room / max(dataset.mean_bytes, 1), _SMALLEST_WINDOW), 1024)
    return 1 << int(math.log2(samples))


def node_cache(config: DataConfig) -> DiskCache | None:
    """Return the disk cache in `data.cache_dir`, which the processes of a node share; None if it is not set."""
    return DiskCache(config.cache_dir, int(config.cache_gb * 1e9)) if config.cache_dir else None


def patience_of(config: DataConfig) -> Patience:
    """Return the retry limits (`data.stall_s`, `data.deadline_s`) for reading data."""
    return Patience(stall_s=config.stall_s, deadline_s=config.deadline_s, hurry=True, reads=True)


def load_or_build(
    urls: list[str], config: DataConfig, may_be_empty: bool = False, team: Team = ALONE, every_caption: bool = False
) -> Dataset:
    """Return the data set of these shards, after indexing those without a valid index (which is logged).

    Args:
        urls: the shards.
        config: the `data` section; its `shards` is not read.
        may_be_empty: it is part of a data set that is reported as a whole: report nothing, even if no sample is left.
        team: the first process asks the store; missing indexes are built by all, each its share.
        every_caption: further captions of a sample are used, whatever `data.captions` says.

    Raises:
        DataError: a shard is missing or not a tar archive, or the filters leave no sample.
        StoreError: the store kept failing until the deadline.
    """
    patience = patience_of(config)
    entries, loaded, known_at, known = team.once(lambda: _look_up(urls, config, patience))
    missing = [number for number, summary in enumerate(loaded) if summary is None]
    if missing:
        logger.warning(
            "no index for %d of %d shards: building it now, once (`cascade index` does it in advance)",
            len(missing),
            len(urls),
        )
        mine = missing[team.rank :: team.count]
        for built in team.everyone(lambda: dict(_build_all(mine, entries, config, patience, team.start))):
            for number, summary in built.items():
                loaded[number] = summary
    summaries = _seen_here([summary for summary in loaded if summary is not None], config, patience, team.start)
    if known < len(summaries) and team.rank == 0:
        write_summaries(known_at, summaries, patience)
    dataset = Dataset(summaries, config.filter, patience, config.members)
    if not may_be_empty:
        team.once(lambda: _report(dataset, None if every_caption else config.captions))
    return dataset


def _look_up(
    urls: list[str], config: DataConfig, patience: Patience
) -> tuple[list[store.Entry], list[Summary | None], str, int]:
    """Look up the shards in the store.

    Returns:
        The shards as the store describes them; the summary of each, None without a valid index; the URL of the file of
        summaries; and how many summaries came from it.
    """
    entries = store.describe(urls, patience)
    known_at = summary_url(entries, config.filter, config.index_dir, config.members)
    known = read_summaries(known_at, entries, patience)
    with ThreadPoolExecutor(_THREADS) as pool:
        loaded = list(pool.map(lambda entry: known.get(entry.url) or _load(entry, config, patience), entries))
    return entries, loaded, known_at, len(known)


def _seen_here(summaries: list[Summary], config: DataConfig, patience: Patience, start: float) -> list[Summary]:
    """Return the summaries, after building indexes that another machine has but this one does not.

    Indexes of a read-only store are kept in a directory (`data.index_dir`), which need not be shared.
    """
    apart = [
        number
        for number, one in enumerate(summaries)
        if store.is_remote(one.entry.url) and not store.is_remote(one.place)
    ]
    if not apart or all(os.path.exists(summaries[apart[end]].place) for end in (0, -1)):
        return summaries
    here = list(summaries)
    for number, summary in _build_all(apart, [one.entry for one in summaries], config, patience, start):
        here[number] = summary
    return here


def _build_all(
    missing: list[int], entries: list[store.Entry], config: DataConfig, patience: Patience, start: float
) -> Iterator[tuple[int, Summary]]:
    """Index shards with a progress bar. Processes begin at different places (`Team.start`) and reuse what others have
    finished."""
    first = int(start * len(missing))
    order = missing[first:] + missing[:first]

    def build(number: int) -> tuple[int, Summary]:
        found = _load(entries[number], config, patience)
        if found is None:
            index = build_index(entries[number], config.index_dir, patience, config.members)
            found = summarize(index, entries[number], index.place, config.filter)
        return number, found

    with ThreadPoolExecutor(_THREADS) as pool:
        built = pool.map(build, order)
        yield from progress(built, total=len(order), desc="index", unit="shard", disable=len(order) < 8)


def _load(entry: store.Entry, config: DataConfig, patience: Patience) -> Summary | None:
    if not config.filter.in_force():
        found = load_meta(entry, config.index_dir, patience, config.members)
        if found is not None:
            return summarize_meta(found[0], entry, found[1])
    index = stored_index(entry, config, patience)
    return None if index is None else summarize(index, entry, index.place, config.filter)


def stored_index(entry: store.Entry, config: DataConfig, patience: Patience) -> ShardIndex | None:
    """Return the stored index of a shard if it is valid for the shard and these settings, else None."""
    return load_index(entry.url, config.index_dir, entry, patience, config.members, bool(config.filter.licences))


def _unused_captions(dataset: Dataset, config: CaptionConfig) -> Iterator[str]:
    """Say which captions beside the used ones are not used, judged by the first shard with any, and how to."""
    summary = next((one for one in dataset.summaries if one.problems.get("unused_caption")), None)
    if summary is None or config.members:
        return
    index = read_index(summary.entry.url, summary.place, dataset.patience)
    layouts = set(index.column("layout").to_pylist()) if index is not None else set()
    names = Counter(name for layout in layouts for name in more_captions(layout.split("/"), ["*"]))
    if names:
        count = dataset.problems["unused_caption"]
        found = ", ".join(f".{name}" for name, _ in names.most_common(8))
        setting = ", ".join(f'"member:{name}": 1' for name, _ in names.most_common(8))
        yield (
            f"{count} further captions are not used, such as {found} in {summary.entry.url}: "
            f"'data.captions.sources={{txt: 1, {setting}}}' draws from all of them"
        )


def _report(dataset: Dataset, config: CaptionConfig | None) -> None:
    for summary in dataset.summaries:
        damage = {
            name: n for name, n in summary.problems.items() if name not in summary.dropped and name not in HARMLESS
        }
        if damage:
            logger.warning("%s: %s", summary.entry.url, ", ".join(f"{n} x {name}" for name, n in damage.items()))
        if summary.compressed:
            logger.warning(
                "%s: it is compressed, so every read starts at its beginning; store it as a plain tar",
                summary.entry.url,
            )
    for words in _unused_captions(dataset, config) if config is not None else ():
        logger.warning("%s", words)
    hint = _hint(dataset)
    if dataset.dropped:
        reasons = ", ".join(f"{count} {name}" for name, count in dataset.dropped.most_common())
        logger.warning("%d of %d samples are used; dropped: %s%s", dataset.samples, dataset.total, reasons, hint)
    if not dataset.samples:
        reasons = ", ".join(f"{n} {name}" for name, n in (dataset.dropped | dataset.problems).most_common())
        raise ShardsError(
            f": no sample of {dataset.total} in {len(dataset.urls)} shards is left "
            f"({reasons or 'all empty'}{hint}); loosen data.filter, set data.members or give other shards"
        )


def _hint(dataset: Dataset) -> str:
    """Return a remedy if most samples were dropped for one reason, judged by the first shard affected."""
    reason = main_reason(dataset.dropped, dataset.total)
    if not reason:
        return ""
    summary = next(summary for summary in dataset.summaries if reason in summary.dropped)
    index = read_index(summary.entry.url, summary.place, dataset.patience)
    words = score_advice(reason) or (advice(reason, index.layouts_of(reason)) if index is not None else "")
    return f" ({words})" if words else ""
