"""The settings that `cascade verify` reads, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig


class Stage:
    image_size, low_res_size, crop_size = 32, 16, 16


class Config:
    """The parts of the command's config that `verify` reads."""

    seed, json, stage, rebuild = 0, True, Stage, True

    def __init__(self, shards: Any, output: Path, report: bool = False, **data: Any) -> None:
        self.data, self.output, self.report = DataConfig(shards=str(shards), **data), str(output), report
