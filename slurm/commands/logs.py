"""`cascade logs run=DIR`: prints the end of a job's or a rank's log; follow=true keeps printing new lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError
from slurm.jobs.records import find_runs, submissions
from training.config.commands import LogsCommand

POLL_S = 0.5


def main(config: LogsCommand) -> dict[str, Any]:
    """Print the last `lines` lines and, with `follow`, whatever is added until Ctrl-C.

    Returns:
        {"log": path}

    Raises:
        DataError: there is no such log, or the directory holds several runs.
    """
    run = Path(config.run.dir)
    runs = find_runs(run)
    if runs and runs != [run]:
        raise DataError(
            f"{run}: it holds several runs, each with its own logs; give one: run={', run='.join(map(str, runs))}"
        )
    path = chosen(run, config.rank)
    with open(path, errors="replace") as file:
        for line in file.read().splitlines()[-config.lines :]:
            print(line, flush=True)
        while config.follow:
            print(file.read(), end="", flush=True)
            time.sleep(POLL_S)
    return {"log": str(path)}


def chosen(run: Path, rank: int | None) -> Path:
    """Return the log of a rank; without a rank, the newest log of a job or else that of rank 0, or of a job on this
    machine.

    Raises:
        DataError: it does not exist.
    """
    folder = run / "logs"
    path = folder / f"rank-{rank or 0}.log"
    if rank is None:
        recorded = [(Path(job["log"]), "runner" in job) for job in submissions(run)]
        jobs = {*folder.glob("slurm-*.log"), *(log for log, here in recorded if not here and log.is_file())}
        if not jobs and not path.is_file():
            jobs = {log for log, here in recorded if log.is_file()}
        if jobs:
            return max(jobs, key=lambda log: log.stat().st_mtime)
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in folder.glob("*.log"))) or "nothing yet"
        raise DataError(f"{path}: no such log; the directory contains {there}")
    return path
