"""One record of the log, and the one line about a rank that stays slow."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import experiment
from training.processes.ranks import Ranks
from training.run.directory import RunDir
from training.run.reporting.report import SLOW_RECORDS, Report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    config = experiment(tmp_path, "nowhere")
    run = RunDir(config)
    run.create()
    return Report(
        run, config, Ranks(), step=0, attempt=1, flops=0.0, peak_flops=0.0, wandb_id="abc", code={}
    )  # fmt: skip


def record(**more: Any) -> dict[str, Any]:
    return {"loss": 1.0, "images_per_second": 8.0, **more}


def test_a_record_holds_the_device_hours(report: Report, tmp_path: Path) -> None:
    report.log(1, record())
    report.tracker.close()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["step"] == 1 and 0 < line["device_hours"] == pytest.approx(report.device_hours(), rel=0.5)


def test_a_rank_that_stays_slow_is_named_once(report: Report, caplog: pytest.LogCaptureFixture) -> None:
    slow = {"slow_rank": 3, "slow_factor": 2.5}
    with caplog.at_level(logging.WARNING, "cascade"):
        for step in range(SLOW_RECORDS - 1):
            report.log(step, record(**slow))
        report.log(SLOW_RECORDS, record())  # it has recovered
        assert not caplog.messages
        for step in range(SLOW_RECORDS + 2):
            report.log(SLOW_RECORDS + step, record(**slow))
    assert len(caplog.messages) == 1 and "rank 3 is slow" in caplog.messages[0]


def test_between_records_a_terminal_shows_the_step_once_per_second(report: Report, monkeypatch: Any) -> None:
    class Screen(io.StringIO):
        terminal = True

        def isatty(self) -> bool:
            return self.terminal

    monkeypatch.setenv("TERM", "xterm")
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = report.tracker._out = Screen()
    report.meter.start(0)
    for step, now in ((1, 100.5), (2, 101.0), (3, 101.75)):
        clock[0] = now
        report.tick(step, 0.5 if step == 1 else math.nan)
    lines = out.getvalue().split("\r\033[K")[1:]
    assert [line.split("step ")[1].split("/")[0].strip() for line in lines] == ["1", "3"]
    assert "loss 0.5000" in lines[0] and "loss not finite" in lines[1]
    assert not report.tracker.run.metrics.read_text(), "the records stay the same"
    out.terminal, clock[0] = False, 200.0
    report.tick(4, 0.5)
    assert out.getvalue().count("step") == 2, "a file gets the records only"
