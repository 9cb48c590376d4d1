"""Jobs on this machine: order, failures, stopping, restarts, and how `status`, `stop` and `resume` treat them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from slurm.commands import resume, status, stop
from slurm.jobs.graph import BEGUN, SUCCEEDED
from slurm.jobs.records import SUBMITTED, append
from slurm.local import LocalRunner, is_alive, local_record
from slurm.queue import job_states
from slurm.supervise import history
from tests.slurm.conftest import until
from tests.slurm.launching import launch
from training.cli.compose import load_config
from training.run.directory import json_lines

COUNT = "n=$(cat starts 2>/dev/null | wc -l)\necho start >> starts\n"


def job(home: Path, number: int, name: str, body: str, *after: str, when: str = SUCCEEDED) -> dict:
    """The record of a job whose script is `body`."""
    (home / "launch").mkdir(parents=True, exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    script = home / "launch" / f"{name}.sh"
    script.write_text(f"cd '{home}'\n{body}\n")
    record: dict[str, Any] = {
        "name": name,
        "verb": "index",
        "script": str(script),
        "log": str(home / "logs" / f"{name}.log"),
    }
    record |= {"home": str(home), "after": list(after), "when": when, "most": 3, "time": time.time() + number}
    return {**local_record(), **record}


def states(home: Path) -> dict[str, str]:
    return {one["name"]: one["state"] for one in job_states(home)}


def recorded(home: Path, jobs: list[dict]) -> list[dict]:
    for one in jobs:
        append(home / "launch" / SUBMITTED, one)
    return jobs


def test_each_job_starts_after_those_it_needs(tmp_path: Path) -> None:
    home = tmp_path / "my jobs"
    jobs = [
        job(home, 0, "a", "sleep 0.3; echo a >> order"),
        job(home, 1, "b", "echo b >> order", "a"),
        job(home, 2, "beside", "echo beside >> order; until grep -q b order; do sleep 0.05; done", "a", when=BEGUN),
    ]
    assert LocalRunner(recorded(home, jobs), at_once=2).run() == {"a": 0, "b": 0, "beside": 0}
    assert (home / "order").read_text().split() == ["beside", "a", "b"], "one that waits for a beginning runs beside"
    assert states(home) == {"a": "complete", "b": "complete", "beside": "complete"}


def test_jobs_run_one_at_a_time(tmp_path: Path) -> None:
    body = "mkdir busy || exit 2; sleep 0.2; rmdir busy"
    assert LocalRunner([job(tmp_path, n, f"j{n}", body) for n in range(3)], at_once=1).run() == {
        "j0": 0,
        "j1": 0,
        "j2": 0,
    }


def test_a_failure_cancels_what_depends_on_it_and_resume_does_the_rest(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, 0, "first", COUNT),
        job(tmp_path, 1, "bad", "[ -e repaired ] || exit 2", "first"),
        job(tmp_path, 2, "needs", "echo ran >> needs", "bad"),
        job(tmp_path, 3, "free", "echo ran >> free", "first"),
    ]
    assert LocalRunner(recorded(tmp_path, jobs), at_once=1).run() == {"first": 0, "bad": 2, "needs": 2, "free": 0}
    assert states(tmp_path) == {"first": "complete", "bad": "failed", "needs": "cancelled", "free": "complete"}
    (tmp_path / "repaired").touch()
    answer = resume.main(load_config("resume", [f"run.dir={tmp_path}"]))
    assert [one["name"] for one in answer["resumed"]] == ["bad", "needs"]
    assert set(states(tmp_path).values()) == {"complete"}
    assert (tmp_path / "starts").read_text() == "start\n", "what was complete did not run again"
    assert resume.main(load_config("resume", [f"run.dir={tmp_path}"]))["resumed"] == []


def test_launches_whose_jobs_have_the_same_names_are_all_resumed(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        home = tmp_path / name / "jobs"
        recorded(home, [{**job(home, number, "index", "echo ran >> ran"), "launch": name, "host": "elsewhere"}])
    answer = resume.main(load_config("resume", [f"run.dir={tmp_path}"]))
    assert [one["name"] for one in answer["resumed"]] == ["index", "index"]
    assert states(tmp_path / "a/jobs") == states(tmp_path / "b/jobs") == {"index": "complete"}


def test_a_killed_job_is_restarted(tmp_path: Path) -> None:
    body = COUNT + "[ $n -gt 0 ] || kill -9 $$"
    assert LocalRunner([job(tmp_path, 0, "a", body)], at_once=1).run() == {"a": 0}
    assert [(end.code, end.action) for end in history(tmp_path)] == [(137, "restart")]


PROGRAM = """
import json, sys
from slurm.local import LocalRunner, local_record
from slurm.jobs.records import append
jobs = [{**json.loads(line), **local_record()} for line in open(sys.argv[1])]
for job in jobs:
    append(__import__("pathlib").Path(job["home"]) / "launch/jobs.jsonl", job)
LocalRunner(jobs, 1).run()
"""


@pytest.fixture()
def busy(tmp_path: Path, request: pytest.FixtureRequest, no_nohup: None):
    """A launch in a separate process: one job that runs until it is asked to end, and one that waits for it."""
    jobs = [
        job(tmp_path, 0, "long", "trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done"),
        job(tmp_path, 1, "waits", "true", "long"),
    ]
    for one in jobs:
        append(tmp_path / "jobs", one)
    with open(getattr(request, "param", tmp_path / "output"), "w") as output:
        runner = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "jobs")], stdout=output)
    log = tmp_path / "logs/long.log"
    until(lambda: log.exists() and "up" in log.read_text(), 30)
    yield runner
    runner.kill()
    runner.wait()


def busy_output(folder: Path) -> str:
    return (folder / "output").read_text()


def test_status_shows_and_stop_ends_a_launch(busy: subprocess.Popen, tmp_path: Path) -> None:
    found = {one["name"]: one for one in status.main(load_config("status", [f"run.dir={tmp_path}"]))["jobs"]}
    assert (found["long"]["state"], found["waits"]["state"]) == ("running", "pending")
    assert found["waits"]["reason"] == "after long"
    assert len(stop.main(load_config("stop", [f"run.dir={tmp_path}"]))["stopped"]) == 2
    assert busy.wait(30) == 0
    assert "saved" in (tmp_path / "logs/long.log").read_text()
    assert states(tmp_path) == {"long": "failed", "waits": "cancelled"}


def test_ctrl_c_stops_all_jobs(busy: subprocess.Popen, tmp_path: Path) -> None:
    busy.send_signal(signal.SIGINT)
    assert busy.wait(30) == 0
    assert "saved" in (tmp_path / "logs/long.log").read_text()
    assert states(tmp_path)["waits"] == "cancelled"
    said = busy_output(tmp_path)
    assert "==> waits: cancelled, asked to stop\n" in said
    assert said.endswith(f"==> stopped; to continue: cascade resume run={os.path.relpath(tmp_path)}\n")


@pytest.mark.parametrize("busy", ["/dev/full"], indirect=True)
def test_a_closed_terminal_stops_all_jobs_and_they_save(busy: subprocess.Popen, tmp_path: Path) -> None:
    """Output can no longer be written."""
    busy.send_signal(signal.SIGHUP)
    assert busy.wait(30) == 0
    assert "saved" in (tmp_path / "logs/long.log").read_text()
    assert states(tmp_path)["waits"] == "cancelled"


def test_nothing_outlives_a_launch_that_was_killed(busy: subprocess.Popen, tmp_path: Path) -> None:
    (began,) = json_lines(tmp_path / "launch/events.jsonl")
    busy.kill()
    busy.wait()
    until(lambda: not is_alive(began["process"], local_record()["host"]), 10)
    assert states(tmp_path) == {"long": "cancelled", "waits": "cancelled"}


def test_the_launch_of_a_cascade(here: Path, program, capsys: pytest.CaptureFixture[str]) -> None:
    program('echo "$3" >> order\n[ "$3" != bundle ] || exit 2')
    with pytest.raises(SystemExit) as end:
        launch("experiment=demo", own=["verb=all"])
    assert end.value.code == 2
    assert (here / "order").read_text().split() == [
        *("prepare", "index", "embed", "train", "train", "bundle", "evaluate", "evaluate"),
    ]
    states: dict[str, str] = {}
    for home in (here / "runs/demo/jobs", here / "runs/demo/demo_sr"):
        states |= {one["name"]: one["state"] for one in job_states(home)}
    assert states["bundle"] == "failed" and states["evaluate"] == "cancelled" and states["train-demo_sr"] == "complete"
    assert "evaluate: cancelled, bundle has failed" in capsys.readouterr().out


def test_requests_that_only_a_scheduler_can_serve_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.time=1:00:00: a launch with cluster=local would not use it, only"):
        launch("experiment=demo", "cluster.time=1:00:00", own=["verb=all", "dry_run=true"])


def test_a_directory_without_launches_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing was launched from there"):
        resume.main(load_config("resume", [f"run.dir={tmp_path}"]))
