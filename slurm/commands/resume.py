"""`cascade resume run=DIR`: resubmits unfinished jobs, from the records of their launch."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from slurm.jobs.graph import SUCCEEDED
from slurm.jobs.records import SUBMITTED, append, find_runs, is_complete
from slurm.local import LocalRunner, local_record
from slurm.queue import dependency, job_states, submit
from training.config.commands import COMMANDS, ResumeCommand

ALIVE = ("pending", "running")
FOUND = ("state", "reason", "code", "ended")
"""What `job_states` adds to the record of a job."""


def main(config: ResumeCommand) -> dict[str, Any]:
    """Resubmit the jobs of a run, or of all runs of an experiment, that are neither finished nor in the queue.

    They use the same scripts, settings and code, and each runs after those that it depends on. Jobs that ran on this
    machine run here again.

    Returns:
        {"resumed": [{"name", "job", "after"}], "left": {name: state}}

    Raises:
        DataError: nothing was launched there.
        UserError: Slurm refused, or squeue does not answer.
        SystemExit: a job on this machine failed.
    """
    folder = Path(config.run.dir)
    found = [job for home in find_runs(folder) for job in job_states(home)]
    if not found:
        raise DataError(
            f"{folder}: nothing was launched from there, so there is nothing to resume; repeat the `cascade "
            f"train` command, or launch it"
        )
    unknown = [job for job in found if job["state"] == "unknown"]
    if unknown:
        raise UserError(
            f"{folder}: {unknown[0]['reason']}, so it is not known whether job {unknown[0]['job']} is alive; a second "
            f"copy would displace it; try again later"
        )
    newest = max(found, key=lambda job: job["time"])
    jobs = sorted((job for job in found if _goes_with(job, newest)), key=lambda job: job["time"])
    left = [job for job in jobs if job["state"] in ALIVE or _is_done(job)]
    again = [job for job in jobs if job not in left]
    for job in left:
        print(f"{_label(job, jobs)}: {job['state']}, skipped", flush=True)
    answer = {"left": {_label(job, jobs): job["state"] for job in left}}
    if not again:
        print(f"{folder}: nothing to resume", flush=True)
    if again and "runner" in newest:
        if code := _run_again(again, config.at_once):
            raise SystemExit(code)
        return {"resumed": [_answer(job) for job in again], **answer}
    return {"resumed": _submit_again(again, jobs), **answer}


def _goes_with(job: dict[str, Any], newest: dict[str, Any]) -> bool:
    """Return whether two jobs are of the same kind: both on this machine, or both Slurm's."""
    return ("runner" in job) == ("runner" in newest)


def _is_done(job: dict[str, Any]) -> bool:
    """Return whether a job is done: a training, if its last checkpoint exists; others, if they have succeeded."""
    if COMMANDS[job["verb"]].makes_run:
        return is_complete(Path(job["home"]))
    return bool(job["state"] == "complete")


def _mates(job: dict[str, Any], jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the jobs of the same launch, in which the names that a job waits for are to be found."""
    return [other for other in jobs if other.get("launch") == job.get("launch")]


def _label(job: dict[str, Any], jobs: list[dict[str, Any]]) -> str:
    """Return the name of a job, with its directory if several have this name."""
    several = [other["name"] for other in jobs].count(job["name"]) > 1
    return f"{job['name']} ({os.path.relpath(job['home'])})" if several else job["name"]


def _depth(job: dict[str, Any], jobs: list[dict[str, Any]]) -> int:
    """Return the length of the longest chain of jobs that this one waits for."""
    awaited = [other for other in _mates(job, jobs) if other["name"] in job.get("after", [])]
    return max((1 + _depth(other, jobs) for other in awaited), default=0)


def _submit_again(again: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Resubmit jobs to Slurm, each after those that it waits for; a job that is still in the queue keeps its number.

    Args:
        again: the jobs to resubmit.
        jobs: these and the others that they may wait for.
    """
    answers = []
    for job in sorted(again, key=lambda job: _depth(job, jobs)):
        mates, after = _mates(job, jobs), job.get("after", [])
        numbers = {other["name"]: other["job"] for other in mates if other["state"] in ALIVE}
        waits = {other["name"]: other.get("after", []) for other in mates}
        number = submit(Path(job["script"]), dependency(after, job.get("when", SUCCEEDED), waits, numbers))
        log = Path(job["log"])
        log = log.with_name(re.sub(rf"(?<!\d){job['job']}(?!\d)", str(number), log.name))
        home = Path(job["script"]).parent
        record = {key: value for key, value in job.items() if key not in FOUND}
        append(home / SUBMITTED, {**record, "job": number, "log": str(log), "time": time.time()})
        behind = ", ".join(str(numbers[name]) for name in after if name in numbers)
        print(f"submitted job {number}: {_label(job, jobs)}{f', after {behind}' if behind else ''}", flush=True)
        job.update(job=number, state="pending")
        answers.append(_answer(job))
    return answers


def _run_again(again: list[dict[str, Any]], at_once: int) -> int:
    """Run jobs again on this machine, launch by launch; return the exit code of the first that failed, or 0."""
    codes: list[int] = []
    for launch in dict.fromkeys(job.get("launch") for job in again):
        records = []
        for job in again:
            if job.get("launch") == launch:
                record = {key: value for key, value in job.items() if key not in FOUND}
                records.append({**record, **local_record(), "time": time.time()})
                append(Path(job["home"]) / "launch" / SUBMITTED, records[-1])
        runner = LocalRunner(records, at_once)
        codes += runner.run().values()
        if runner.asked:
            break
    return next((code for code in codes if code), 0)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    return {"name": job["name"], "job": job["job"], "after": job.get("after", [])}
