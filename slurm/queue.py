"""Slurm's commands, and what they answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from slurm.jobs.graph import BEGUN, SUCCEEDED
from slurm.jobs.records import EVENTS, submissions
from slurm.local import local_state
from slurm.options import EXCLUSIVE
from training.run.directory import json_lines

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_EXIT_ERROR", "SLURM_TIME_FORMAT")
"""Variables that are the user's way to a cluster. All other SLURM_* and SRUN_* describe an allocation."""
PATIENCE_S = 60
LAST = 10
"""Jobs of a run that are looked up in the queue."""
LIVING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED")
_silent_until = 0.0
"""Until then squeue, which has let a question wait for so long, is not asked again."""
UNKNOWN = "UNKNOWN"
"""State of a job when squeue does not answer: it may live."""
ACCEPTED = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*| on cluster \S+)?")
"""sbatch's word that it has taken a job; sites' wrappers print other lines beside it."""
DEFAULTS = {
    "TIMELIMIT": "time",
    "ARRAY_INX": "array",
    "MEM_PER_NODE": "mem",
    "NO_REQUEUE": "requeue",
}
"""SBATCH_* whose name is not that of their option."""
OURS = ("array", "output", "error", "input", "open-mode", "signal", "requeue", "wait", "job-name")
"""Options that the scripts rely on, whether they name them or not."""
HINTS = {
    "job array specification": "an array has at most MaxArraySize tasks (`scontrol show config | grep MaxArraySize`): "
    "lower embed_tasks, or sweep fewer values at a time",
    **dict.fromkeys(
        ("MaxSubmitJob", "job submit limit"),
        "the site limits how many jobs you may have in the queue: wait until some have ended, or submit fewer "
        "(evaluate_checkpoints=false, embed_tasks=1, a chain with verb=[...])",
    ),
    "account": "set cluster.account and cluster.partition to a pair that you may use (`sacctmgr show assoc`)",
    "partition": "set cluster.partition; `sinfo -s` lists those there are",
    "qos": "set 'cluster.sbatch={qos: NAME}' to one that you may use",
    "time limit": "set cluster.time within the partition's limit (`sinfo -o '%P %l'`)",
    "gres": "set cluster.gpus=false, or name the kind of GPU: 'cluster.sbatch={gres: \"gpu:a100:8\"}'",
    "Memory specification": "set cluster.mem, or 'cluster.sbatch={mem-per-cpu: 4G}'",
    "node configuration": "no node has what one is asked for: cluster.processes, cluster.cpus_per_task, cluster.mem "
    "and the partition (`sinfo -N -l`)",
    "node count": "the partition has fewer nodes, or allows fewer to a job: cluster.nodes, cluster.partition",
    "contact slurm controller": "Slurm does not answer; try again later",
    "timed out": "Slurm does not answer; look with `squeue --me` whether it has taken the job before you try again",
}
"""Part of a refusal -> what to do about it; the first that occurs."""


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without what an allocation one submits from has set: sbatch would hand SLURM_CPU_BIND, SLURM_MEM_PER_CPU and the
    like on to the new job, where srun obeys them. SBATCH_* stay: they are the user's defaults."""
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "CASCADE_"))
    }


def submission_environment(script: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`clean_environment` without those SBATCH_* that would overrule what the script says: to sbatch they count for
    more than its #SBATCH lines."""
    said = {line[10:].partition("=")[0] for line in script.splitlines() if line.startswith("#SBATCH --")}
    for group in EXCLUSIVE:
        said |= {*group} if said & {*group} else set()
    settled = {*said, *OURS}

    def option(name: str) -> str:
        bare = name.removeprefix("SBATCH_")
        return DEFAULTS.get(bare, bare.lower().replace("_", "-"))

    return {
        name: value
        for name, value in clean_environment(environ).items()
        if not name.startswith("SBATCH_") or option(name) not in settled
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
        [sbatch, "--parsable", *words, str(script)],
        capture_output=True,
        text=True,
        env=submission_environment(script.read_text()),
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        hint = next((hint for part, hint in HINTS.items() if part.lower() in reason.lower()), "")
        raise UserError(f"Slurm refused {script}: {reason}{f'; {hint}' if hint else ''}")
    found = [match[1] for line in done.stdout.splitlines() if (match := ACCEPTED.fullmatch(line.strip()))]
    if not found:
        raise UserError(
            f"{script}: sbatch said no job number, but {done.stdout.strip()[:200]!r}; look with `squeue --me` whether "
            f"it has taken the job"
        )
    return int(found[-1])


def withdraw(jobs: Sequence[int]) -> None:
    """Cancels jobs of a launch that could not be submitted whole."""
    if jobs:
        ask("scancel", *map(str, jobs))


def ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None where it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=clean_environment())
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _squeue(job: int) -> str | None:
    """The lines that squeue has on a job, none if it has forgotten it; None: it does not answer."""
    global _silent_until
    if time.monotonic() < _silent_until:
        return None
    words = ["squeue", "-h", "-r", "-j", str(job), "-o", "%T|%R"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, env=clean_environment())
    except subprocess.TimeoutExpired:
        _silent_until = time.monotonic() + PATIENCE_S
        return None
    except OSError:
        return None
    if done.returncode:
        return "" if "invalid job id" in done.stderr.lower() else None
    return done.stdout


def states(jobs: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Job number -> (state, reason or nodes) of those that the queue still holds; a job that it has forgotten is
    missing. UNKNOWN: squeue does not answer, and is not asked about the others."""
    found: dict[int, tuple[str, str]] = {}
    for job in jobs:  # one by one: squeue refuses the whole list for one number that it has forgotten
        answer = _squeue(job)
        if answer is None:
            return found | {one: (UNKNOWN, "squeue does not answer") for one in jobs if one not in found}
        for line in answer.splitlines():
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
    """The newest job of each name in a home: its record with `state` (pending, running, complete, failed, cancelled or,
    where squeue does not answer, unknown), `reason` (why it waits, or where it runs) and `code` (its exit code; None
    while there is none)."""
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
            state = {"PENDING": "pending", "REQUEUED": "pending", UNKNOWN: "unknown"}.get(
                held[record["job"]]["state"], "running"
            )
        elif ends and ends[-1]["what"] == "ended":
            state = "failed" if code else "complete"
        found.append({"home": str(home), **record, "state": state, "reason": reason, "code": code})
    return found
