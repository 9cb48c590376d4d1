"""Small shards for tests: members are random bytes of random length, so that only exact reads pass."""

from __future__ import annotations

import json
import random
from pathlib import Path

from data_pipeline.shards.writer import ShardWriter

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"


def members(seed: str, longest: int = 600) -> dict[str, bytes]:
    """Members jpg (not a picture), json and txt; always the same for a given seed."""
    generator = random.Random(seed)
    facts = {"caption": f"caption {seed}", "AESTHETIC_SCORE": round(generator.uniform(3, 7), 3)}
    return {
        "jpg": generator.randbytes(generator.randint(1, longest)),
        "json": json.dumps(facts).encode(),
        "txt": f"caption {seed}".encode(),
    }


def write_shards(folder: Path, counts: list[int], seed: int = 0, longest: int = 600) -> list[str]:
    """Shards `00000.tar`, ... with that many samples each, indexed; returns their paths. Keys are unique."""
    paths = []
    for number, count in enumerate(counts):
        path = str(folder / f"{number:05d}.tar")
        with ShardWriter(path) as shard:
            for i in range(count):
                shard.write(f"{number:05d}{i:04d}", members(f"{seed}/{number}/{i}", longest))
        paths.append(path)
    return paths
