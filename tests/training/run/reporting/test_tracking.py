from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image
from pydantic import BaseModel
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from tests.children import gone
from tests.training.wandb_files import read_wandb, wandb_records, whole_wandb
from tests.training.wandb_server import WandbServer
from training.config.experiment import Experiment, TrackersConfig, WandbConfig
from training.processes.ranks import Ranks
from training.run.directory import RunDir, json_lines
from training.run.reporting import tracking
from training.run.reporting.tracking import (
    SILENT,
    Tracker,
    _could_write,
    duration,
    keep_lines,
    progress_line,
    start_logging,
    stop_logging,
)


@pytest.fixture
def config(tmp_path: Path) -> Experiment:
    config = Experiment()
    config.run.dir, config.wandb.mode, config.train.steps = str(tmp_path / "run"), "disabled", 20
    RunDir(config).create()
    return config


def tracker(config: Experiment, step: int = 0, rank: int = 0, out: Any = None, name: str = "abc12345") -> Tracker:
    return Tracker(RunDir(config), config, Ranks(rank, rank, 2), step, name, {"commit": "c0ffee"}, out)


RECORD = {"loss": 0.5, "grad_norm": float("inf"), "images_per_second": 12.34}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_for_programs_and_people(config: Experiment) -> None:
    out = io.StringIO()
    mine = tracker(config, out=out)
    mine.log(10, RECORD, seconds_left=3723)
    mine.close()
    (line,) = RunDir(config).metrics.read_text().splitlines()
    assert json.loads(line) == {"step": 10, "loss": 0.5, "grad_norm": None, "images_per_second": 12.34}
    text = "demo_base  step 10/20 [##########----------]  50%  loss 0.5000  12.3 images/s  1:02:03 left\n"
    assert out.getvalue() == text


@pytest.mark.parametrize(("term", "codes", "lines"), [("xterm", 2, 1), ("dumb", 0, 2)])
def test_on_a_screen_one_line_is_written_over(
    config: Experiment, monkeypatch: pytest.MonkeyPatch, term: str, codes: int, lines: int
) -> None:
    monkeypatch.setenv("TERM", term)
    out = Screen()
    mine = tracker(config, out=out)
    mine.log(10, RECORD, 1)
    mine.log(20, RECORD, 0)
    assert out.getvalue().count("\r\033[K") == codes and out.getvalue().count("\n") == lines


def test_only_rank_0_writes(config: Experiment) -> None:
    mine = tracker(config, rank=1)
    mine.log(1, RECORD, 1)
    mine.image(1, Path("x.png"))
    mine.checkpoint(1, "x")
    mine.close()
    assert not RunDir(config).metrics.exists()


def test_a_restart_removes_the_records_of_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert keep_lines(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert keep_lines(path, 2) == 0
    assert keep_lines(tmp_path / "none", 2) == 0
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert keep_lines(path, 2) == 1, "damage costs its line"


def test_an_earlier_start_that_is_still_alive_writes_no_line(config: Experiment) -> None:
    first = tracker(config)
    first.log(1, RECORD, 1)
    second = tracker(config, step=1)
    first.log(2, RECORD, 1)
    second.log(2, RECORD, 1)
    first.close()
    second.close()
    lines = [json.loads(line)["step"] for line in RunDir(config).metrics.read_text().splitlines()]
    assert lines == [1, 2]


def test_words() -> None:
    assert duration(59.9) == "0:59" and duration(3600) == "1:00:00" and duration(-1) == "0:00"
    assert "loss not finite" in progress_line("base", 1, 2, {"loss": None, "images_per_second": 1.0}, 1)


def test_every_rank_has_a_log_and_rank_0_a_terminal(config: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    run, log = RunDir(config), logging.getLogger("cascade")
    for rank in (1, 0):
        start_logging(run, Ranks(rank, rank, 2))
        log.info("hello from %d", rank)
        log.log(SILENT, "only for the file of %d", rank)
    stop_logging()
    log.info("nobody listens")
    assert capsys.readouterr().out == "hello from 0\n"
    for rank in (0, 1):
        text = run.log_file(rank).read_text()
        assert f"hello from {rank}" in text and f"only for the file of {rank}" in text


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, 1), (errno.ESTALE, 0)])
def test_lines_that_cannot_be_written_are_written_later(
    config: Experiment, caplog: pytest.LogCaptureFixture, number: int, said: int
) -> None:
    mine = tracker(config, out=io.StringIO())

    class Broken(io.FileIO):
        def write(self, _: Any) -> int:
            raise OSError(number, os.strerror(number))

    mine._lines._file, whole = Broken(mine.run.metrics, "ab"), mine._lines._file
    with caplog.at_level(logging.WARNING):
        mine.log(1, RECORD, 1)
        mine.log(2, RECORD, 1)
    assert caplog.text.count("metrics.jsonl cannot be written") == said
    if said:
        mine._lines._file = whole
    mine.log(3, RECORD, 1)
    assert [line["step"] for line in json_lines(mine.run.metrics)] == [1, 2, 3]


@pytest.mark.parametrize("room", [True, False])
def test_lines_that_are_not_written_yet_at_the_end(
    config: Experiment, caplog: pytest.LogCaptureFixture, room: bool
) -> None:
    mine = tracker(config, out=io.StringIO())
    mine._lines._file, whole = open("/dev/full", "ab", buffering=0), mine._lines._file  # noqa: SIM115
    mine.log(1, RECORD, 1)
    if room:
        mine._lines._file = whole
    mine.close()
    assert [line["step"] for line in json_lines(mine.run.metrics)] == [1] * room
    assert ("metrics.jsonl still cannot be written ([Errno 28]" in caplog.text) is not room


def test_wandb_offline_over_a_restart(config: Experiment) -> None:
    config.wandb.mode = "offline"
    place = Path(config.run.dir) / "checkpoints" / "step-00000001"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    for start in (0, 1):
        mine = tracker(config, step=start, out=io.StringIO())
        if start:
            mine.add(1, {"validation_loss": 0.4, "evaluation/kid/x": math.nan})
        mine.log(start + 1, {"loss": 0.5 / (start + 1), "images_per_second": 1.0}, 1)
        mine.checkpoint(start + 1, place)
        mine.close()
    found = read_wandb(RunDir(config))
    assert {run_id for run_id, _ in found} == {"abc12345"}, "one run over both starts"
    settings = next(values["config"] for _, values in found if "config" in values)
    assert settings["train"]["steps"] == 20 and settings["code"] == {"commit": "c0ffee"}
    artifact = next(values for _, values in found if "artifact" in values)
    assert artifact["places"] == [f"file://{place}/manifest.json"], "by reference, no copy"
    rows = [(v["_step"], v["loss"], v.get("validation_loss")) for _, v in found if "loss" in v]
    assert rows == [(1, 0.5, None), (2, 0.25, 0.4)], "W&B adds to no step of an earlier start"
    lines = json_lines(RunDir(config).metrics)
    assert [(line["step"], line["loss"], line.get("validation_loss")) for line in lines] == [
        (1, 0.5, 0.4),
        (2, 0.25, None),
    ]
    assert "evaluation/kid/x" in lines[0] and lines[0]["evaluation/kid/x"] is None


def kill_wandb() -> None:
    """Does what Slurm's SIGTERM to every process of a step does to W&B's own process, which must end before we
    continue."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    services = []
    for child in map(int, children):
        with suppress(OSError):  # it has ended meanwhile, as that of an earlier test may
            if Path(f"/proc/{child}/comm").read_text().strip() == "wandb-core" and not gone(child):
                services.append(child)
    pid = max(services)
    os.kill(pid, signal.SIGTERM)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def steps_in_wandb(config: Experiment) -> set[tuple[int, ...]]:
    """The steps in each offline file; the process that wrote it may have been killed."""
    found = set()
    for path in RunDir(config).path.glob("wandb/offline-run-*/run-*.wandb"):
        records = [Record.FromString(data) for data in wandb_records(path)]
        items = [item for record in records if record.HasField("history") for item in record.history.item]
        found.add(tuple(int(item.value_json) for item in items if "_step" in (item.key, *item.nested_key)))
    return found


def wait_for_steps(config: Experiment, *files: tuple[int, ...]) -> None:
    """Wait until there are files with just these steps: W&B's own process may still be writing after `finish`."""
    deadline = time.monotonic() + 60
    while not {*files} <= (found := steps_in_wandb(config)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_records_that_wandb_lost_are_logged_again(config: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config.wandb.mode = "offline"

    def start(step: int, *logged: int) -> Tracker:
        mine = tracker(config, step=step, out=io.StringIO())
        for number in logged:
            mine.log(number, RECORD, 1)
        return mine

    start(0, 1, 2).close()
    mine = start(2, 3, 4)
    kill_wandb()
    mine.log(5, RECORD, 1)
    mine.close(exit_code=1)
    lost = {1, 2, 3, 4, 5} - {step for steps in steps_in_wandb(config) for step in steps}
    assert 5 in lost and "W&B failed" in caplog.text
    with suppress(ConnectionError):  # as in a new process
        wandb.teardown()
    Image.new("RGB", (4, 4)).save(RunDir(config).sample_file(4))
    RunDir(config).sample_file(5).write_bytes(b"no picture")
    start(5, 6).close()
    assert "3 records after step 2, which it may have lost, were logged again" in caplog.text
    wait_for_steps(config, (1, 2), (3, 4, 5, 6))
    assert len(list(RunDir(config).path.glob("wandb/offline-run-*/files/media/images/samples_4_*.png"))) == 1

    mine = start(6, 7)
    kill_wandb()
    mine.log(8, RECORD, 1)
    mine.close()
    wait_for_steps(config, (7, 8))  # a run that ends well waits for no other start


def test_wandb_online_loses_nothing_and_waits_for_no_server_that_is_gone(
    config: Experiment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start whose W&B was killed; the next one continues the same run; then the server goes away."""
    caplog.set_level(logging.INFO)
    server = WandbServer()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    config.wandb.mode = "online"
    mine = tracker(config, out=io.StringIO())
    for step in (1, 2, 3):
        mine.log(step, RECORD, 1)
    kill_wandb()
    mine.log(4, RECORD, 1)
    mine.close(exit_code=75)
    assert "W&B failed" in caplog.text
    mine = tracker(config, step=4, out=io.StringIO())
    mine.log(5, RECORD, 1)
    mine.close()
    assert server.steps("abc12345") == [1, 2, 3, 4, 5] and server.runs["abc12345"]["exit_codes"] == [0]

    mine = tracker(config, step=5, out=io.StringIO())
    server.failing = 401
    mine.log(6, RECORD, 1)
    mine.close()
    server.failing = 0
    server.runs.clear()  # deleted
    mine = tracker(config, step=6, out=io.StringIO())
    mine.log(7, RECORD, 1)
    mine.close()
    assert server.steps("abc12345") == [1, 2, 3, 4, 5, 6, 7], "what a server does not have is logged again"

    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    mine = tracker(config, step=7, out=io.StringIO())
    server.stop()
    mine.log(8, RECORD, 1)
    mine.close()
    assert "Timed out finishing run" in caplog.text
    assert json.loads((RunDir(config).path / tracking.WHOLE).read_text())["step"] == 7, "the next start logs 8 again"


def test_names_groups_notes_and_tags_reach_wandb(
    config: Experiment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "not/possible")
    monkeypatch.setenv("WANDB_TAGS", "replaced,")
    monkeypatch.setenv("WANDB_PROJECT", "not/possible")
    config.wandb = WandbConfig("offline", "mine", None, "first try", "sweep 3", "lr, doubled", ["a", "b c"])
    config.data.shards = "https://me:secret@host/a.tar?X-Signature=secret"
    monkeypatch.setattr(sys, "argv", ["cascade", "train", f"data.shards=[{config.data.shards},s3://b/?.tar]"])
    with caplog.at_level(logging.INFO):
        mine = tracker(config, out=io.StringIO())
        mine.log(1, RECORD, 1)
        mine.close()
    assert "kept offline; upload it with: wandb sync" in caplog.text
    assert "WANDB_RUN_ID is not used: a run keeps the id in its file wandb_id" in caplog.text
    (path,) = RunDir(config).path.glob("wandb/offline-run-*/run-*.wandb")
    run = next(record.run for record in whole_wandb(path) if record.HasField("run"))
    assert (run.project, run.display_name, run.run_group) == ("mine", "first try", "sweep 3")
    assert run.notes == "lr, doubled" and list(run.tags) == ["a", "b c"]
    assert b"https://host/a.tar?...,s3://b/?.tar]" in path.read_bytes() and b"secret" not in path.read_bytes()


def test_a_student_has_its_own_name_in_wandb(config: Experiment) -> None:
    config.wandb.mode, config.run.name, config.stage.name = "offline", "demo", "base64"
    config.distill.steps = 4
    tracker(config, out=io.StringIO()).close()
    (path,) = RunDir(config).path.glob("wandb/offline-run-*/run-*.wandb")
    run = next(record.run for record in whole_wandb(path) if record.HasField("run"))
    assert run.display_name == "demo/base64-distilled-4"


def test_wandb_needs_no_home_directory(config: Experiment, tmp_path: Path) -> None:
    """A user without HOME and without an entry in passwd, as in many containers."""
    program = """
import sys
from training.config.experiment import Experiment
from training.processes.ranks import Ranks
from training.run.directory import RunDir
from training.run.reporting.tracking import Tracker
config = Experiment()
config.run.dir = sys.argv[1]
tracker = Tracker(RunDir(config), config, Ranks(), 0, "abc12345", {})
assert tracker._wandb is not None
tracker.close()
"""
    command = [
        "unshare",
        "--user",
        "--map-user=12345",
        "--map-group=12345",
        sys.executable,
        "-c",
        program,
        config.run.dir,
    ]
    command.append(config.run.dir)
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    subprocess.run(command, env=environ, check=True)
    assert list(RunDir(config).path.glob("wandb/offline-run-*/run-abc12345.wandb"))


def test_tensorboard_and_the_metrics_agree_over_a_restart(config: Experiment) -> None:
    from tensorboardX.proto.event_pb2 import Event

    config.trackers = TrackersConfig(tensorboard=True, csv=True)
    picture = Path(config.run.dir) / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    for start in (0, 1):
        mine = tracker(config, step=start, out=io.StringIO())
        mine.log(start + 1, {**RECORD, **({"validation_loss": 0.25} if start else {})}, 1)
        mine.image(start + 1, picture)
        mine.checkpoint(start + 1, picture)
        mine.close()
    lines = (Path(config.run.dir) / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,loss,grad_norm,images_per_second,validation_loss"
    assert lines[1:] == ["1,0.5,,12.34,", "2,0.5,,12.34,0.25"]
    found = []
    for file in sorted((Path(config.run.dir) / "tensorboard").glob("events.*")):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found += [(event.step, value.tag) for value in event.summary.value]
    assert {(1, "loss"), (2, "loss"), (1, "samples"), (2, "samples"), (2, "validation_loss")} <= set(found)


@pytest.mark.parametrize("buffering", [0, -1], ids=["at the start", "in the middle"])
def test_tensorboard_on_a_full_disk_is_dropped(
    config: Experiment, caplog: pytest.LogCaptureFixture, buffering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And training waits for nothing."""
    import tensorboardX.record_writer as writer

    config.trackers = TrackersConfig(tensorboard=True)
    full = open("/dev/full", "wb", buffering)  # noqa: SIM115
    monkeypatch.setattr(writer, "open_file", lambda path: full)
    mine = tracker(config, out=io.StringIO())
    for step in range(1, 50):
        mine.log(step, RECORD, 1)
    mine.close()
    with suppress(OSError):
        full.close()
    assert caplog.text.count("TensorBoard failed") == 1 and len(RunDir(config).metrics.read_text().splitlines()) == 49


def test_a_failing_tracker_is_dropped_and_nothing_else(config: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    config.trackers = TrackersConfig(csv=True)
    mine = tracker(config, out=io.StringIO())
    RunDir(config).metrics.unlink()
    mine.checkpoint(1, "x")
    mine.log(1, RECORD, 1)
    mine.close()
    assert caplog.text.count("metrics.csv failed") == 1


@pytest.mark.parametrize("width", [30, 60, 79, 100])
def test_the_progress_line_fits_the_terminal(width: int) -> None:
    line = progress_line("a_long_name", 240, 12000, {"loss": 0.0831, "images_per_second": 1312.3}, 4000, width)
    assert len(line) <= width and line.startswith("a_long_name  step   240/12000")
    assert ("[" in line) == (width >= 100)


def test_a_checkpoint_that_wandb_cannot_refer_to_costs_no_metrics(config: Experiment, caplog: Any) -> None:
    config.wandb.mode = "offline"
    mine = tracker(config, out=io.StringIO())
    with caplog.at_level(logging.WARNING):
        mine.checkpoint(1, Path(config.run.dir) / "not-there")
    mine.log(2, RECORD, 1)
    mine.close()
    assert "not accept a reference to the checkpoint of step 1" in caplog.text
    assert any(values.get("_step") == 2 for _, values in read_wandb(RunDir(config)))


def test_earlier_versions_of_wandb_get_only_the_settings_that_they_have() -> None:
    class Earlier(BaseModel, extra="forbid"):  # as wandb 0.20.0
        console: str
        silent: bool
        init_timeout: float

    class Now(Earlier):
        finish_timeout: float
        finish_timeout_raises: bool

    assert tracking._settings(Earlier).init_timeout == tracking.INIT_S
    assert tracking._settings(Now).finish_timeout == tracking.FINISH_S


def test_with_wandb_unreachable_tracking_continues_offline(
    config: Experiment, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client against a port where nobody listens."""
    monkeypatch.setattr(tracking, "INIT_S", 3.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    config.wandb.mode = "online"
    with caplog.at_level(logging.WARNING):
        mine = tracker(config, out=io.StringIO(), name="def67890")
    mine.log(1, RECORD, 1)
    mine.close()
    assert "nothing is lost" in caplog.text and "wandb sync" in caplog.text
    found = read_wandb(RunDir(config))
    assert any("loss" in values for _, values in found) and {run_id for run_id, _ in found} == {"def67890"}


def test_directories_that_could_be_written_are_recognized(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert _could_write(tmp_path) and _could_write(tmp_path / "not" / "yet")
    assert not _could_write(tmp_path / "file") and not _could_write(tmp_path / "file" / "below")
    assert not _could_write(Path("~")), "a user without an entry in passwd"
