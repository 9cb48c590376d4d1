"""Whether a model draws its training pictures again: each sample beside the nearest of them, from their shards.

The unit is calibrated on the training pictures themselves (`closeness`): it is the distance that only 1 % of them have
to their own nearest other one, so fresh pictures of the same distribution lie above 1 as often, and copies near 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.progress import progress
from training.evaluation.extractors.base import Extractor
from training.evaluation.metrics.figure import Figure
from training.evaluation.metrics.neighbours import COPY, closeness
from training.evaluation.metrics.rows import FeatureRows
from training.evaluation.parts import spilled
from training.evaluation.references import References

KEY = "evaluation.training"
CHUNK = 256


@dataclass
class Copies:
    """What was found for N samples."""

    distance: np.ndarray
    """(N,) to the nearest training picture, in calibrated units."""
    place: np.ndarray
    """(N,) which of the training pictures that is."""
    searched: int
    pictures: dict[int, np.ndarray]
    """Place -> uint8 (H, W, 3), of those that were asked for."""

    @property
    def figure(self) -> Figure:
        """The share of samples that are copies."""
        return Figure.mean(self.distance < COPY, is_share=True)


def find_copies(
    samples: FeatureRows, shown: list[int], extractor: Extractor, training: References, most: int, folder: Path
) -> Copies:
    """Searches up to `most` training pictures. Their features go to a file, their pixels are not kept: the few that are
    shown are read once more.

    Args:
        samples: (N, d) features.
        shown: places of the samples whose neighbours are wanted as pictures.
        folder: where that file may lie.
    """
    with spilled(folder, {extractor.name: extractor.width}) as known:
        with progress(unit="picture", desc="training pictures", total=min(most, training.count)) as bar:
            for real in training.chunks(CHUNK, most):
                known.add(extractor.name, extractor.pictures(real.pictures))
                bar.update(len(real.captions))
        features = known.rows()[extractor.name]
        distance, place = closeness(samples, features)
    wanted = {int(place[i]) for i in shown}
    pictures: dict[int, np.ndarray] = {}
    for number, real in enumerate(training.chunks(CHUNK, max(2, *(place + 1 for place in wanted)))):
        here = wanted & set(range(number * CHUNK, number * CHUNK + len(real.captions)))
        pictures |= {one: real.pictures[one - number * CHUNK] for one in here}
    return Copies(distance, place, len(features), pictures)


def describe_copies(found: Copies, training: Any, fingerprint: str) -> dict[str, Any]:
    """What a protocol says of the search."""
    return {"shards": str(training), "fingerprint": fingerprint, "searched": found.searched}
