"""The photographs of tests/fixtures/photos, for the tests."""

from __future__ import annotations

import shutil
import tarfile
from functools import cache
from pathlib import Path

SHARDS = sorted((Path(__file__).parents[1] / "fixtures" / "photos").glob("*.tar"))


@cache
def samples(shard: int = 0) -> dict[str, dict[str, bytes]]:
    """Maps each key to its members' bytes by extension, in the shard's order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(SHARDS[shard]) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            key, extension = member.name.split(".", 1)
            found.setdefault(key, {})[extension] = stream.read()
    return found


@cache
def jpegs() -> list[bytes]:
    """All twelve pictures as published, still encoded."""
    return [sample["jpg"] for shard in range(len(SHARDS)) for sample in samples(shard).values()]


def copy_shards(folder: Path) -> Path:
    """Copies the shards, and the files next to them, into a folder where an index may be written."""
    shutil.copytree(SHARDS[0].parent, folder, ignore=shutil.ignore_patterns("*.index.parquet"))
    return folder
