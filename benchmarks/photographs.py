"""Photographs for benchmarks: the tests' twelve, enlarged, with sensor noise, re-encoded."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).parents[1] / "tests" / "fixtures" / "photos"


def encoded_photographs(count: int, longest: tuple[int, int] = (512, 1024)) -> Iterator[bytes]:
    """Yield `count` JPEGs whose longer side has `longest[0]` to `longest[1]` pixels; always the same ones."""
    sources = [Image.open(io.BytesIO(data)).convert("RGB") for data in _originals()]
    random = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        scale = int(random.integers(longest[0], longest[1] + 1)) / max(source.size)
        image = source.resize((round(source.width * scale), round(source.height * scale)), Image.Resampling.LANCZOS)
        noisy = np.asarray(image) + random.normal(0, 4, (image.height, image.width, 1))
        encoded = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
        yield encoded.getvalue()


def _originals() -> Iterator[bytes]:
    for shard in sorted(PHOTOS.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    yield archive.extractfile(member).read()  # type: ignore[union-attr]
