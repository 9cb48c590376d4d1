"""Reads the state of a run from its files: its jobs, its progress, its restarts, and what failed first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.storage.atomic import add_line
from training.checkpoint.store import CheckpointStore
from training.config.experiment import trained_name
from training.processes.interval import HISTORY
from training.run.directory import json_lines, read_json, recorded_config

SUBMITTED = "jobs.jsonl"
"""In RUN_DIR/launch: one line per job submitted for the run."""
EVENTS = "events.jsonl"
"""In RUN_DIR/launch: one line whenever a job began (on this machine), ended (`code`) or was cancelled."""
SIGNS = ("code.json", "metrics.jsonl", f"launch/{SUBMITTED}")
"""Files that mark a directory as a run."""
RECORD = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<level>[A-Z]+|Level \d+) (?P<name>\S+): (?P<text>.*)"
)
"""The first line of a record in logs/rank-N.log; other lines continue the record before."""
NO_ERROR = re.compile(r"[\w.]*\b(?:Preempted|Interrupted): ")
"""The errors with which a run ends that somebody has stopped."""


def append(path: Path, value: dict[str, Any]) -> None:
    """Append a line to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    add_line(path, json.dumps(value))


def submissions(run_dir: Path) -> list[dict[str, Any]]:
    """Return the jobs submitted for a run, oldest first."""
    return json_lines(run_dir / "launch" / SUBMITTED)


def find_runs(folder: Path) -> list[Path]:
    """Return the runs in a directory: itself, or those below it."""
    if any((folder / sign).exists() for sign in SIGNS):
        return [folder]
    found = {path.parents[len(Path(sign).parts) - 1] for sign in SIGNS for path in folder.rglob(sign)}
    return sorted(path for path in found if not {"code", "wandb"} & {*path.relative_to(folder).parts[:-1]})


def is_complete(run_dir: Path) -> bool:
    """Return whether the checkpoint of a training's last step exists."""
    settings = recorded_config(run_dir)
    steps = settings.get("train", {}).get("steps")
    return bool(steps) and _newest_checkpoint(run_dir, settings) >= steps


def _newest_checkpoint(run_dir: Path, settings: dict[str, Any]) -> int:
    place = settings.get("checkpoint", {}).get("dir") or str(run_dir / "checkpoints")
    return CheckpointStore(place).newest_whole() if settings else -1


def run_summary(run_dir: Path, price: float) -> dict[str, Any]:
    """One run by its files alone.

    Args:
        price: dollars per GPU hour.

    Returns:
        stage, step, steps, images_per_second, mfu, data_wait, loss, validation_loss, checkpoint (step; -1: none),
        restarts, causes, code (the last exit code of a failure),
        left_s, device_hours, cost, forecast (dollars; None without GPUs), error.
    """
    settings = recorded_config(run_dir)
    metrics = json_lines(run_dir / "metrics.jsonl")
    last = metrics[-1] if metrics else {}
    steps = settings.get("train", {}).get("steps")
    ends = json_lines(run_dir / HISTORY)
    step, rate = last.get("step", 0), last.get("images_per_second")
    batch = settings.get("data", {}).get("global_batch", 0)
    taught = settings.get("distill", {}).get("steps", 0)
    hours = last.get("device_hours")
    cost = hours * price if hours is not None and settings.get("cluster", {}).get("gpus") else None
    validated = [line["validation_loss"] for line in metrics if line.get("validation_loss") is not None]
    return {
        "run": str(run_dir),
        "stage": trained_name(settings.get("stage", {}).get("name", ""), taught) or run_dir.name,
        "step": step,
        "steps": steps,
        "images_per_second": rate,
        "mfu": last.get("mfu"),
        "data_wait": last.get("data_wait"),
        "loss": last.get("loss"),
        "validation_loss": validated[-1] if validated else None,
        "checkpoint": _newest_checkpoint(run_dir, settings),
        "restarts": sum(end.get("action", "").startswith(("restart", "requeue")) for end in ends),
        "causes": [end.get("why", "") for end in ends],
        "left_s": (steps - step) * batch / rate if steps and rate else None,
        "device_hours": hours,
        "cost": cost,
        "forecast": cost * steps / step if cost is not None and steps and step else None,
        "code": ends[-1].get("code") if ends else None,
        "error": ends[-1].get("why") if ends and ends[-1].get("action", "").startswith("end") else None,
    }


def run_state(row: dict[str, Any], job: dict[str, Any] | None, idle_s: float, alive_s: float = 120.0) -> str:
    """Return complete, pending, running, failed, stopped, new or, if squeue does not answer, unknown.

    Args:
        row: the run's `run_summary`.
        job: the run's job that has not ended, whose `state` is pending, running or unknown; None without one.
        idle_s: seconds since the run last wrote.
        alive_s: a run that wrote more recently counts as running even without a job in a queue.
    """
    if row["steps"] and row["checkpoint"] >= row["steps"]:
        return "complete"
    idle_s = abs(idle_s)  # negative if a clock was set back
    if job is not None and job["state"] == "unknown":  # squeue does not answer
        return "running" if idle_s < alive_s else "unknown"
    if job is not None:
        return str(job["state"])
    if row["error"]:
        return "failed"
    if idle_s < alive_s:
        return "running"
    return "stopped" if row["step"] or row["checkpoint"] >= 0 else "new"


def first_failure(run_dir: Path) -> str | None:
    """Return the first error that any rank logged since the run's newest start, which caused those of the other ranks;
    None if there is none. A request to stop is no error."""
    starts = read_json(run_dir / "code.json").get("starts") or [{}]
    began = starts[-1].get("time", 0.0)
    since = datetime.fromtimestamp(began).strftime("%Y-%m-%d %H:%M:%S,%f")[:23] if began else ""
    found = [(time, rank, text) for rank, path in _rank_logs(run_dir) for time, text in _errors(path)]
    found = [one for one in found if one[0] >= since and not NO_ERROR.match(one[2])]
    if not found:
        return None
    time, rank, text = min(found)
    return f"rank {rank}, {time}: {text}"


def _rank_logs(run_dir: Path) -> Iterator[tuple[int, Path]]:
    for path in (run_dir / "logs").glob("rank-*.log"):
        number = path.stem.partition("-")[2]
        if number.isdigit():
            yield int(number), path


def _errors(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (time, line) of the errors in a log; of a traceback, the last line."""
    records: list[tuple[str, str, list[str]]] = []
    for line in path.read_text(errors="replace").splitlines():
        match = RECORD.match(line)
        if match:
            records.append((match["time"], match["level"], [match["text"]]))
        elif records and line.strip():
            records[-1][2].append(line.strip())
    for time, level, lines in records:
        if level in ("ERROR", "CRITICAL") or (lines[0].startswith("ends with code") and len(lines) > 1):
            yield time, lines[-1]
