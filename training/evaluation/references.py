"""Reference pictures: held-out shards read at full quality, or a file of their precomputed features.

Shapes: M pictures of H x W pixels, d features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.errors import DataError, about
from data_pipeline.common.team import ALONE, Team
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.reading.loader import Loader
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import load_files
from data_pipeline.storage.safetensors import header
from training.evaluation.extractors.base import Extractor
from training.evaluation.metrics.rows import blocks
from training.evaluation.parts import Span, StoredRows

KEY = "evaluation.reference"
RULE = "middle square of the picture decoded at full scale, one antialiased bicubic resize, 8 bits in memory"
FULL_SCALE = 1e6
"""Decode margin with which no JPEG is decoded at a reduced scale."""
SUFFIX = ".safetensors"
FLOATS = "F32"
"""Name of float32 in safetensors."""


@dataclass
class Real:
    """Held-out pictures: uint8 (M, H, W, 3) and their captions."""

    pictures: np.ndarray
    captions: list[str]


class References:
    """The pictures of held-out shards in a fixed shuffled order, each at most once.

    A picture that cannot be read is skipped (in training, another one would replace it) and counted.

    Args:
        shards: the shards to read; other settings come from `data`.
        size: side of the pictures, pixels.
        key: the setting to name in an error.
        team: the processes that open the shards together.

    Raises:
        DataError: there are no shards, or fewer than two pictures in them.
    """

    def __init__(self, shards: Any, data: DataConfig, size: int, seed: int, key: str = KEY, team: Team = ALONE) -> None:
        self.key, self._team = key, team
        self.data = replace(
            data,
            shards=shards,
            global_batch=1,
            lanes=1,
            micro_batch=1,
            crop="center",
            flip=0.0,
            decode_margin=FULL_SCALE,
            max_bad_share=1.0,
            filter=FilterConfig(),
            embeddings=None,
            captions=data.captions.of_members(),
            buckets=[],
        )
        self.size, self.seed = size, seed
        self.broken = 0
        """Number of pictures skipped by `chunks` so far."""
        with about(self.key):
            loader = self._open()
        self.count = int(sum(loader.dataset.counts))
        self.fingerprint = loader.dataset.fingerprint
        loader.close()
        if self.count < 2:
            raise DataError(f"{key}={shards}: {self.count} picture; at least 2 are needed")

    def _open(self) -> Loader:
        return Loader(self.data, image_size=self.size, seed=self.seed, team=self._team)

    def chunks(self, size: int, most: int) -> Iterator[Real]:
        """Yield up to `most` pictures, `size` at a time.

        Raises:
            DataError: fewer than two of them can be read.
        """
        self.broken, given = 0, 0
        pictures: list[np.ndarray] = []
        captions: list[str] = []
        loader = self._open()
        try:
            for _ in range(self.count):
                if given + len(captions) == most:
                    break
                with about(self.key):
                    batch = next(loader)[0]
                if loader.counters["bad"] > self.broken:  # this picture is the replacement of a bad one
                    self.broken = loader.counters["bad"]
                    continue
                pictures.append(batch.images[0].permute(1, 2, 0).numpy())
                captions += batch.captions
                if len(captions) == size:
                    yield Real(np.stack(pictures), captions)
                    given, pictures, captions = given + size, [], []
        finally:
            loader.close()
        if given + len(captions) < 2:
            raise DataError(
                f"{self.key}={self.data.shards}: {self.broken} of {self.count} pictures cannot be read, which leaves "
                "fewer than 2; check the shards with `cascade verify`"
            )
        if captions:
            yield Real(np.stack(pictures), captions)

    def check(self) -> None:
        """Read two pictures as a test. Raises `DataError` like `chunks`."""
        next(self.chunks(2, 2))


@dataclass
class ReferenceFile:
    """Features of reference pictures with the preprocessing rule that they were computed by, in one safetensors
    file."""

    features: Mapping[str, StoredRows]
    """Features float32 (M, d), by extractor."""
    captions: list[str]
    facts: dict[str, Any]
    """`rule`, `size`, `extractors` (as `Extractor.describe`), `fingerprint`, `shards`, `broken`."""

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        meta = {"captions": json.dumps(self.captions), "facts": json.dumps(self.facts)}
        tensors = {name: (FLOATS, rows.shape, 4 * int(np.prod(rows.shape))) for name, rows in self.features.items()}
        with replacing(path, durable=False) as file:
            file.write(header(tensors, meta))
            for rows in self.features.values():
                for _, block in blocks(rows):
                    file.write(block.astype(np.float32).tobytes())

    @classmethod
    def read(cls, path: str) -> ReferenceFile:
        """Open a file written by `write`; features are read on demand.

        Raises:
            DataError: it is another file.
            StoreError: its file system kept failing.
        """
        return load_files(path, lambda: cls._read(path))

    @classmethod
    def _read(cls, path: str) -> ReferenceFile:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as opened:  # checks that the file is complete
                meta = opened.metadata() or {}
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(size))
            features = {
                name: StoredRows(
                    [Span(Path(path), 8 + size + entry["data_offsets"][0], entry["shape"][0])],
                    tuple(entry["shape"][1:]),
                    np.dtype({FLOATS: np.float32}[entry["dtype"]]),
                )
                for name, entry in entries.items()
                if name != "__metadata__"
            }
            return cls(features, json.loads(meta["captions"]), json.loads(meta["facts"]))
        except FileNotFoundError as error:
            raise DataError(f"{KEY}={path}: no such file; make it with: cascade evaluate action=reference") from error
        except KeyError as error:
            raise DataError(f"{KEY}={path}: not reference statistics of this project (it has no {error})") from error
        except (SafetensorError, ValueError, OSError) as error:
            raise DataError(f"{KEY}={path}: not reference statistics of this project ({error})") from error

    def check(self, size: int, extractors: Sequence[Extractor], path: str) -> None:
        """Check that the features were computed in the same way as this evaluation's.

        Raises:
            DataError: they were not; the message names the difference.
        """
        here = {"rule": RULE, "size": size}
        for name, value in here.items():
            if self.facts.get(name) != value:
                raise DataError(f"{KEY}={path}: its {name} is {self.facts.get(name)}, but this evaluation's is {value}")
        for extractor in extractors:
            there, wanted = self.facts["extractors"].get(extractor.name), extractor.describe()
            if there is None:
                raise DataError(
                    f"{KEY}={path}: it has no features of {extractor.name}, only of "
                    f"{', '.join(self.facts['extractors'])}; rebuild it with: cascade evaluate action=reference"
                )
            for field, value in wanted.items():
                if there[field] != value:
                    raise DataError(
                        f"{KEY}={path}: its {field} of {extractor.name} is {there[field]}, but this evaluation's is "
                        f"{value}; figures from different features cannot be compared"
                    )
