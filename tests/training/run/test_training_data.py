"""The training data of one rank without a model: counts over several starts, the end of the data, and what resuming
refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import CascadeError, DataError
from tests.training.runs import experiment
from training.processes.ranks import Ranks
from training.run.directory import RunDir
from training.run.training_data import COUNTS, TrainingData


def open_data(tmp_path: Path, shards: str, meta: dict[str, Any] | None = None, **changes: Any) -> TrainingData:
    config = experiment(tmp_path, shards, data__own_process=False, **changes)
    run = RunDir(config)
    run.create()
    return TrainingData(config, Ranks(), run, meta or {})


def test_position_and_step_follow_the_batches(tmp_path: Path, shards: str) -> None:
    data = open_data(tmp_path, shards, data__micro_batch=4)
    try:
        assert (data.accumulate, data.step, data.position) == (2, 0, 0)
        batches = data.next()
        assert batches is not None and [len(batch.keys) for batch in batches] == [4, 4]
        assert (data.step, data.position) == (1, 8)
        data.take_back()
        assert data.position == 0
    finally:
        data.loader.close()


def test_counts_continue_over_starts_and_name_only_what_occurred(tmp_path: Path, shards: str) -> None:
    data = open_data(
        tmp_path, shards, {"position": 8, "data_counters": {"samples": 8, "bad": 1, "bad_decode_error": 1}}
    )
    try:
        data.loader.counters.update(samples=8, bad=2, bad_decode_error=1, bad_unheard_of=1)
        counts = data.counts()
        assert list(counts) == list(COUNTS) and counts["bad_other"] == 1
        assert data.of_whole_run(list(counts.values())) == {
            "samples": 16, "bad": 3, "bad_decode_error": 2, "bad_other": 1,
        }  # fmt: skip
    finally:
        data.loader.close()


def test_one_process_without_data_ends_with_the_reason(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(tmp_path, shards)

    def gone(loader: Any) -> Any:
        raise DataError("the shard is gone")

    monkeypatch.setattr(type(data.loader), "__next__", gone)
    try:
        assert data.next() is None and data.failed and data.position == 0
        assert str(data.error()) == "the shard is gone"
    finally:
        data.loader.close()


def test_other_data_than_the_checkpoints_is_refused(tmp_path: Path, shards: str) -> None:
    data = open_data(tmp_path, shards)
    try:
        state = data.loader.state()
        data.check({"data": state})
        with pytest.raises(CascadeError, match="trained in another order"):
            data.check({"data": {**state, "seed": state["seed"] + 1}})
    finally:
        data.loader.close()
