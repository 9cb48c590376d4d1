"""Submits jobs to Slurm, and says what has become of them."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from slurm.array import tasks_of
from slurm.client import PATIENCE_S, Answer, call_slurm, clean_environment
from slurm.jobs.graph import BEGUN
from slurm.jobs.records import EVENTS, submissions
from slurm.local import local_state
from slurm.options import EXCLUSIVE
from training.run.directory import json_lines

LAST = 10
"""How many of a run's latest jobs to look up in the queue."""
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""States in squeue(1) of a job that does not run yet, or not again yet."""
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
"""States in squeue(1) of a job that has ended, and that squeue may still show for a while."""
_silent_until = 0.0
"""Time (monotonic) until which squeue is not asked again, because a query has timed out."""
UNKNOWN = "UNKNOWN"
"""State of a job if squeue does not answer: it may be alive."""
SUBMIT_S = 240
"""Seconds that sbatch may take: it tries for two minutes itself when Slurm cannot accept a job at the moment."""
ACCEPTED = re.compile(r"^\s*(\d+)(?:;\S*)?\s*$|Submitted batch job (\d+)", re.MULTILINE)
"""The line by which sbatch reports an accepted job; wrappers at some sites print other lines as well."""
COLOR = re.compile(r"\x1b\[[\d;]*m")
DEFAULTS = {
    "TIMELIMIT": "time",
    "ARRAY_INX": "array",
    "MEM_PER_NODE": "mem",
    "NO_REQUEUE": "requeue",
}
"""SBATCH_* variables not named after their option -> the option."""
OURS = ("array", "output", "error", "input", "open-mode", "signal", "requeue", "wait", "job-name")
"""Options that the scripts rely on even if they do not set them."""
HINTS = {
    **dict.fromkeys(("unrecognized option", "invalid option"), "check the names in cluster.sbatch (`sbatch --help`)"),
    "job array specification": "an array has at most MaxArraySize tasks (`scontrol show config | grep MaxArraySize`): "
    "lower embed_tasks, or sweep fewer values at a time",
    **dict.fromkeys(
        ("MaxSubmitJob", "job submit limit"),
        "the site limits how many jobs you may have in the queue, and how large and long each may be: wait until some "
        "have ended, submit fewer (evaluate_checkpoints=false, embed_tasks=1, a chain with verb=[...]), or lower "
        "cluster.nodes or cluster.time",
    ),
    "account": "set cluster.account and cluster.partition to a pair that you may use (`sacctmgr show assoc`)",
    "partition": "set cluster.partition; `sinfo -s` lists the partitions",
    "qos": "set 'cluster.sbatch={qos: NAME}' to one that you may use",
    "reservation": "set 'cluster.sbatch={reservation: NAME}' to one that you may use (`scontrol show reservation`)",
    "node name": "check nodelist and exclude in cluster.sbatch (`sinfo -N`)",
    "license": "check licenses in cluster.sbatch (`scontrol show license`)",
    "time limit": "set cluster.time within the partition's limit (`sinfo -o '%P %l'`)",
    "gres": "set cluster.gpus=false, or name the kind of GPU: 'cluster.sbatch={gres: \"gpu:a100:8\"}'",
    "Memory specification": "set cluster.mem, or 'cluster.sbatch={mem-per-cpu: 4G}'",
    **dict.fromkeys(
        ("node configuration", "more processors requested", "CPU count per node"),
        "no node has the resources requested per node: check cluster.processes, cluster.cpus_per_task, cluster.mem and "
        "the partition (`sinfo -N -l`)",
    ),
    "feature specification": "set 'cluster.sbatch={constraint: NAME}' to features that nodes have (`sinfo -o '%N %f'`)",
    "node count": "the partition has fewer nodes, or allows fewer per job: check cluster.nodes and cluster.partition",
    "contact slurm controller": "Slurm does not answer; try again later",
    "timed out": "Slurm does not answer; check with `squeue --me` whether it accepted the job before you try again",
}
"""Part of a refusal -> what to do about it; the first match is used."""
NEVER_STARTS = {
    "PartitionTimeLimit": HINTS["time limit"],
    "PartitionNodeLimit": "the partition allows fewer nodes per job: lower cluster.nodes, or set cluster.partition",
    "PartitionConfig": "the partition does not allow this job: check cluster.partition, cluster.nodes and cluster.time",
    **dict.fromkeys(("AccountNotAllowed", "InvalidAccount"), HINTS["account"]),
    **dict.fromkeys(("QOSNotAllowed", "InvalidQOS"), HINTS["qos"]),
    **dict.fromkeys(
        ("PerJobLimit", "PerJob"), "one job may not request as much: lower cluster.nodes, cluster.mem or cluster.time"
    ),
    "BadConstraints": "no node fulfils what the job requests: check cluster.sbatch",
    "requeued held": "look for the reason on its node, then `scontrol release JOB`, or `cascade stop` and `resume`",
    "JobHeldUser": "release it with `scontrol release JOB`",
    "JobHeldAdmin": "an administrator holds it, or it was requeued too often: ask them",
    "DependencyNeverSatisfied": "a job that it waits for has failed: `cascade stop`, then `cascade resume`",
}
"""End of a reason in squeue(1) for which a job waits until somebody acts -> what to do; the first match is used."""


def submission_environment(script: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `clean_environment` without those SBATCH_* that would override the script.

    For sbatch they take precedence over #SBATCH lines.
    """
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


def dependency(after: Sequence[str], when: str, waits: Mapping[str, Sequence[str]], numbers: Mapping[str, Any]) -> str:
    """Return what a job waits for, as the value of sbatch's --dependency; empty if it may start at once.

    With BEGUN it also needs the success of the jobs that those of `after` wait for, because for Slurm a job that was
    cancelled before it began has begun.

    Args:
        after: names of the jobs that it waits for.
        when: SUCCEEDED: it starts when these jobs have succeeded; BEGUN: when they have begun.
        waits: name -> names of the jobs that it waits for, of all jobs of the graph.
        numbers: name -> number, of the jobs that have not succeeded yet.
    """
    further = [name for other in after for name in waits.get(other, ())] if when == BEGUN else []
    kinds = [("after" if when == BEGUN else "afterok", after), ("afterok", further)]
    found = [(kind, [str(numbers[name]) for name in dict.fromkeys(names) if name in numbers]) for kind, names in kinds]
    return ",".join(f"{kind}:{':'.join(jobs)}" for kind, jobs in found if jobs)


def submit(script: Path, waits_for: str = "") -> int:
    """Submit a script to Slurm; return the job number.

    Args:
        script: the sbatch script.
        waits_for: a `dependency`; if it can no longer be fulfilled, the job is cancelled.

    Raises:
        UserError: there is no sbatch on this machine, or Slurm refused; the message gives its reason.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            f"sbatch is not on this machine's PATH: run this on a login node of the cluster, or with dry_run=true to "
            f"write the script only (it is in {script})"
        )
    words = ["--kill-on-invalid-dep=yes", f"--dependency={waits_for}"] if waits_for else []
    env = submission_environment(script.read_text())
    answer = call_slurm(sbatch, "--parsable", *words, str(script), env=env, patience_s=SUBMIT_S)
    if answer.late:
        raise UserError(
            f"{script}: {answer.problem}; check with `squeue --me` whether Slurm accepted the job before you try again"
        )
    if answer.problem:
        reason = answer.problem
        hint = next((hint for part, hint in HINTS.items() if part.lower() in reason.lower()), "")
        raise UserError(f"Slurm refused {script}: {reason}{f'; {hint}' if hint else ''}")
    if answer.errors.strip():  # warnings, and what the site says about a job that it has changed
        print(answer.errors.strip(), file=sys.stderr, flush=True)
    found = [plain or worded for plain, worded in ACCEPTED.findall(COLOR.sub("", answer.output))]
    if not found:
        raise UserError(
            f"{script}: sbatch printed no job number, but {answer.output.strip()[:200]!r}; check with `squeue --me` "
            f"whether it accepted the job"
        )
    return int(found[-1])


def cancel(jobs: Sequence[int | str]) -> dict[int | str, str]:
    """Cancel jobs; return job number -> why Slurm did not, of those that it did not. Once Slurm does not answer, it is
    not asked again."""
    failed: dict[int | str, str] = {}
    answer = call_slurm("scancel", *map(str, jobs)) if jobs else Answer()
    for number, job in enumerate(jobs if answer.problem else ()):  # again, to learn which
        answer = answer if answer.late else call_slurm("scancel", str(job))
        if answer.late:
            return failed | dict.fromkeys(jobs[number:], answer.problem)
        if answer.problem:
            failed[job] = answer.problem
    return failed


def withdraw(jobs: Sequence[int]) -> str:
    """Cancel the jobs of a launch that could not be submitted completely; return a sentence about it, or ""."""
    if not jobs:
        return ""
    left = cancel(jobs)
    if not left:
        return f"; the {len(jobs)} jobs of this launch submitted before it were cancelled"
    numbers, why = " ".join(map(str, left)), next(iter(left.values()))
    return f"; not all jobs of this launch submitted before it could be cancelled ({why}): scancel {numbers}"


def _squeue(job: int) -> str | None:
    """Return squeue's lines about a job, empty if it does not know the job any more; None if it does not answer."""
    global _silent_until
    if time.monotonic() < _silent_until:
        return None
    answer = call_slurm("squeue", "-h", "-r", "-j", str(job), "-o", "%T|%R")
    if answer.late:
        _silent_until = time.monotonic() + PATIENCE_S
    if answer.problem:
        return "" if "invalid job id" in answer.problem.lower() else None
    return answer.output


def states(jobs: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Return job number -> (state, reason or nodes) of those jobs that are still in the queue.

    UNKNOWN means that squeue does not answer; it is then not asked about the other jobs.
    """
    found: dict[int, tuple[str, str]] = {}
    for job in jobs:  # one by one: squeue rejects a list with any number it does not know any more
        answer = _squeue(job)
        if answer is None:
            return found | {one: (UNKNOWN, "squeue does not answer") for one in jobs if one not in found}
        for line in answer.splitlines():
            state, bar, reason = line.partition("|")  # with several clusters, squeue also prints their names
            if bar and state and state not in ENDED:
                found[job] = (state, reason.strip("()"))
    return found


def living(run_dir: Path) -> list[dict[str, Any]]:
    """Return the run's latest jobs that are still in the queue (or on this machine), with `state` and `reason`."""
    jobs = submissions(run_dir)[-LAST:]
    found: dict[Any, tuple[str, str]] = dict(states([job["job"] for job in jobs if "runner" not in job]))
    events = json_lines(run_dir / "launch" / EVENTS)
    for job in jobs:
        state = local_state(job, events) if "runner" in job else None
        if state:
            found[job["job"]] = state
    held = [
        {**job, **dict(zip(("state", "reason"), found[job["job"]], strict=True))} for job in jobs if job["job"] in found
    ]
    for job in held:
        if job["reason"] == "Dependency" and job.get("after"):
            job["reason"] = f"after {', '.join(job['after'])}"
    return held


def _with_advice(reason: str, job: object) -> str:
    """Return why a job waits and, if it would wait forever, what to do."""
    advice = next((what for end, what in NEVER_STARTS.items() if reason.endswith(end)), "")
    return f"{reason}: {advice.replace('JOB', str(job))}" if advice else reason


def job_states(home: Path) -> list[dict[str, Any]]:
    """Return the newest job of each name in a home.

    Each is its record with `state` (pending, running, complete, failed, cancelled or, if squeue does not answer,
    unknown), `reason` (why it waits, or where it runs), `code` (its exit code; None if there is none yet) and `ended`
    (when, seconds since 1970; None if it has not, or nobody has recorded it).
    """
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
            reason = _with_advice(held[record["job"]]["reason"], record["job"])
            state = {**dict.fromkeys(WAITING, "pending"), UNKNOWN: "unknown"}.get(
                held[record["job"]]["state"], "running"
            )
        elif ends and ends[-1]["what"] == "ended":
            tasks = tasks_of(record.get("array", ""))
            missing = 0 if code else max(0, tasks - codes.count(0))
            state = "failed" if code or missing else "complete"
            reason = f"{missing} of {tasks} tasks did not end" if missing else None
        ended = ends[-1]["time"] if ends and record["job"] not in held else None
        found.append({"home": str(home), **record, "state": state, "reason": reason, "code": code, "ended": ended})
    return found
