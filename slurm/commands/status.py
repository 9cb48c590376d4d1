"""`cascade status run=DIR`: an overview of the runs in a directory, from their files and `squeue` alone."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError
from slurm.causes import BEGAN, why_ended
from slurm.jobs.graph import JOBS
from slurm.jobs.records import find_runs, first_failure, run_state, run_summary
from slurm.jobs.remedies import remedy
from slurm.pages.page import status_html
from slurm.queue import job_states
from training.config.commands import COMMANDS, StatusCommand
from training.processes.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED
from training.run.directory import replace_file, try_to_write
from training.run.reporting.tracking import duration

ALIVE = ("pending", "running", "unknown")
"""States of a job that has not ended, as far as anybody knows."""
WRITES_ON_S = 60.0
"""Seconds for which a training may still write after Slurm has begun to end it."""
STOPPED = (EXIT_PREEMPTED, EXIT_INTERRUPTED)
SAYS, ENDED = "==> ", "==> ended with code "
"""How the lines begin that a job's script writes to the log, and the last of them."""
COLUMNS = ("stage", "state", "step", "loss", "valid.", "images/s", "MFU", "wait", "saved", "restarts", "left", "cost")
LESS_IMPORTANT = ("wait", "MFU", "images/s", "saved", "restarts")
"""Columns to leave out on a narrow terminal, in this order."""


def main(config: StatusCommand) -> dict[str, Any]:
    """Print one line per run; with `watch`, repeat until Ctrl-C.

    Returns:
        {"runs": [{"run", "stage", "state", "step", "steps", ...}],
         "jobs": [{"name", "verb", "state", "job", "reason", "code", "log"}]}, where jobs are all that are not trainings

    Raises:
        DataError: there is no run.
        ConfigError: `sort` is not a column.
    """
    folder = Path(config.run.dir)
    if config.html:
        try_to_write(Path(config.html).absolute().parent, "html")
    while True:
        found = {run: job_states(run) for run in find_runs(folder)}
        trainings = {run: [job for job in jobs if trains(job)] for run, jobs in found.items() if run.name != JOBS}
        rows = [row for run, jobs in trainings.items() if (row := row_of(run, jobs, config.price))["steps"] or jobs]
        jobs = [job_row(explained(job)) for jobs in found.values() for job in jobs if not trains(job)]
        if not rows and not jobs:
            raise DataError(f"{folder}: no run there; give a run, or the directory of an experiment, with run=DIR")
        if rows and config.sort not in rows[0]:
            raise ConfigError(f"sort={config.sort}: it must be one of {', '.join(rows[0])}")
        rows.sort(key=lambda row: (row[config.sort] is None, row[config.sort]))
        several = len({row["stage"] for row in rows}) < len(rows)
        for row in rows:
            row["label"] = os.path.relpath(row["run"], folder) if several else row["stage"]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(
            "\n".join([*([status_table(rows, width)] if rows else []), *(_job_line(job) for job in jobs)]), flush=True
        )
        if config.html:
            replace_file(
                Path(config.html), status_html(str(folder), rows, [{**job, "note": note_on_job(job)} for job in jobs])
            )
            print(f"page: {config.html}", flush=True)
        if not config.watch:
            return {"runs": rows, "jobs": jobs}
        time.sleep(config.watch)


def row_of(run: Path, trainings: list[dict[str, Any]], price: float) -> dict[str, Any]:
    """Return the row of a run, from its files and the states of its jobs.

    Args:
        run: the run directory.
        trainings: the newest jobs that were submitted to train it, from `job_states`.
        price: dollars per GPU hour.
    """
    row = run_summary(run, price)
    alive = [job for job in trainings if job["state"] in ALIVE]
    job = alive[-1] if alive else None
    written = [path.stat().st_mtime for path in (run / "metrics.jsonl", run / "code.json") if path.exists()]
    row["state"] = run_state(row, job, time.time() - max(written, default=0.0))
    row["job"] = job["job"] if job else None
    row["why"] = job["reason"] if job and row["state"] in ("pending", "unknown") else None
    if job is None and row["state"] in ("new", "running", "stopped"):
        _add_end(row, trainings, max(written, default=0.0))
    row["error"] = row["error"] or (first_failure(run) if row["state"] in ("failed", "stopped") else None)
    row["remedy"] = remedy(f"{row['error']} {first_failure(run) or ''}", row["code"]) if row["error"] else None
    return row


def _add_end(row: dict[str, Any], trainings: list[dict[str, Any]], wrote: float) -> None:
    """Add to a row what became of the run's last job, which has left the queue.

    Args:
        row: the row; its state is new, running (it wrote recently) or stopped.
        trainings: as in `row_of`.
        wrote: when the run last wrote, seconds since 1970.
    """
    if not trainings:
        return
    last = explained(trainings[-1])
    failed = last["state"] == "failed"
    if last["reason"] and last["ended"] > wrote - WRITES_ON_S:
        row["state"] = "failed" if failed else "stopped"
        row["error" if failed else "why"] = f"job {last['job']}: {last['reason']}"
    elif row["state"] == "running" and last["ended"] and last["ended"] > wrote - WRITES_ON_S:
        row["state"] = "failed" if last["code"] and last["code"] not in STOPPED else "stopped"
    elif row["state"] == "new":  # it never came as far as a step
        row["state"], row["code"] = "failed" if failed else "stopped", last["code"]
        row["error"] = (
            f"job {last['job']} ended with code {last['code']}{_said(last)}, see {last['log']}"
            if last["code"]
            else None
        )


def explained(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job with Slurm's reason for ending it, as `reason`, and when, as `ended`, if its script recorded no end;
    such a job is failed unless somebody cancelled it."""
    cause = None
    if job["state"] == "cancelled" and "runner" not in job and "array" not in job:
        cause = why_ended(str(job["job"]), Path(job["log"]))
    if cause is None:
        return job
    return {**job, "state": "failed" if cause.is_failure else "cancelled", "reason": cause.why, "ended": cause.time}


def trains(job: dict[str, Any]) -> bool:
    """Return whether a job, given by its record, is a training."""
    return COMMANDS[job["verb"]].makes_run


def job_row(job: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a job that is not a training."""
    return {key: job.get(key) for key in ("name", "verb", "state", "job", "reason", "code", "log")}


def _job_line(job: dict[str, Any]) -> str:
    return f"{job['name']}: {job['state']}{note_on_job(job)}"


def note_on_job(job: dict[str, Any]) -> str:
    """Return what to add to the state of a job that is not a training; empty if there is nothing to say."""
    notes = {
        "pending": f", waits: {job['reason']}",
        "unknown": f": {job['reason']}",
        "running": f" on {job['reason']}",
        "failed": f" with code {job['code']}{_said(job)}, see {job['log']}" if job["code"] else f": {job['reason']}",
        "cancelled": f": {job['reason']}" if job["reason"] else "",
    }
    return notes.get(job["state"], "")


def _said(job: dict[str, Any]) -> str:
    """Return the last message of a command that failed, or of its script that ended it, as its log has it; empty if
    there is none."""
    start, said, by_script = f"cascade {job['verb']}: ", "", ""
    with suppress(OSError), open(job["log"], errors="replace") as file:
        for line in file:
            if line.startswith(start):
                said = line.removeprefix(start).strip()
            if not line.startswith(ENDED):
                by_script = line.removeprefix(SAYS).strip() if line.startswith(SAYS) else ""
                by_script = "" if line.startswith(BEGAN) else by_script
    return f" ({by_script or said})" if by_script or said else ""


def status_table(rows: list[dict[str, Any]], width: int = 0) -> str:
    """Return aligned columns, followed by why jobs wait and what went wrong.

    Args:
        rows: of the runs.
        width: of the terminal; columns that do not fit are left out, the less important ones first. 0: no limit.
    """
    cells = [dict(zip(COLUMNS, _cells(row), strict=True)) for row in rows]
    widths = {name: max(len(name), *(len(line[name]) for line in cells)) for name in COLUMNS}
    shown = [name for name in COLUMNS if any(line[name] for line in cells)]
    for name in LESS_IMPORTANT:
        if width and sum(widths[one] + 2 for one in shown) - 2 > width and name in shown:
            shown.remove(name)
    lines = ["  ".join(name.ljust(widths[name]) for name in shown).rstrip()]
    lines += ["  ".join(line[name].ljust(widths[name]) for name in shown).rstrip() for line in cells]
    for row in rows:
        notes = [f"{'waits' if row['state'] == 'pending' else 'state'}: {row['why']}"] if row["why"] else []
        notes += [f"error: {row['error']}"] if row["error"] else []
        notes += [f"what to do (docs/training.md): {row['remedy']}"] if row["remedy"] else []
        notes += [f"last restart: {row['causes'][-1]}"] if row["causes"] and not row["error"] else []
        lines += [f"{row['run']}: {note}" for note in notes]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    cost = f"${row['cost']:,.0f}" if row["cost"] is not None else shown("device_hours", ".1f") + " h"
    forecast = f" of ${row['forecast']:,.0f}" if row["forecast"] is not None else ""
    return (
        row.get("label") or row["stage"],
        row["state"],
        f"{row['step']}/{row['steps'] or '?'}",
        shown("loss", ".4f"),
        shown("validation_loss", ".4f"),
        shown("images_per_second", ".1f"),
        shown("mfu", ".1%"),
        shown("data_wait", ".0%"),
        str(row["checkpoint"]) if row["checkpoint"] >= 0 else "",
        str(row["restarts"]),
        duration(row["left_s"]) if row["left_s"] is not None and row["state"] != "complete" else "",
        cost + forecast if cost.strip() != "h" else "",
    )
