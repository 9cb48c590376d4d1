"""Finds samples that several data sets of a mixture share, from their indexes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_pipeline.shards.index import ShardIndex

MOST = 20_000_000
"""Most samples to compare. Of more, only those whose hash is divisible by some number are compared, which selects the
same random fraction of every data set."""


def copies(indexes: Mapping[str, Iterable[ShardIndex]], samples: int) -> list[dict[str, Any]]:
    """Return which pairs of data sets share samples, those with most in common first.

    Args:
        indexes: the indexes of the shards of each data set, by its name; each is read once.
        samples: number of samples in all data sets, which decides what fraction is compared.

    Returns:
        For each pair with something in common: `datasets`, `same_picture` (number of pictures with the same bytes),
        `same_key` (number of common keys) and `example`, the key of a common picture in the first data set, or None.
        The numbers are estimates if only a fraction is compared.
    """
    every = 1 + samples // MOST
    found: dict[str, tuple[np.ndarray, np.ndarray, dict[int, str]]] = {}
    for name, several in indexes.items():
        pictures, keys = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        names: dict[int, str] = {}
        for index in several:
            checksums = index.picture_checksums()
            chosen = np.flatnonzero((checksums % np.uint64(every) == 0) & (checksums > 0))
            pictures.append(checksums[chosen])
            hashes = index.column("key_hash").to_numpy()
            keys.append(hashes[hashes % np.uint64(every) == 0])
            names.update((int(checksums[row]), index.key(row)) for row in chosen.tolist()[:_NAMED])
        found[name] = np.unique(np.concatenate(pictures)), np.unique(np.concatenate(keys)), names
    pairs = []
    for one, other in itertools.combinations(found, 2):
        same = np.intersect1d(found[one][0], found[other][0], assume_unique=True)
        keys_of_both = np.intersect1d(found[one][1], found[other][1], assume_unique=True)
        if len(same) or len(keys_of_both):
            example = next((found[one][2][value] for value in same.tolist() if value in found[one][2]), None)
            pairs.append(
                {
                    "datasets": [one, other],
                    "same_picture": len(same) * every,
                    "same_key": len(keys_of_both) * every,
                    "example": example,
                }
            )
    return sorted(pairs, key=lambda pair: -pair["same_picture"])


_NAMED = 1000
"""Keys per shard kept for the examples."""
