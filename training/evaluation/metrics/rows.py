"""The interface of features to the metrics: rows of which one block at a time is in memory.

Shapes: N rows of d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

BLOCK = 1024
"""Number of rows in memory at a time."""


class FeatureRows(Protocol):
    """Rows (N, d): a numpy array, or an object that reads them from files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, which: Any, /) -> Any: ...


def blocks(rows: FeatureRows) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (slice, float64 (B, d)) of all rows, up to `BLOCK` at a time.

    Raises:
        ValueError: a value is not finite.
    """
    for start in range(0, len(rows), BLOCK):
        where = slice(start, min(start + BLOCK, len(rows)))
        block = np.asarray(rows[where], dtype=np.float64)
        if not np.isfinite(block).all():
            raise ValueError("the features are not finite")
        yield where, block
