"""Slurm's commands, and what they answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from slurm.jobs.records import submissions

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_EXIT_ERROR", "SLURM_TIME_FORMAT")
"""Variables that are the user's way to a cluster. All other SLURM_* and SRUN_* describe an allocation."""
PATIENCE_S = 60
LAST = 10
"""Jobs of a run that are looked up in the queue."""
LIVING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED")


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without what an allocation one submits from has set: sbatch would hand SLURM_CPU_BIND, SLURM_MEM_PER_CPU and the
    like on to the new job, where srun obeys them. SBATCH_* stay: they are the user's defaults."""
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "CASCADE_"))
    }


def submit(script: Path, after: Sequence[int] = ()) -> int:
    """Gives the script to Slurm; returns the job's number.

    Args:
        after: the job starts when these have succeeded, and is cancelled when one has failed.

    Raises:
        UserError: no sbatch on this machine, or Slurm refused, with its reason.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            f"sbatch is not on this machine's PATH: run this on a login node of the cluster, or with dry_run=true to "
            f"write the script only (it is in {script})"
        )
    words = (
        ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{':'.join(str(job) for job in after)}"] if after else []
    )
    done = subprocess.run(
        [sbatch, "--parsable", *words, str(script)], capture_output=True, text=True, env=clean_environment()
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"Slurm refused {script}: {reason}")
    return int(done.stdout.strip().partition(";")[0])


def ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None where it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=clean_environment())
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def states(jobs: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Job number -> (state, reason or nodes) of those that the queue still holds; a job that it has forgotten is
    missing."""
    found: dict[int, tuple[str, str]] = {}
    for job in jobs:  # one by one: squeue refuses the whole list for one number that it has forgotten
        answer = ask("squeue", "-h", "-r", "-j", str(job), "-o", "%T|%R")
        for line in (answer or "").splitlines():
            state, _, reason = line.partition("|")
            if state in LIVING:
                found[job] = (state, reason.strip("()"))
    return found


def living(run_dir: Path) -> list[dict[str, Any]]:
    """Those of the run's last jobs that the queue still holds, with their `state` and `reason`."""
    jobs = submissions(run_dir)[-LAST:]
    found = states([job["job"] for job in jobs])
    return [{**job, **dict(zip(("state", "reason"), found[job["job"]], strict=True))} for job in jobs
            if job["job"] in found]  # fmt: skip
