"""What the metrics ask of features: rows of which a block at a time is in memory, wherever the others are.

Shapes: N rows of d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

BLOCK = 1024
"""Rows in memory at a time."""


class FeatureRows(Protocol):
    """(N, d) rows: a numpy array, or what reads them from files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, which: Any, /) -> Any: ...


def blocks(rows: FeatureRows) -> Iterator[tuple[slice, np.ndarray]]:
    """(where, float64 (B, d)) of all rows, up to `BLOCK` at a time.

    Raises:
        ValueError: values that are not finite.
    """
    for start in range(0, len(rows), BLOCK):
        where = slice(start, min(start + BLOCK, len(rows)))
        block = np.asarray(rows[where], dtype=np.float64)
        if not np.isfinite(block).all():
            raise ValueError("the features are not finite")
        yield where, block
