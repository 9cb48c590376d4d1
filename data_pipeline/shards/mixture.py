"""The data set of a run as given by `data.shards`: a single one, or several mixed by weight."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import numpy as np

from data_pipeline.common.errors import about
from data_pipeline.common.team import ALONE, Team
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.order.mixture import MixedOrder, MixedSteps, Shares, StepShares
from data_pipeline.order.order import Order
from data_pipeline.shards.dataset import Dataset, load_or_build, patience_of, window_of
from data_pipeline.shards.index import ShardIndex
from data_pipeline.storage import store
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.storage.retry import Patience

logger = logging.getLogger(__name__)

MIXED = 4
"""Without `window`, that of each data set is this many times smaller than alone, so that this many fit into memory. The
number is fixed: adding a data set must not change the windows, and hence the order, of the others."""


class Mixture(Dataset):
    """Several data sets as one, their shards numbered consecutively; each keeps its own filters and indexes.

    Args:
        parts: the data sets by name.
        configs: the settings of each, from `DataConfig.parts`.
        config: the settings of the mixture.
    """

    def __init__(self, parts: Mapping[str, Dataset], configs: Mapping[str, DataConfig], config: DataConfig) -> None:
        summaries = [summary for part in parts.values() for summary in part.summaries]
        super().__init__(summaries, FilterConfig(), patience_of(config))
        self.parts, self.names_of_parts = list(parts.values()), list(parts)
        self.schedule, self._shares = config.schedule(), config.shares()
        self.buckets: list[str] = []
        self.ends = np.cumsum([len(part.urls) for part in self.parts])
        self.windows = [_mixed_window(part, configs[name]) for name, part in parts.items()]

    def keep_in(self, cache: DiskCache | None) -> None:
        """Like `Dataset.keep_in`, for every data set."""
        for part in self.parts:
            part.keep_in(cache)

    def sets(self) -> dict[str, Dataset]:
        """Return the data sets by name."""
        return dict(zip(self.names_of_parts, self.parts, strict=True))

    def part_of(self, shard: int) -> int:
        """Return the number of the data set that a shard belongs to."""
        return int(np.searchsorted(self.ends, shard, side="right"))

    def first(self, part: int) -> int:
        """Return the number of a data set's first shard."""
        return int(self.ends[part]) - len(self.parts[part].urls)

    def name_of(self, shard: int) -> str:
        """Return the name of the data set that a shard belongs to."""
        return self.names_of_parts[self.part_of(shard)]

    def alike(self, shard: int) -> tuple[int, np.ndarray]:
        """Return the shards of the same data set: the number of the first, and the samples in each."""
        part = self.part_of(shard)
        return self.first(part), self.parts[part].counts

    def index(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        """Return the index of a shard and the rows that are used, like `Dataset.index`."""
        part = self.part_of(shard)
        return self.parts[part].index(shard - self.first(part))

    @cached_property
    def _description(self) -> dict[str, Any]:
        sets = {
            name: {**part.describe(), "window": window}
            for name, part, window in zip(self.names_of_parts, self.parts, self.windows, strict=True)
        }
        rows = [[position, shares] for position, shares in self._shares]
        content = json.dumps([sets, rows])
        return {
            "fingerprint": hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
            "shards": len(self.urls),
            "samples": self.samples,
            "buckets": self.buckets,
            "datasets": sets,
            "schedule": rows,
        }


class Buckets(Mixture):
    """One data set, its pictures sorted by shape (`data.buckets`); each bucket gets steps in proportion to its size."""

    def __init__(self, parts: Mapping[str, Dataset], configs: Mapping[str, DataConfig], config: DataConfig) -> None:
        super().__init__(parts, configs, config)
        self.buckets = list(config.buckets)
        counts = [part.samples for part in self.parts]
        self.schedule = [(0, [Fraction(count, sum(counts)) for count in counts])]
        self._shares = [(0, {name: str(share) for name, share in zip(parts, self.schedule[0][1], strict=True)})]

    def sets(self) -> dict[str, Dataset]:
        """Return {"": self}: there is only one data set."""
        return {"": self}


class MixedBuckets(Mixture):
    """Several data sets, each with its pictures sorted by shape.

    A part, called NAME/SHAPE, is the samples of one data set in one bucket. The share of a data set is divided among
    its parts by their number of pictures.
    """

    def __init__(self, parts: Mapping[str, Dataset], configs: Mapping[str, DataConfig], config: DataConfig) -> None:
        super().__init__(parts, configs, config)
        self.buckets = list(config.buckets)
        names = [dataset.name for dataset in config.datasets()]
        pairs = [name.rpartition("/")[::2] for name in self.names_of_parts]
        there = {shape for _, shape in pairs}
        shapes = [shape for shape in config.ratios() if shape in there]
        self.places = [(shapes.index(shape), names.index(name)) for name, shape in pairs]
        """(bucket among those that have pictures, data set) of each part."""
        whole = [
            sum(self.parts[n].samples for n, (_, of) in enumerate(self.places) if of == d) for d in range(len(names))
        ]
        self.schedule = [
            (
                position,
                [
                    shares[of] * Fraction(part.samples, whole[of])
                    for part, (_, of) in zip(self.parts, self.places, strict=True)
                ],
            )
            for position, shares in config.schedule()
        ]
        self._shares = [
            (position, {name: str(share) for name, share in zip(self.names_of_parts, row, strict=True) if share})
            for position, row in self.schedule
        ]
        self.ranking = sorted(range(len(names)), key=lambda number: names[number])

    def sets(self) -> dict[str, Dataset]:
        """Return one part of each data set by the name of the data set; any part has all its shards."""
        return {name.rpartition("/")[0]: part for name, part in zip(self.names_of_parts, self.parts, strict=True)}


def _mixed_window(part: Dataset, config: DataConfig) -> int:
    return window_of(part, config) if config.window else max(window_of(part, config) // MIXED, 1)


def open_dataset(config: DataConfig, team: Team = ALONE) -> Dataset:
    """Open the data set of `data.shards`, a `Mixture` if it is one or has buckets; index shards without a valid index.

    Args:
        config: the `data` section.
        team: the processes that open it together; one of them asks the store.

    Raises:
        DataError: shards are missing or not tar archives, or the filters leave no sample.
        StoreError: the store kept failing until the deadline.
    """
    patience = patience_of(config)
    if config.buckets and config.datasets():
        return _open_mixed_buckets(config, team)
    if config.buckets:
        urls = team.once(lambda: store.expand(config.shards, patience))
        load_or_build(urls, config, team=team)  # reports what is dropped
        configs = config.bucket_parts()
        found = {name: load_or_build(urls, own, may_be_empty=True, team=team) for name, own in configs.items()}
        return Buckets({name: part for name, part in found.items() if part.samples}, configs, config)
    configs = config.parts()
    if "" in configs:
        return load_or_build(team.once(lambda: store.expand(config.shards, patience)), config, team=team)
    parts = {}
    for name, urls in team.once(partial(_expanded, configs, patience)).items():
        with about(f"data.shards, data set {name}"):
            parts[name] = load_or_build(urls, configs[name], team=team)
    return Mixture(parts, configs, config)


def _open_mixed_buckets(config: DataConfig, team: Team) -> MixedBuckets:
    parts, configs, whole = {}, {}, config.parts()
    for name, urls in team.once(partial(_expanded, whole, patience_of(config))).items():
        own = whole[name]
        with about(f"data.shards, data set {name}") if name else nullcontext():
            load_or_build(urls, own, team=team)  # reports what is dropped
        for shape, cut in own.bucket_parts().items():
            found = load_or_build(urls, cut, may_be_empty=True, team=team)
            if found.samples:
                parts[f"{name}/{shape}"], configs[f"{name}/{shape}"] = found, cut
    return MixedBuckets(parts, configs, config)


def order_of(dataset: Dataset, config: DataConfig, seed: int, world_size: int = 1) -> Order | MixedOrder:
    """Return the order of a run, and size the index cache for one of `world_size` processes.

    Raises:
        ConfigError: the shares of a mixture would change within a step.
    """
    lanes = config.lane_count
    if not isinstance(dataset, Mixture):
        window = window_of(dataset, config)
        dataset.expect(lanes / world_size, window)
        return Order(dataset.counts, seed, lanes, window)
    config.check_changes()
    orders = []
    for part, window in zip(dataset.parts, dataset.windows, strict=True):
        part.expect(lanes / world_size, window)
        orders.append(Order(part.counts, seed, lanes, window))
    if isinstance(dataset, MixedBuckets):
        steps = MixedSteps(config.global_batch, lanes, dataset.places, dataset.schedule, dataset.ranking)
        return MixedOrder(orders, steps)
    if isinstance(dataset, Buckets):
        return MixedOrder(orders, StepShares(config.global_batch, Shares(1, dataset.schedule)))
    names = sorted(range(len(orders)), key=lambda number: dataset.names_of_parts[number])
    return MixedOrder(orders, Shares(lanes, dataset.schedule, names))


def window_bytes(dataset: Dataset, config: DataConfig) -> float:
    """Return the bytes of the windows of one lane, one per data set."""
    if not isinstance(dataset, Mixture):
        return window_of(dataset, config) * dataset.mean_bytes
    return float(sum(part.mean_bytes * window for part, window in zip(dataset.parts, dataset.windows, strict=True)))


def entries_of(config: DataConfig) -> list[tuple[str, store.Entry, DataConfig]]:
    """Return (data set, shard, its settings) for every shard; without a mixture the data set is "".

    Raises:
        DataError: shards are missing, or the store denies access.
    """
    patience, configs = patience_of(config), config.parts()
    found = []
    for name, urls in _expanded(configs, patience).items():
        with about(f"data.shards, data set {name}") if name else nullcontext():
            found += [(name, entry, configs[name]) for entry in store.describe(urls, patience)]
    return found


def _expanded(configs: Mapping[str, DataConfig], patience: Patience) -> dict[str, list[str]]:
    """Return the shards of each data set of a mixture; without one, the data set is "".

    Raises:
        ShardsError: a pattern matches nothing, or data sets have `a.tar` and `a.tar.gz`, whose indexes would overwrite
            each other.
    """
    found: dict[str, list[str]] = {}
    for name, own in configs.items():
        with about(f"data.shards, data set {name}") if name else nullcontext():
            found[name] = store.expand(own.shards, patience)
    sets: dict[str, list[str]] = {}
    for name, urls in found.items():
        for url in urls:
            sets.setdefault(store.full_path(url), []).append(name)
    store.refuse_twins({place: place for place in sets})
    twice = [place for place, names in sets.items() if len(names) > 1]
    if twice:
        some = twice[0], " and ".join(sets[twice[0]])
        logger.warning(
            "shards in several data sets: %d, such as %s in %s; unless their filters differ, their samples are trained "
            "on more often",
            len(twice),
            *some,
        )
    return found
