"""`cascade status` and `cascade logs`, from the files of runs."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from data_pipeline.common.errors import ConfigError, DataError
from slurm.commands import logs, status
from slurm.jobs.records import append, find_runs, first_failure, run_state, submissions
from training.cli.compose import load_config

NOW = "2026-01-02 03:04:0"


def make_run(folder: Path, step: int, loss: float, **end: object) -> Path:
    """The files of a run of 100 steps, as a training leaves them."""
    (folder / "logs").mkdir(parents=True)
    settings = {"train": {"steps": 100}, "stage": {"name": folder.name}, "data": {"global_batch": 8}}
    settings |= {"cluster": {"gpus": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "code.json").write_text(json.dumps({"starts": [{"step": 0}]}))
    record = {"step": step, "loss": 0.5, "images_per_second": 4.0, "validation_loss": loss, "device_hours": 3.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + '\n{"step": 99, "lo')
    if end:
        (folder / "restarts.jsonl").write_text(json.dumps(end) + "\n")
    return folder


def rows(folder: Path, *words: str) -> list[dict]:
    return status.main(load_config("status", [f"run.dir={folder}", *words]))["runs"]


def test_the_runs_of_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "base", 50, 0.3, why="rank 1 on n2 was killed by signal 9", action="restart")
    make_run(tmp_path / "sr", 25, 0.2, why="gave up: no progress", action="end 137")
    base, sr = rows(tmp_path)
    assert (base["stage"], base["state"], base["step"], base["restarts"], base["left_s"]) == (
        "base",
        "running",
        50,
        1,
        100,
    )
    assert (base["cost"], base["forecast"]) == (6.0, 12.0)
    assert (sr["state"], sr["error"]) == ("failed", "gave up: no progress")
    shown = capsys.readouterr().out
    assert "rank 1 on n2 was killed by signal 9" in shown and "gave up: no progress" in shown and "50/100" in shown
    assert [row["stage"] for row in rows(tmp_path, "sort=validation_loss", "price=0")] == ["sr", "base"]
    assert rows(tmp_path / "sr")[0]["stage"] == "sr", "one run"


def test_a_student_is_not_mistaken_for_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_run(tmp_path / "base", 100, 0.3)
    student = make_run(tmp_path / "base_4steps", 50, 0.2)
    settings = yaml.safe_load((teacher / "config.yaml").read_text())
    (student / "config.yaml").write_text(yaml.safe_dump({**settings, "distill": {"steps": 4}}))
    assert [row["stage"] for row in rows(tmp_path)] == ["base", "base-distilled-4"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("base ") and lines[2].startswith("base-distilled-4 ")


def test_a_narrow_terminal_omits_the_less_important_columns(tmp_path: Path) -> None:
    make_run(tmp_path / "base", 50, 0.3)
    wide, narrow = (status.status_table(rows(tmp_path), width).splitlines()[0] for width in (0, 60))
    assert wide.split() == ["stage", "state", "step", "loss", "valid.", "images/s", "restarts", "left", "cost"]
    assert narrow.split() == ["stage", "state", "step", "loss", "valid.", "left", "cost"], "no column is empty"


def test_a_command_that_failed_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"name": "prepare", "verb": "prepare", "job": 7, "log": str(tmp_path / "x.log"), "after": [], "time": 1}
    record |= {"home": str(tmp_path), "runner": [1, 0], "host": "elsewhere"}
    append(tmp_path / "launch/jobs.jsonl", record)
    append(tmp_path / "launch/events.jsonl", {"name": "prepare", "what": "ended", "code": 2, "job": 7, "time": 1})
    for lines, why in [
        ("cascade prepare: data/x: there is no such directory\n==> ended with code 2\n",
         "data/x: there is no such directory"),
        ("bash: conda: not found\n==> cluster.conda: 'conda x' failed with code 127\n==> ended with code 2, now\n",
         "cluster.conda: 'conda x' failed with code 127"),
        ("==> cluster.setup: 'false' failed with code 1\n", "cluster.setup: 'false' failed with code 1"),
    ]:  # fmt: skip
        (tmp_path / "x.log").write_text(f"==> job 7\n{lines}")
        rows(tmp_path)
        said = f"prepare: failed with code 2 ({why}), see {tmp_path / 'x.log'}\n"
        assert capsys.readouterr().out == said
    (tmp_path / "x.log").write_text("==> job 7\n==> ended with code 2, now\n")
    rows(tmp_path)
    assert capsys.readouterr().out == f"prepare: failed with code 2, see {tmp_path / 'x.log'}\n"


def test_the_states_of_runs() -> None:
    row = {"steps": 100, "checkpoint": 50, "step": 60, "error": None}
    assert run_state({**row, "checkpoint": 100}, None, 0.0) == "complete"
    assert run_state(row, {"state": "pending"}, 0.0) == "pending"
    assert run_state({**row, "error": "x"}, {"state": "running"}, 1e9) == "running"
    assert run_state({**row, "error": "x"}, None, 1e9) == "failed"
    assert run_state(row, None, 1e9) == "stopped"
    assert run_state({**row, "checkpoint": -1, "step": 0}, None, 1e9) == "new"


@pytest.mark.parametrize(("code", "state"), [(75, "stopped"), (0, "stopped"), (76, "failed")])
def test_a_run_whose_job_has_ended_is_not_shown_as_running(tmp_path: Path, code: int, state: str) -> None:
    """It wrote a moment ago, and only the record of its job shows that it no longer runs."""
    run = make_run(tmp_path / "a", 50, 0.1)
    assert rows(run)[0]["state"] == "running"
    record = {"name": "train", "verb": "train", "job": "x", "log": str(tmp_path / "x.log"), "after": [], "time": 1}
    append(run / "launch/jobs.jsonl", record | {"runner": [1, 0], "host": "elsewhere"})
    append(run / "launch/events.jsonl", {"name": "train", "what": "ended", "code": code, "job": "x", "time": 4e9})
    assert rows(run)[0]["state"] == state


def test_a_directory_that_is_no_run_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run there"):
        rows(tmp_path)
    make_run(tmp_path / "a", 1, 0.1)
    with pytest.raises(ConfigError, match="sort=colour: it must be one of run, stage"):
        rows(tmp_path, "sort=colour")


def test_the_first_failure_is_that_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, 0.1)
    assert first_failure(run) is None
    later = f"{NOW}5,000 ERROR cascade: rank 0: no progress in step 3\n"
    (run / "logs/rank-0.log").write_text(f"{NOW}1,000 INFO cascade: starting\n{later}")
    trace = f"{NOW}3,000 Level 19 cascade: ends with code 1\nTraceback (most recent call last):\nValueError: odd\n"
    (run / "logs/rank-1.log").write_text(trace)
    assert first_failure(run) == f"rank 1, {NOW}3,000: ValueError: odd"
    began = datetime.fromisoformat(f"{NOW}4").timestamp()
    (run / "code.json").write_text(json.dumps({"starts": [{"time": 1.0}, {"time": began}]}))
    assert first_failure(run) == f"rank 0, {NOW}5,000: rank 0: no progress in step 3", (
        "that of an earlier start is over"
    )
    (run / "logs/rank-0.log").write_text(
        f"{NOW}6,000 Level 19 cascade: ends with code 75\nx.endings.Preempted: stopped\n"
    )
    assert first_failure(run) is None, "somebody has stopped it"


def test_only_complete_lines_of_records_count(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/jobs.jsonl").write_text('{"job": 3}\n{"job": ')
    assert submissions(tmp_path) == [{"job": 3}]
    (tmp_path / "launch/code/x/training").mkdir(parents=True)
    assert find_runs(tmp_path) == [tmp_path]


def test_logs_of_a_rank_and_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", 1, 0.1)
    (run / "logs/rank-1.log").write_text("one\ntwo\nthree\n")
    logs.main(load_config("logs", [f"run.dir={run}", "rank=1", "lines=2"]))
    assert capsys.readouterr().out == "two\nthree\n"
    (run / "logs/slurm-7.log").write_text("job\n")
    assert logs.main(load_config("logs", [f"run.dir={run}"])) == {"log": str(run / "logs/slurm-7.log")}
    with pytest.raises(DataError, match=r"rank-5\.log: no such log; the directory contains rank-1\.log, slurm-7\.log"):
        logs.main(load_config("logs", [f"run.dir={run}", "rank=5"]))


def test_logs_that_are_elsewhere(tmp_path: Path) -> None:
    """Where cluster.sbatch.output says; of a job on this machine that is no training; of an experiment's runs."""
    run, jobs = make_run(tmp_path / "a", 1, 0.1), tmp_path / "jobs"
    for home, name, more in ((run, "mine.out", {}), (jobs, "launch-index-001.log", {"runner": [1, 1]})):
        (tmp_path / name).write_text("job\n")
        append(home / "launch/jobs.jsonl", {"job": 7, "name": "x", "log": str(tmp_path / name), **more})
        assert logs.main(load_config("logs", [f"run.dir={home}"])) == {"log": str(tmp_path / name)}
    with pytest.raises(DataError, match=rf"several runs, each with its own logs; give one: run={run}, run={jobs}"):
        logs.main(load_config("logs", [f"run.dir={tmp_path}"]))
