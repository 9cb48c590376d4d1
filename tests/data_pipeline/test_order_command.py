from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import ShardStream
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from data_pipeline.order_command import main
from tests.data_pipeline.small_shards import write_shards


@dataclass
class Command:
    data: DataConfig
    seed: int = 7
    world_size: int = 1
    workers: int = 0
    position: int = 0
    batches: int = 1
    quality: bool = False


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    write_shards(tmp_path, [9, 4, 12])
    return DataConfig(shards=str(tmp_path), global_batch=8, lanes=4, window=3)


def lines(capsys: pytest.CaptureFixture[str], command: Command) -> list[dict[str, Any]]:
    main(command)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("world_size, workers, micro_batch", [(1, 0, 0), (2, 1, 0), (2, 3, 2), (4, 2, 1)])
def test_shows_what_the_stream_reads(
    capsys: pytest.CaptureFixture[str], data: DataConfig, world_size: int, workers: int, micro_batch: int
) -> None:
    data.micro_batch = micro_batch
    shown = lines(capsys, Command(data, world_size=world_size, workers=workers, position=16, batches=5))
    assert [line["position"] for line in shown] == [16, 24, 32, 40, 48]
    for rank in range(world_size):
        stream = ShardStream(
            data.shards,
            seed=7,
            global_batch=8,
            lanes=4,
            window=3,
            rank=rank,
            world_size=world_size,
            position=16,
            stop=56,
        )
        assert [sample["__key__"] for sample in stream] == [key for line in shown for key in line["ranks"][rank]]


def test_quality_is_a_last_line(capsys: pytest.CaptureFixture[str], data: DataConfig) -> None:
    *batches, quality = lines(capsys, Command(data, batches=2, quality=True))
    assert [batch["position"] for batch in batches] == [0, 8]
    assert 1 <= quality["distinct_shards"] <= 3 and 2 < quality["perfect_distinct_shards"] < 3
    assert quality["neighbour_correlation"] >= 0


def test_mistakes(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"world size 3: .* 1, 2, 4"):
        main(Command(data, world_size=3))
    with pytest.raises(ConfigError, match="position=-1"):
        main(Command(data, position=-1))
