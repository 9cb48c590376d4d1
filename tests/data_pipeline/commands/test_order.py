from __future__ import annotations

import contextlib
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import ShardStream
from data_pipeline.commands.order import main
from data_pipeline.common.errors import ConfigError
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.order.order import rank_positions
from data_pipeline.shards.dataset import load_or_build
from data_pipeline.storage import store
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


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("uneven")
    write_shards(folder, [9, 0, 4, 21, 1, 12])
    return str(folder)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    window=st.integers(1, 20),
    min_aesthetic=st.sampled_from([None, 4.0, 5.5]),
    world_size=st.sampled_from([1, 2, 4, 8]),
    workers=st.sampled_from([0, 1, 3]),
    stop=st.integers(0, 9),
)
def test_ranks_workers_and_stops_change_nothing(
    uneven: str, seed: int, window: int, min_aesthetic: float | None, world_size: int, workers: int, stop: int
) -> None:
    rules = FilterConfig(min_aesthetic=min_aesthetic)
    data = DataConfig(shards=uneven, global_batch=16, lanes=8, window=window, filter=rules)

    def shown(**layout: int) -> list[list[str]]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(Command(data, seed=seed, **layout))
        lines = [line for line in out.getvalue().splitlines() if line.startswith("{")]  # warnings may go there too
        return [list(itertools.chain(*json.loads(line)["ranks"])) for line in lines]

    whole = shown(batches=12)
    assert shown(world_size=world_size, workers=workers, position=16 * stop, batches=12 - stop) == whole[stop:]
    samples = load_or_build(store.expand(uneven), data).samples
    keys = [key for batch in whole for key in batch]
    in_order = dict(zip(stream_positions(data, 12), keys, strict=True))
    for epoch in range(len(keys) // samples):
        assert len({in_order[p] for p in range(epoch * samples, (epoch + 1) * samples)}) == samples


def stream_positions(data: DataConfig, steps: int) -> list[int]:
    parts = [rank_positions(step, data.global_batch, data.lane_count, 0, 1) for step in range(steps)]
    return [p for part in parts for p in part.tolist()]


def test_the_mixing_quality_is_the_last_line(capsys: pytest.CaptureFixture[str], data: DataConfig) -> None:
    *batches, quality = lines(capsys, Command(data, batches=2, quality=True))
    assert [batch["position"] for batch in batches] == [0, 8]
    assert 1 <= quality["distinct_shards"] <= 3 and 2 < quality["perfect_distinct_shards"] < 3
    assert quality["neighbour_correlation"] >= 0


def test_mistakes(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"world size 3: .* 1, 2, 4"):
        main(Command(data, world_size=3))
    for key, value in {"position": -1, "workers": -1, "batches": -1}.items():
        with pytest.raises(ConfigError, match=f"{key}={value}: it "):
            main(Command(data, **{key: value}))
    with pytest.raises(ConfigError, match="position=1000000000000000000000"):
        main(Command(data, position=10**21))


def test_nothing_to_print_is_refused(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="batches=0: there is nothing to print"):
        main(Command(data, batches=0))
    main(Command(data, batches=0, quality=True))
