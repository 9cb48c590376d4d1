"""Finds samples that several data sets of a mixture share, from their indexes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipeline.shards.index import ShardIndex

MOST = 20_000_000
"""Most samples to compare. Of more, only those whose hash is divisible by some number are compared, which selects the
same random fraction of every data set."""


class _Compared(NamedTuple):
    """What is compared of a data set."""

    pictures: np.ndarray
    """Distinct checksums of pictures, uint64 ascending."""
    keys: np.ndarray
    """Distinct hashes of keys, uint64 ascending."""
    rows: np.ndarray
    """For each of `pictures`, a place in `names`."""
    names: pa.ChunkedArray
    """Keys of samples."""


def copies(indexes: Mapping[str, Iterable[ShardIndex]], samples: int) -> list[dict[str, Any]]:
    """Return which pairs of data sets share samples, those with most in common first.

    Args:
        indexes: the indexes of the shards of each data set, by its name; each is read once.
        samples: number of samples in all data sets, which decides what fraction is compared.

    Returns:
        For each pair with something in common: `datasets`, `same_picture` (number of pictures with the same bytes),
        `same_key` (number of common keys) and `example`, the key of a common picture in the first data set; None if
        only keys are the same. The numbers are estimates if only a fraction is compared.
    """
    every = 1 + samples // MOST
    found = {name: _compared(several, every) for name, several in indexes.items()}
    pairs = []
    for one, other in itertools.combinations(found, 2):
        first, second = found[one], found[other]
        same, places, _ = np.intersect1d(first.pictures, second.pictures, assume_unique=True, return_indices=True)
        keys = np.intersect1d(first.keys, second.keys, assume_unique=True)
        if len(same) or len(keys):
            pairs.append(
                {
                    "datasets": [one, other],
                    "same_picture": len(same) * every,
                    "same_key": len(keys) * every,
                    "example": first.names[int(first.rows[places[0]])].as_py() if len(same) else None,
                }
            )
    return sorted(pairs, key=lambda pair: -pair["same_picture"])


def _compared(indexes: Iterable[ShardIndex], every: int) -> _Compared:
    pictures, keys = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    names: list[pa.Array] = []
    for index in indexes:
        checksums, hashes = index.picture_checksums(), index.column("key_hash").to_numpy()
        chosen = np.flatnonzero((checksums % np.uint64(every) == 0) & (checksums > 0))
        pictures.append(checksums[chosen])
        names += index.column("key").take(pa.array(chosen)).chunks
        keys.append(hashes[hashes % np.uint64(every) == 0])
    distinct, rows = np.unique(np.concatenate(pictures), return_index=True)
    return _Compared(distinct, np.unique(np.concatenate(keys)), rows, pa.chunked_array(names, pa.string()))
