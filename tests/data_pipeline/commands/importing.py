"""Imports small folders of pictures and looks at the results."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from data_pipeline.commands.prepare import main
from data_pipeline.config import DataConfig, PrepareConfig


class Config:
    """The sections of an experiment that `prepare` reads."""

    def __init__(self, prepare: PrepareConfig, seed: int = 0, data: DataConfig | None = None) -> None:
        self.prepare, self.seed, self.data, self.json = prepare, seed, data or DataConfig(), True


def imported(output: Path | str, kind: str, source: Path | str, **values: Any) -> dict[str, Any]:
    return main(Config(PrepareConfig(kind=kind, source=str(source), output=str(output), **values)))


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def dropped(output: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
