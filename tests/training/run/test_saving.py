"""Checkpoints of a run without a model: saving, failing, announcing, rolling back."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.storage.folder import LocalFolder
from training.checkpoint.store import Checkpoint
from training.config.experiment import Experiment
from training.engine.snapshots import HostSnapshot
from training.processes.endings import NotFinite
from training.processes.ranks import Ranks
from training.run import saving
from training.run.directory import RunDir
from training.run.saving import Saving


class Run:
    """A run whose whole state is one number."""

    def __init__(self, directory: Path) -> None:
        config = Experiment()
        config.run.dir, config.train.max_rollbacks = str(directory), 1
        self.value, self.announced = 0.0, []  # type: ignore[var-annotated]
        self.saving = Saving(
            RunDir(config), config, Ranks(), lambda step, place: self.announced.append((step, str(place)))
        )
        with self.saving.downloads() as share:
            found = self.saving.resume(lambda checkpoint: None, share)
            if found is not None:
                self.load(found)

    def announce(self, step: int, place: str) -> None:
        self.announced.append((step, place))

    def load(self, checkpoint: Checkpoint) -> None:
        self.value = float(checkpoint.read("param/w"))

    def meta(self) -> dict[str, Any]:
        return {"counters": {"rollbacks": self.saving.recent_rollbacks}, "rollbacks": self.saving.rollbacks}

    def save(self, step: int, healthy: bool = True, wait: bool = True) -> None:
        snapshot = HostSnapshot({"param/w": torch.tensor(self.value)})
        self.saving.save(step, healthy, lambda: snapshot, self.meta, wait)


def test_a_place_that_cannot_hold_checkpoints_is_named_by_its_key(tmp_path: Path) -> None:
    """As on a read-only mount."""
    (tmp_path / "file").touch()
    config = Experiment()
    config.run.dir, config.checkpoint.dir = str(tmp_path), str(tmp_path / "file" / "ck")
    with pytest.raises(DataError, match=r"checkpoint.dir=.*file/ck: Not a directory"):
        Saving(RunDir(config), config, Ranks(), lambda step, place: None).resume(lambda checkpoint: None, None)


def test_a_committed_checkpoint_is_announced_once_and_resumed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.value = 1.0
    run.save(3, wait=False)
    run.save(5)
    run.save(5)
    places = [f"{tmp_path}/checkpoints/step-{step:08d}" for step in (3, 5)]
    assert run.announced == [(3, places[0]), (5, places[1])]
    again = Run(tmp_path)
    assert (again.value, again.saving.last_step, again.announced) == (1.0, 5, [])


def test_a_checkpoint_that_fails_is_logged_and_the_next_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(LocalFolder, "write", full)
        run.save(3)
    assert "the checkpoint of step 3 was not written" in caplog.text and run.saving.last_step == -1
    run.save(6)
    assert run.saving.last_step == 6 and [step for step, _ in run.announced] == [6]


def test_rolling_back_skips_unhealthy_checkpoints_and_is_counted_until_a_healthy_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(NotFinite, match="there is no checkpoint to roll back to"):
        run.saving.roll_back(2, 2, run.load)
    for step, healthy in ((3, True), (6, False)):
        run.value = float(step)
        run.save(step, healthy)
    assert run.saving.roll_back(7, 2, run.load).step == 3 and run.value == 3.0
    with pytest.raises(NotFinite, match="even after rolling back to the checkpoint of step 3"):
        run.saving.roll_back(9, 2, run.load)
    run.save(9, healthy=False)
    again = Run(tmp_path)
    with pytest.raises(NotFinite, match="even after"):
        again.saving.roll_back(11, 2, again.load)
    again.save(12)
    assert again.saving.roll_back(14, 2, again.load).step == 12
    assert again.saving.rollbacks == 2, "all of the run"


def test_checkpoints_are_saved_at_the_best_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    assert [step for step in range(1, 2001) if run.saving.is_due(step)] == [1000, 2000]
    run.saving.config.checkpoint.every = "auto"
    assert [step for step in range(1, 22) if run.saving.is_due(step)] == [20, 21], "the first shows what one costs"
    monkeypatch.setattr(saving, "best_interval", lambda cost_s, between_s: 300.0)
    run.saving._since, run.saving._last = time.monotonic() - 100.0, 20
    run.save(40)  # 5 s per step
    assert next(step for step in range(41, 200) if run.saving.is_due(step)) == 100
    run.saving.writer.seconds = 1000.0  # it takes this long in the background
    run.saving._since, run.saving._last = time.monotonic() - 100.0, 80
    monkeypatch.setattr(run.saving.writer, "wait", lambda: None)
    run.save(100)
    assert next(step for step in range(101, 400) if run.saving.is_due(step)) == 300, "it would wait for this one"


def test_the_cost_of_writing_in_the_background_is_learnt_from_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, costs = Run(tmp_path), []
    run.saving.config.checkpoint.every = "auto"
    monkeypatch.setattr(saving, "best_interval", lambda cost_s, between_s: costs.append(cost_s) or 300.0)
    monkeypatch.setattr(run.saving.writer, "start", lambda *_: None)
    run.save(20, wait=False)
    assert not costs and run.saving._next == 40, "nobody knows yet how long it is written"
    pace, run.saving.writer.seconds = run.saving._pace, 2.0
    pace.begin(0.0)
    for second in range(1, 11):
        pace.step(second * 1.0, writing=False)
    for number in range(1, 5):
        pace.step(10.0 + number * 1.5, writing=True)
    run.save(40, wait=False)
    assert costs == [pytest.approx(4 * 0.5, abs=0.5)], "four steps took half a second longer; and what the loop waited"
    assert pace.slowed_s() == 0.0
