"""All shards of a run together: how many samples each gives after the filters, and a fingerprint of the whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline import store
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.errors import DataError
from data_pipeline.retry import Patience
from data_pipeline.shard_index import ShardIndex, index_shard, load_index, read_index, store_index

logger = logging.getLogger(__name__)

_CACHE_BYTES = 384 << 20
_THREADS = 16

# setting -> (index column, reason for the counter, whether a value fails); a sample without the value fails as
# unknown_*
_Rule = tuple[str, str, Callable[[np.ndarray, float], np.ndarray]]
_RULES: dict[str, _Rule] = {
    "min_side": ("side", "too_small", lambda value, limit: value < limit),
    "max_aspect": ("aspect", "aspect_ratio", lambda value, limit: value > limit),
    "min_aesthetic": ("aesthetic", "low_aesthetic", lambda value, limit: value < limit),
    "max_watermark": ("watermark", "watermark", lambda value, limit: value > limit),
    "max_unsafe": ("unsafe", "unsafe", lambda value, limit: value > limit),
    "min_similarity": ("similarity", "low_similarity", lambda value, limit: value < limit),
    "min_caption": ("caption_length", "short_caption", lambda value, limit: value < limit),
    "max_caption": ("caption_length", "long_caption", lambda value, limit: value > limit),
}


def keep_rows(index: ShardIndex, rules: FilterConfig) -> tuple[np.ndarray, Counter[str]]:
    """Which rows of a shard take part, and how many the first rule that they broke threw out, by reason.

    Returns:
        (rows, (k,) int64 ascending; reason -> count, which sums to len(index) - k)
    """
    keep = np.ones(len(index), bool)
    dropped: Counter[str] = Counter()
    problems = index.column("problem").to_pylist() if len(index) else []
    for row, problem in enumerate(problems):
        if problem:
            keep[row] = False
            dropped[problem] += 1
    for setting, (column, reason, fails) in _RULES.items():
        limit = getattr(rules, setting)
        if limit is None:
            continue
        values = _values(index, column)
        for failing, name in ((np.isnan(values), f"unknown_{column}"), (fails(values, limit), reason)):
            out = keep & failing
            if out.any():
                dropped[name] += int(out.sum())
                keep &= ~out
    return np.flatnonzero(keep), dropped


def _values(index: ShardIndex, name: str) -> np.ndarray:
    """A column as float64, nan where unknown."""
    if name in ("side", "aspect"):
        width, height = _values(index, "width"), _values(index, "height")
        short, long = np.minimum(width, height), np.maximum(width, height)
        return short if name == "side" else long / np.maximum(short, 1)
    return index.column(name).to_numpy().astype(np.float64)


@dataclass(frozen=True)
class Summary:
    """What is kept of every shard in memory."""

    entry: store.Entry
    place: str
    """Where its index lies."""
    digest: str
    samples: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)
    compressed: bool = False


class Dataset:
    """Shards, counts after filters, and lazily the indexes. Picklable; safe to use from several threads."""

    def __init__(self, summaries: list[Summary], rules: FilterConfig, patience: Patience) -> None:
        self.summaries, self.rules, self.patience = summaries, rules, patience
        self.urls = [summary.entry.url for summary in summaries]
        self.counts = np.array([summary.kept for summary in summaries], np.int64)
        self.samples = int(self.counts.sum())
        """Samples that take part."""
        self.total = sum(summary.samples for summary in summaries)
        """Samples in the shards."""
        self.dropped: Counter[str] = Counter()
        """Samples that do not take part, by reason."""
        self.problems: Counter[str] = Counter()
        """Damage to shards found while indexing, by reason."""
        for summary in summaries:
            self.dropped.update(summary.dropped)
            self.problems.update(summary.problems)
        self._cache: OrderedDict[int, tuple[ShardIndex, np.ndarray]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the order: shard names, contents and filters (not where the shards lie)."""
        return self.describe()["fingerprint"]

    def describe(self) -> dict[str, Any]:
        """The fingerprint and its ingredients, for comparing two data sets."""
        names = [[store.basename(s.entry.url), s.samples, s.digest] for s in self.summaries]
        content = hashlib.blake2b(json.dumps(names).encode(), digest_size=8).hexdigest()
        rules = {name: value for name, value in asdict(self.rules).items() if value is not None}
        whole = hashlib.blake2b(json.dumps([content, rules, self.samples]).encode(), digest_size=8).hexdigest()
        return {
            "fingerprint": whole,
            "shards": len(self.urls),
            "samples": self.samples,
            "content": content,
            "filter": rules,
        }

    @property
    def mean_bytes(self) -> float:
        """Bytes of shard per sample."""
        return sum(summary.entry.size for summary in self.summaries) / max(self.total, 1)

    def index(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        """The index of a shard and its rows that take part."""
        known = self._cache.get(shard)
        if known is not None:
            return known
        summary = self.summaries[shard]
        index = read_index(summary.entry.url, summary.place, self.patience)
        if index is None or index.digest != summary.digest:
            index = index_shard(summary.entry.url, self.patience)
            if index.digest != summary.digest:
                raise DataError(f"{summary.entry.url}: the shard changed while the run was using it")
        found = index, keep_rows(index, self.rules)[0]
        with self._lock:
            if shard not in self._cache:
                self._cached_bytes += index.table.nbytes
            self._cache[shard] = found
            while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 8:
                _, (old, _) = self._cache.popitem(last=False)
                self._cached_bytes -= old.table.nbytes
        return found

    def key(self, shard: int, row: int) -> str:
        """The key of a sample; `row` counts the samples that take part."""
        index, rows = self.index(shard)
        return index.key(int(rows[row]))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(_cache=OrderedDict(), _cached_bytes=0)
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def patience_of(config: DataConfig) -> Patience:
    return Patience(stall_s=config.stall_s, deadline_s=config.deadline_s)


def load_or_build(urls: list[str], config: DataConfig) -> Dataset:
    """The data set of these shards; shards without a fitting index are indexed first, and the log says so.

    Raises:
        DataError: a shard is missing or no tar archive, or the filters leave nothing.
        StoreError: the store stayed broken.
    """
    patience = patience_of(config)
    entries = store.describe(urls, patience)
    missing: list[int] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        loaded = list(pool.map(lambda entry: _load(entry, config, patience), entries))
        missing = [number for number, summary in enumerate(loaded) if summary is None]
        if missing:
            logger.warning(
                "no index for %d of %d shards: building it now, once (`cascade index` does it ahead)",
                len(missing), len(urls),
            )  # fmt: skip
            for number, summary in _build_all(missing, entries, config, patience, pool):
                loaded[number] = summary
    dataset = Dataset([summary for summary in loaded if summary is not None], config.filter, patience)
    _report(dataset)
    return dataset


def _build_all(
    missing: list[int], entries: list[store.Entry], config: DataConfig, patience: Patience, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Summary]]:
    """Indexes shards with a progress bar. Ranks begin at different places and take what others have finished."""
    from tqdm import tqdm

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start = rank * len(missing) // max(world, 1)
    order = missing[start:] + missing[:start]

    def build(number: int) -> tuple[int, Summary]:
        found = _load(entries[number], config, patience)
        if found is None:
            index = index_shard(entries[number].url, patience, entries[number])
            found = summarize(index, entries[number], store_index(index, config.index_dir, patience), config.filter)
        return number, found

    yield from tqdm(pool.map(build, order), total=len(order), desc="index", unit="shard", disable=len(order) < 8)


def _load(entry: store.Entry, config: DataConfig, patience: Patience) -> Summary | None:
    index = load_index(entry.url, config.index_dir, entry, patience)
    return None if index is None else summarize(index, entry, index.place, config.filter)


def summarize(index: ShardIndex, entry: store.Entry, place: str, rules: FilterConfig) -> Summary:
    """What a run keeps in memory of a shard."""
    rows, dropped = keep_rows(index, rules)
    return Summary(entry, place, index.digest, len(index), len(rows), dict(dropped), index.problems, index.compressed)


def _report(dataset: Dataset) -> None:
    for summary in dataset.summaries:
        damage = {name: n for name, n in summary.problems.items() if name not in summary.dropped and name != "bad_json"}
        if damage:
            logger.warning("%s: %s", summary.entry.url, ", ".join(f"{n} x {name}" for name, n in damage.items()))
        if summary.compressed:
            logger.warning("%s: it is compressed, so every read begins at its start; store it as plain tar",
                           summary.entry.url)  # fmt: skip
    if dataset.dropped:
        reasons = ", ".join(f"{count} {name}" for name, count in dataset.dropped.most_common())
        logger.warning("%d of %d samples take part; left out: %s", dataset.samples, dataset.total, reasons)
    if not dataset.samples:
        reasons = ", ".join(f"{n} {name}" for name, n in (dataset.dropped + dataset.problems).most_common())
        raise DataError(
            f"data.shards: no sample of {dataset.total} in {len(dataset.urls)} shards is left "
            f"({reasons or 'all empty'}); loosen data.filter or give other shards"
        )
