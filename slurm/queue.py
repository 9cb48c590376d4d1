"""Slurm's commands, and what they answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from slurm.jobs.graph import BEGUN, SUCCEEDED
from slurm.jobs.records import EVENTS, json_lines, submissions
from slurm.local import local_state

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


def submit(script: Path, after: Sequence[int] = (), when: str = SUCCEEDED) -> int:
    """Gives the script to Slurm; returns the job's number.

    Args:
        after: the job starts when these have succeeded, and is cancelled when one has failed.
        when: SUCCEEDED, or BEGUN: it starts when these have begun.

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
        [
            "--kill-on-invalid-dep=yes",
            f"--dependency={'after' if when == BEGUN else 'afterok'}:{':'.join(str(job) for job in after)}",
        ]
        if after
        else []
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
    """Those of the run's last jobs that the queue (or this machine) still holds, with their `state` and `reason`."""
    jobs = submissions(run_dir)[-LAST:]
    found: dict[Any, tuple[str, str]] = dict(states([job["job"] for job in jobs if "runner" not in job]))
    events = json_lines(run_dir / "launch" / EVENTS)
    for job in jobs:
        state = local_state(job, events) if "runner" in job else None
        if state:
            found[job["job"]] = state
    return [
        {**job, **dict(zip(("state", "reason"), found[job["job"]], strict=True))} for job in jobs if job["job"] in found
    ]


def job_states(home: Path) -> list[dict[str, Any]]:
    """The newest job of each name in a home: its record with `state` (pending, running, complete, failed or cancelled),
    `reason` (why it waits, or where it runs) and `code` (its exit code; None while there is none)."""
    newest = {record["name"]: record for record in submissions(home)}
    held = {record["job"]: record for record in living(home)}
    events = json_lines(home / "launch" / EVENTS)
    found = []
    for record in newest.values():
        ends = [event for event in events if event["job"] == record["job"] and event["what"] != "began"]
        codes = [event.get("code") for event in ends]
        code = next((code for code in codes if code), codes[-1] if codes else None)
        state, reason = "cancelled", None
        if record["job"] in held:
            reason = held[record["job"]]["reason"]
            state = "pending" if held[record["job"]]["state"] in ("PENDING", "REQUEUED") else "running"
        elif ends and ends[-1]["what"] == "ended":
            state = "failed" if code else "complete"
        found.append({"home": str(home), **record, "state": state, "reason": reason, "code": code})
    return found
