"""The photographs of tests/fixtures/photos, for the tests."""

from __future__ import annotations

import shutil
import tarfile
from functools import cache
from pathlib import Path

SHARDS = sorted((Path(__file__).parents[1] / "fixtures" / "photos").glob("*.tar"))


@cache
def samples(shard: int = 0) -> dict[str, dict[str, bytes]]:
    """Key -> the members' bytes by extension, in the shard's own order."""
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
    """All twelve pictures as published, encoded."""
    return [sample["jpg"] for shard in range(len(SHARDS)) for sample in samples(shard).values()]


def copy_shards(folder: Path) -> Path:
    """The shards with what lies beside them in a folder of their own, where an index may be written."""
    shutil.copytree(SHARDS[0].parent, folder, ignore=shutil.ignore_patterns("*.index.parquet"))
    return folder
