"""`cascade order`: prints the samples a run would read, one JSON line per global batch, and how well they are mixed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig
from data_pipeline.order.mixing import mixing
from data_pipeline.order.mixture import MixedOrder
from data_pipeline.order.order import Order, check_position, check_world_size
from data_pipeline.order.sharing import Chunks
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.mixture import Mixture, open_dataset, order_of


class OrderSettings(Protocol):
    """The settings of the command that are read here."""

    seed: int
    data: DataConfig
    world_size: int
    workers: int
    position: int
    batches: int
    quality: bool


def main(config: OrderSettings) -> None:
    """Run `cascade order`: print `{"position": .., "ranks": [[key, ..], ..]}` per global batch.

    In a mixture, keys are `NAME:KEY`. With `quality` a last line follows: `{"distinct_shards": .., ...}`, see `mixing`;
    in a mixture with the shares of each data set by its name.

    Raises:
        ConfigError: the batch cannot be divided among `world_size` processes, or a number is negative.
        DataError: no shards match, or one is not a tar archive.
    """
    for name in ("workers", "batches"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}={getattr(config, name)}: it cannot be negative")
    if not config.batches and not config.quality:
        raise ConfigError("batches=0: there is nothing to print; give at least 1, or quality=true")
    check_position(config.position)
    data = config.data
    micro_batch = check_world_size(config.world_size, data.global_batch, data.lane_count, data.micro_batch)
    dataset = open_dataset(data)
    order = order_of(dataset, data, config.seed)
    ranks = [_rank(config, rank, micro_batch) for rank in range(config.world_size)]
    for batch in range(config.batches):
        keys = [_keys(dataset, order, next(steps)) for steps in ranks]
        line = {"position": config.position + batch * data.global_batch, "ranks": keys}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    if config.quality:
        found = mixing(order, data.global_batch, config.position)
        sets = found.pop("datasets", None)
        said: dict[str, Any] = _rounded(found)
        if isinstance(dataset, Mixture):
            said["datasets"] = dict(zip(dataset.names_of_parts, map(_rounded, sets), strict=True))
        print(json.dumps(said), flush=True)


def _rounded(values: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def _rank(config: OrderSettings, rank: int, micro_batch: int) -> Iterator[np.ndarray]:
    """Yield the positions of each step of one rank, collected from its workers in turn, as a DataLoader does."""
    count = max(config.workers, 1)
    workers = [
        iter(Chunks(config.data, rank, config.world_size, config.position, micro_batch, worker, count))
        for worker in range(count)
    ]
    chunks = (next(workers[number % count]) for number in itertools.count())
    per_step = config.data.share_of(config.world_size) // micro_batch
    while True:
        yield np.concatenate(list(itertools.islice(chunks, per_step)))


def _keys(dataset: Dataset, order: Order | MixedOrder, positions: np.ndarray) -> list[str]:
    _, shards, rows = order.locate_many(positions)
    keys = [dataset.key(shard, row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
    if not isinstance(dataset, Mixture):
        return keys
    return [f"{dataset.name_of(shard)}:{key}" for shard, key in zip(shards.tolist(), keys, strict=True)]
