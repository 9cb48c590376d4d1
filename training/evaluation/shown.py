"""The pictures that an evaluation keeps for its pages: the same prompts for every checkpoint, some of each category.

OUTPUT/shown.npz: `picture` uint8 (N, H, W, 3), `prompt`, `category` (both text), `chosen` bool (False: kept as one of
the best or worst), and `score` (NaN if pictures are not scored).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import load_files

FILE = "shown.npz"
CELLS = 48
"""Maximum number of prompts to choose."""
EXTREMES = 8
"""Number of best and of worst pictures to keep of each part, and to show of all."""


@dataclass
class Shown:
    """The content of shown.npz."""

    picture: np.ndarray
    prompt: np.ndarray
    category: np.ndarray
    chosen: np.ndarray
    score: np.ndarray

    def write(self, folder: Path) -> None:
        """Write the file atomically."""
        with replacing(folder / FILE, durable=False) as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def read(cls, folder: Path) -> Shown | None:
        """Read the file; None if it is missing or damaged, since it only serves a page."""
        try:
            return load_files(str(folder / FILE), partial(cls._read, folder))
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    @classmethod
    def _read(cls, folder: Path) -> Shown:
        with np.load(folder / FILE) as stored:
            return cls(**{name: stored[name] for name in stored.files})


def choose_places(categories: Sequence[str], count: int) -> list[int]:
    """Return the indices of up to `CELLS` of the first `count` prompts: the first ones, or equally many of each
    category.

    Args:
        categories: categories of all prompts; empty if they have none.
    """
    if not categories:
        return list(range(min(count, CELLS)))
    places: dict[str, list[int]] = {}
    for place in range(min(count, len(categories))):
        places.setdefault(categories[place], []).append(place)
    each = max(1, CELLS // max(1, len(places)))
    return sorted(place for group in places.values() for place in group[:each])[:CELLS]


def best_and_worst(scores: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the indices of the highest scores, best first, and of the lowest, worst first; at most `EXTREMES` each."""
    order = np.argsort(scores, kind="stable")
    count = min(EXTREMES, len(order) // 2)
    return [int(place) for place in order[::-1][:count]], [int(place) for place in order[:count]]
