"""`cascade stop run=DIR`: cancels the jobs of a run, or of all runs of an experiment; a training saves first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from slurm.jobs.records import find_runs
from slurm.local import local_stop
from slurm.queue import cancel, living
from training.config.experiment import Experiment


def main(config: Experiment) -> dict[str, Any]:
    """Cancel the jobs that are still in the queue.

    Returns:
        {"stopped": [job numbers]}

    Raises:
        DataError: there is no run.
        UserError: Slurm did not cancel some of them; the others are cancelled.
    """
    runs = find_runs(Path(config.run.dir))
    if not runs:
        raise DataError(f"{config.run.dir}: no run there; give a run, or the directory of an experiment")
    jobs = [job for run in runs for job in living(run)]
    for job in jobs:
        if "runner" in job:
            local_stop(job, job["state"])
    failed = cancel([job["job"] for job in jobs if "runner" not in job])
    stopped = [job for job in jobs if job["job"] not in failed]
    for job in stopped:
        print(f"cancelled job {job['job']} ({job['name']}), which was {job['state']}", flush=True)
    if failed:
        numbers, why = " ".join(map(str, failed)), "; ".join(dict.fromkeys(failed.values()))
        raise UserError(f"not cancelled ({why}): as their owner, and once Slurm answers, run `scancel {numbers}`")
    if not jobs:
        print(f"{config.run.dir}: none of its jobs is in the queue", flush=True)
    return {"stopped": [job["job"] for job in stopped]}
