"""`cascade logs run=DIR`: prints the end of a job's or a rank's log; follow=true keeps printing new lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError
from training.config.commands import LogsCommand

POLL_S = 0.5


def main(config: LogsCommand) -> dict[str, Any]:
    """Print the last `lines` lines and, with `follow`, whatever is added until Ctrl-C.

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
    """Return the log of a rank; without a rank, the newest log of a job or else that of rank 0.

    Raises:
        DataError: it does not exist.
    """
    if rank is None:
        jobs = sorted(folder.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
        if jobs:
            return jobs[-1]
    path = folder / f"rank-{rank or 0}.log"
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in folder.glob("*.log"))) or "nothing yet"
        raise DataError(f"{path}: no such log; the directory contains {there}")
    return path
