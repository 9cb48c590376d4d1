"""`cascade logs run=DIR`: the end of a run's log: the job's, or one rank's; follow=true goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError
from training.config.commands import LogsCommand

POLL_S = 0.5


def main(config: LogsCommand) -> dict[str, Any]:
    """Prints the last `lines` lines, and with `follow` what is added, until Ctrl-C.

    Returns:
        {"log": path}

    Raises:
        DataError: there is no such log.
    """
    path = chosen(Path(config.run.dir) / "logs", config.rank)
    with open(path, errors="replace") as file:
        for line in file.read().splitlines()[-config.lines :]:
            print(line, flush=True)
        while config.follow:
            print(file.read(), end="", flush=True)
            time.sleep(POLL_S)
    return {"log": str(path)}


def chosen(folder: Path, rank: int | None) -> Path:
    """The log of a rank; of none, the newest of a job, else rank 0's."""
    if rank is None:
        jobs = sorted(folder.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
        if jobs:
            return jobs[-1]
    path = folder / f"rank-{rank or 0}.log"
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in folder.glob("*.log"))) or "nothing yet"
        raise DataError(f"{path}: no such log; there is {there}")
    return path
