"""Runs that were disturbed: how the next start reacts, and what the ranks report."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.shards.writer import ShardWriter
from tests.training import forks
from tests.training.runs import chaos, curve, experiment, metrics, store
from training.run.directory import STOP, RunDir, json_lines
from training.train import main


def test_a_complete_run_with_a_damaged_checkpoint_continues(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=6, zero__stage=0)
    assert forks.start(config).codes() == [0]
    wanted = curve(config)
    file = next((Path(config.run.dir) / "checkpoints" / "step-00000006").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    again = forks.start(config)
    assert again.codes() == [0] and "resuming from step 3" in again.text
    assert curve(config) == wanted and store(config).open(6).problems() == []


def test_checkpoints_in_another_place_are_not_a_new_run(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=3, zero__stage=0)
    assert forks.start(config).codes() == [0]
    config.train.steps, config.checkpoint.dir = 5, str(tmp_path / "elsewhere")
    moved = forks.start(config)
    assert moved.codes() == [2] and "this run has some in" in moved.text and "set checkpoint.dir=null" in moved.text
    assert len(metrics(config)) == 3, "nothing was lost"
    shutil.copytree(f"{config.run.dir}/checkpoints", config.checkpoint.dir)
    assert forks.start(config).codes() == [0]
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_from_before_the_first_step_is_read_by_any_stage(tmp_path: Path, shards: str) -> None:
    for first, then, optimizer in ((0, 1, "adamw"), (1, 0, "adafactor"), (0, 0, "adamw8bit"), (0, 1, "adafactor")):
        home = tmp_path / f"{first}{then}{optimizer}"
        config = experiment(home, shards, train__steps=2, zero__stage=first, optimizer__name=optimizer)
        home.mkdir()
        assert chaos(config, 1, {"what": "data", "rank": 0, "step": 1}).codes() == [2]
        assert store(config).steps() == [0]
        config.zero.stage = then
        again = forks.start(config)
        assert again.codes() == [0], again.text


def test_a_rank_that_dies_during_the_start_is_named_in_one_sentence(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards)
    running = chaos(config, 2, {"what": "start", "rank": 1, "step": 0})
    assert running.codes() == [78, -signal.SIGKILL]
    assert "rank 0: another rank died or did not respond during the start" in running.text
    assert "Traceback" not in running.text


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ({"what": "elsewhere", "rank": 1, "section": "run"}, "run.dir={place}: rank 1 on "),
        ({"what": "elsewhere", "rank": 1, "section": "checkpoint"}, "checkpoint.dir={place}: rank 1 on "),
        ({"what": "missing", "rank": 0, "module": "tensorboardX"}, "trackers.tensorboard=true: it needs "),
    ],
)
def test_something_missing_on_one_rank_ends_all_with_one_sentence(
    tmp_path: Path, shards: str, event: dict[str, Any], sentence: str
) -> None:
    """At the start, whichever rank it is: rank 0 reports it, and no rank waits for the one that cannot continue."""
    config = experiment(tmp_path, shards, train__steps=1, trackers__tensorboard=True)
    place = str(tmp_path / "elsewhere")
    running = chaos(config, 2, {**event, "step": 0, "place": place})
    assert running.codes() == [2, 2], running.text
    assert running.text.count(sentence.format(place=place)) == 1 and "another rank died" not in running.text, (
        running.text
    )


def test_the_first_step_and_the_last_checkpoint_may_take_long(tmp_path: Path, shards: str) -> None:
    limits = {"train__timeout_s": 2.0, "train__timeout_first_s": 600.0, "train__steps": 3}
    config = experiment(tmp_path, shards, zero__stage=0, **limits)
    slow = [{"what": "sleep", "rank": 0, "step": 0, "phase": "forward", "seconds": 5.5}]
    slow += [{"what": "slow write", "rank": 0, "step": 3, "seconds": 5.5}]
    running = chaos(config, 1, *slow)
    assert running.codes() == [0], running.text


def test_too_many_bad_samples_stop_all_ranks(tmp_path: Path) -> None:
    """Half of the pictures are damaged; the sums over the ranks decide, and both end in the same way, after saving."""
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with ShardWriter(str(tmp_path / f"shards/{number}.tar")) as shard:
            for index in range(20):
                data = io.BytesIO()
                Image.effect_noise((32, 32), 90).convert("RGB").save(data, "PNG")
                broken = index % 2 == 0
                picture = data.getvalue()[: len(data.getvalue()) // 2] if broken else data.getvalue()
                shard.write(f"{number}-{index}", {"png": picture, "txt": b"a red circle"})
    config = experiment(tmp_path, str(tmp_path / "shards"))
    running = forks.start(config, 2)
    assert running.codes() == [2, 2]
    assert running.text.count("samples were bad, more than data.max_bad_share=0.01") == 1, running.text
    assert store(config).newest() is not None


def test_a_run_that_is_asked_to_stop_saves_ends_and_stays_stopped(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=5000, checkpoint__every=5000)
    run, running = RunDir(config), forks.start(config, 2)
    while not json_lines(run.metrics):
        time.sleep(0.05)
    run.ask_to_stop("kid got worse")
    assert running.codes() == [0, 0], running.text
    answer = json.loads(running.result.read_text())
    step = answer["step"]
    assert 1 <= step < 5000 and not answer["complete"] and answer["stopped"] == "kid got worse"
    assert f"stopped early after step {step}: kid got worse" in running.text
    assert store(config).newest_whole() == step and metrics(config)[-1]["step"] == step
    assert forks.start(config).codes() == [0] and store(config).newest_whole() == step, "not one more step"
    (run.path / STOP).rename(tmp_path / STOP)
    config.train.steps = step + 1
    assert forks.start(config).codes() == [0] and store(config).newest_whole() == step + 1
    (tmp_path / STOP).rename(run.path / STOP)
    done = forks.start(config)
    assert done.codes() == [0] and json.loads(done.result.read_text())["complete"], "nothing is left to stop"
    assert "stopped early" not in done.text
    assert main(config)["complete"]
