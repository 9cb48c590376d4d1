"""Measures how well an order mixes the data set compared with a perfect shuffle, and how exactly a mixture keeps its
shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.order.mixture import MixedOrder
from data_pipeline.order.order import Order


def mixing(order: Order | MixedOrder, global_batch: int, position: int = 0, batches: int = 32) -> dict[str, Any]:
    """Measure the mixing of `batches` consecutive global batches.

    Args:
        order: the order to measure.
        global_batch: samples per global batch.
        position: first position to measure.
        batches: number of global batches.

    Returns:
        distinct_shards: mean number of distinct shards in a global batch.
        perfect_distinct_shards: its expectation for samples drawn at random (in a mixture, each data set's share).
        neighbour_correlation: how often two samples adjacent in a shard fall into the same global batch, as a multiple
            of chance: 1 for a perfect shuffle, 0 for never.
        datasets: for a mixture only, see `shares_kept`.
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
    """Return the expected number of neighbouring pairs in a batch of B = `drawn` random samples.

    Each pair meets with probability (B / N) ((B - 1) / (N - 1)).
    """
    neighbours = int(np.maximum(order.counts - 1, 0).sum())
    other = max((drawn - 1) / max(order.samples - 1, 1), 0.0)
    return neighbours * (drawn / order.samples) * min(other, 1.0)


def shares_kept(order: MixedOrder, positions: np.ndarray) -> list[dict[str, float]]:
    """Compare the samples that each data set of a mixture gets with its weight, over consecutive positions.

    Returns:
        For each data set: `wanted`, its mean weight; `share`, its actual fraction of the samples; `largest_deviation`,
        the largest difference in samples between its running count and the running sum of its weight.
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
