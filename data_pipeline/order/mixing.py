"""How well an order mixes the data set, compared with a perfect shuffle."""

from __future__ import annotations

import numpy as np

from data_pipeline.order.order import Order


def mixing(order: Order, global_batch: int, position: int = 0, batches: int = 32) -> dict[str, float]:
    """Measured on some consecutive global batches.

    Returns:
        distinct_shards: mean number of distinct shards in a global batch.
        perfect_distinct_shards: the same for samples drawn at random.
        neighbour_correlation: how often two samples adjacent in a shard end up in the same global batch, as a multiple
            of chance: 1 is a perfect shuffle, 0 means never.
    """
    positions = position + np.arange(batches * global_batch, dtype=np.int64)
    epochs, shards, rows = (part.reshape(batches, -1) for part in order.locate_many(positions))
    distinct = np.mean([len(np.unique(batch)) for batch in shards])
    together = 0
    for epoch, shard, row in zip(epochs, shards, rows, strict=True):
        place = np.lexsort((row, shard, epoch))
        same = (np.diff(epoch[place]) == 0) & (np.diff(shard[place]) == 0) & (np.diff(row[place]) == 1)
        together += int(same.sum())
    share = order.counts / order.samples
    neighbours = int(np.maximum(order.counts - 1, 0).sum())
    # a pair meets in a given batch with probability (B / N) ((B - 1) / (N - 1))
    chance = (
        neighbours * (global_batch / order.samples) * min((global_batch - 1) / max(order.samples - 1, 1), 1.0) * batches
    )
    return {
        "distinct_shards": float(distinct),
        "perfect_distinct_shards": float(np.sum(1 - (1 - share) ** global_batch)),
        "neighbour_correlation": together / chance if chance else 0.0,
    }
