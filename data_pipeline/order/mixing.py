"""How well an order mixes the data set, compared with a perfect shuffle, and whether a mixture keeps its shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.order.mixture import MixedOrder
from data_pipeline.order.order import Order


def mixing(order: Order | MixedOrder, global_batch: int, position: int = 0, batches: int = 32) -> dict[str, Any]:
    """Measured on some consecutive global batches.

    Returns:
        distinct_shards: mean number of distinct shards in a global batch.
        perfect_distinct_shards: the same for samples drawn at random (of a mixture: from each data set its share).
        neighbour_correlation: how often two samples adjacent in a shard end up in the same global batch, as a multiple
            of chance: 1 is a perfect shuffle, 0 means never.
        datasets: of a mixture, see `shares_kept`.
    """
    positions = position + np.arange(batches * global_batch, dtype=np.int64)
    epochs, shards, rows = (part.reshape(batches, -1) for part in order.locate_many(positions))
    distinct = np.mean([len(np.unique(batch)) for batch in shards])
    together = 0
    for epoch, shard, row in zip(epochs, shards, rows, strict=True):
        place = np.lexsort((row, shard, epoch))
        same = (np.diff(epoch[place]) == 0) & (np.diff(shard[place]) == 0) & (np.diff(row[place]) == 1)
        together += int(same.sum())
    orders = order.orders if isinstance(order, MixedOrder) else [order]
    weights = order.shares.expected(positions).mean(axis=0) if isinstance(order, MixedOrder) else np.ones(1)
    share = np.concatenate([weight * one.counts / one.samples for one, weight in zip(orders, weights, strict=True)])
    chance = sum(_chance(one, weight * global_batch) for one, weight in zip(orders, weights, strict=True)) * batches
    found: dict[str, Any] = {
        "distinct_shards": float(distinct),
        "perfect_distinct_shards": float(np.sum(1 - (1 - share) ** global_batch)),
        "neighbour_correlation": together / chance if chance else 0.0,
    }
    if isinstance(order, MixedOrder):
        found["datasets"] = shares_kept(order, positions)
    return found


def _chance(order: Order, drawn: float) -> float:
    """How many pairs of neighbours meet in a batch that draws so many samples at random: each with probability (B / N)
    ((B - 1) / (N - 1))."""
    neighbours = int(np.maximum(order.counts - 1, 0).sum())
    other = max((drawn - 1) / max(order.samples - 1, 1), 0.0)
    return neighbours * (drawn / order.samples) * min(other, 1.0)


def shares_kept(order: MixedOrder, positions: np.ndarray) -> list[dict[str, float]]:
    """What each data set of a mixture has of some consecutive positions.

    Returns:
        per data set `wanted`, its mean weight; `share`, its part of the samples; `largest_deviation`, how far its count
        is ever from the sum of its weights, over all beginnings of the stretch, samples.
    """
    datasets, _ = order.shares.split(positions)
    expected = order.shares.expected(positions)
    found = []
    for number in range(len(order.orders)):
        ahead = np.cumsum((datasets == number) - expected[:, number])
        found.append(
            {
                "wanted": float(expected[:, number].mean()),
                "share": float((datasets == number).mean()),
                "largest_deviation": float(np.abs(ahead).max()),
            }
        )
    return found
