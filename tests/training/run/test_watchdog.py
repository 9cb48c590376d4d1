from __future__ import annotations

import json
import logging
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from training.processes.exit_codes import EXIT_HUNG
from training.processes.ranks import Ranks
from training.run import watchdog as module
from training.run.watchdog import Watchdog


def watch(tmp_path: Path, ranks: Ranks = Ranks(), **seconds: float) -> tuple[Watchdog, list[int], threading.Event]:  # noqa: B008
    left: list[int] = []
    gone = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        gone.set()

    limits = {"warn_s": 0.1, "limit_s": 0.3, "patient_s": 60.0, **seconds}
    dog = Watchdog(ranks, tmp_path / "rank.log", leave=leave, **limits)
    dog.patient = False
    return dog, left, gone


def test_a_stalled_rank_reports_where_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dog, left, gone = watch(tmp_path)
    with caplog.at_level(logging.WARNING, "cascade"):
        dog.phase("backward", 12)
        assert gone.wait(30)
    assert left == [EXIT_HUNG]
    assert "rank 0 has been in step 12, phase backward, for" in caplog.text
    assert "no progress in step 12, phase backward" in caplog.text
    stacks = (tmp_path / "rank.log").read_text()
    assert "test_watchdog.py" in stacks and stacks.count("Current thread") == 1, "reported once"


def test_slow_phases_get_more_patience(tmp_path: Path) -> None:
    dog, left, gone = watch(tmp_path)
    dog.phase("checkpoint", 3)
    assert not gone.wait(1.0) and left == []
    dog.close()


def test_the_first_step_may_take_long(tmp_path: Path) -> None:
    dog, left, gone = watch(tmp_path)
    dog.patient = True
    dog.phase("forward", 0)
    assert not gone.wait(1.0) and left == []
    dog.patient = False
    assert gone.wait(30)


def test_a_pause_is_no_lack_of_progress(tmp_path: Path, monkeypatch: Any) -> None:
    """It is stopped for an hour (Ctrl-Z and fg) in the middle of a phase; then it stalls, and ends."""

    class Clock:
        late = 0.0

        def monotonic(self) -> float:
            return real() + self.late

        time = staticmethod(module.time.time)

    clock, real = Clock(), module.time.monotonic
    monkeypatch.setattr(module, "time", clock)
    dog, left, gone = watch(tmp_path, warn_s=2.0, limit_s=5.0)
    dog.phase("backward", 12)
    clock.late = 3600.0
    assert not gone.wait(2.0) and left == []
    assert gone.wait(30) and left == [EXIT_HUNG]


def test_a_rank_that_makes_progress_is_left_alone(tmp_path: Path) -> None:
    dog, left, gone = watch(tmp_path, warn_s=30.0, limit_s=0.4)
    for step in range(20):
        dog.phase("data", step)
        assert not gone.wait(0.05)
    dog.close()
    assert left == [] and not (tmp_path / "rank.log").exists()


def test_rank_0_names_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    monkeypatch.setattr(module.time, "time", lambda: 0.0)  # clocks may differ and jump
    now = module.time.monotonic()
    store.set("beat/1", json.dumps(["data", 12, 33.0, now]))
    store.set("beat/2", json.dumps(["step", 11, 1.0, now - 1000]))
    store.set("beat/3", json.dumps(["backward", 12, 30.0, now]))
    dog, _, gone = watch(tmp_path, Ranks(0, 0, 5))
    dog.join(lambda: store)
    with caplog.at_level(logging.WARNING, "cascade"):
        dog.phase("backward", 12)
        assert gone.wait(30)
    assert "rank 1 is in step 12, phase data, for 33 s" in caplog.text
    assert "rank 2 has not reported for 100" in caplog.text and "last in step 11, phase step" in caplog.text
    assert "rank 3" not in caplog.text, "it is where rank 0 is"


def test_heartbeats_need_no_common_clock(monkeypatch: Any) -> None:
    """Rank 1 has different clocks; it reports back rank 0's time, and rank 0 counts as silent once that time stops."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    first, other = (object.__new__(module._Beats) for _ in range(2))
    for beats, rank in ((first, 0), (other, 1)):
        beats._ranks, beats._time_of_0, beats._heard = Ranks(rank, rank, 2), 0.0, 0.0
        beats._now = lambda: ("step", 4, 0.0)
    now = 1_000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    first._ask_time(store)
    now = 7.0  # of the other node
    other._ask_time(store)
    store.set("beat/0", json.dumps(["data", 4, 0.0, first._time_of_0]))
    store.set("beat/1", json.dumps(["data", 4, 0.0, other._time_of_0]))
    assert other._read(store) == ["rank 0 is in step 4, phase data, for 0 s"]
    now = 27.0
    other._ask_time(store)
    assert other._read(store) == ["rank 0 has not reported for 20 s (last in step 4, phase data)"]
    now = 1_003.0
    assert first._read(store) == ["rank 1 is in step 4, phase data, for 3 s"]
    now = 1_020.0
    assert first._read(store) == ["rank 1 has not reported for 20 s (last in step 4, phase data)"]
    store.set("beat/1", json.dumps(["data", 4, 0.0, 0.0]))
    first._heard = 1_005.0
    silent = ["rank 1 has not reported for 15 s (last in step 4, phase data)"]
    assert first._read(store) == silent, "its only report was made before rank 0's first"
