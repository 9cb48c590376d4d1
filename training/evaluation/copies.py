"""Whether a model reproduces training pictures: the training picture nearest to each sample.

The unit of distance is calibrated on the training pictures themselves (`closeness`): only 1 % of them are closer than 1
to their own nearest neighbour. So new pictures of the same distribution are also above 1 in about 99 % of cases, and
copies are near 0.
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
    """The nearest training pictures of N samples."""

    distance: np.ndarray
    """(N,) distance to the nearest training picture, in calibrated units."""
    place: np.ndarray
    """(N,) index of that training picture."""
    searched: int
    """Number of training pictures searched."""
    pictures: dict[int, np.ndarray]
    """The requested training pictures, uint8 (H, W, 3), by index."""

    @property
    def figure(self) -> Figure:
        """The fraction of samples that are copies."""
        return Figure.mean(self.distance < COPY, is_share=True)


def find_copies(
    samples: FeatureRows, shown: list[int], extractor: Extractor, training: References, most: int, folder: Path
) -> Copies:
    """Search up to `most` training pictures for the nearest to each sample. Their features go to a temporary file; the
    few pictures to show are read a second time.

    Args:
        samples: (N, d) features.
        shown: indices of the samples whose neighbours are wanted as pictures.
        folder: directory for the temporary file.
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
    """Return the description of the search for a protocol."""
    return {"shards": str(training), "fingerprint": fingerprint, "searched": found.searched}
