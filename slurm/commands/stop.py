"""`cascade stop run=DIR`: cancels the jobs of a run, or of all runs of an experiment; a training saves first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from slurm.client import ask
from slurm.jobs.records import find_runs
from slurm.local import local_stop
from slurm.queue import living
from training.config.experiment import Experiment


def main(config: Experiment) -> dict[str, Any]:
    """Cancel the jobs that are still in the queue.

    Returns:
        {"stopped": [job numbers]}

    Raises:
        DataError: there is no run.
        UserError: Slurm refused.
    """
    runs = find_runs(Path(config.run.dir))
    if not runs:
        raise DataError(f"{config.run.dir}: no run there; give a run, or the directory of an experiment")
    jobs = [job for run in runs for job in living(run)]
    for job in jobs:
        if "runner" in job:
            local_stop(job, job["state"])
        elif ask("scancel", str(job["job"])) is None:
            raise UserError(
                f"job {job['job']} ({job['name']}): `scancel {job['job']}` failed; does the job belong to you?"
            )
        print(f"cancelled job {job['job']} ({job['name']}), which was {job['state']}", flush=True)
    if not jobs:
        print(f"{config.run.dir}: none of its jobs is in the queue", flush=True)
    return {"stopped": [job["job"] for job in jobs]}
