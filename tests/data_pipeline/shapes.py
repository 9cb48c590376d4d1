"""Shards with pictures of several shapes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.shards.writer import ShardWriter

SHAPES = ((40, 30), (31, 41), (36, 36), (64, 36), (37, 35))


def png(width: int, height: int, number: int) -> bytes:
    """A picture in two shades of grey."""
    pixels = np.full((height, width, 3), number % 250, np.uint8)
    pixels[:, : width // 2] //= 2
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_shapes(home: Path, shapes: Sequence[tuple[int, int]] = SHAPES) -> str:
    """63 pictures in three shards; returns the directory."""
    for shard, count in enumerate((23, 9, 31)):
        with ShardWriter(str(home / f"{shard:05d}.tar")) as writer:
            for number in range(count):
                width, height = shapes[(number * 7 + shard) % len(shapes)]
                writer.write(f"{shard}-{number:03d}", {"png": png(width, height, number), "txt": b"a picture"})
    return str(home)
