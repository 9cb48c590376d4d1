"""`cascade resume run=DIR`: resubmits unfinished jobs, from the records of their launch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import DataError, UserError
from slurm.jobs.graph import SUCCEEDED
from slurm.jobs.records import SUBMITTED, append, find_runs, is_complete
from slurm.local import LocalRunner, local_record
from slurm.queue import job_states, submit
from training.config.commands import COMMANDS, ResumeCommand

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
    left = {job["name"]: job["state"] for job in jobs if job["state"] in ("pending", "running") or _is_done(job)}
    again = [job for job in jobs if job["name"] not in left]
    for name, state in left.items():
        print(f"{name}: {state}, skipped", flush=True)
    if not again:
        print(f"{folder}: nothing to resume", flush=True)
    if again and "runner" in newest:
        codes = _run_again(again, config.at_once)
        if any(codes.values()):
            raise SystemExit(next(code for code in codes.values() if code))
        return {"resumed": [_answer(job) for job in again], "left": left}
    return {"resumed": _submit_again(again, {job["name"]: job for job in jobs}), "left": left}


def _goes_with(job: dict[str, Any], newest: dict[str, Any]) -> bool:
    """Return whether two jobs are of the same kind: both on this machine, or both Slurm's."""
    return ("runner" in job) == ("runner" in newest)


def _is_done(job: dict[str, Any]) -> bool:
    """Return whether a job is done: a training, if its last checkpoint exists; others, if they have succeeded."""
    if COMMANDS[job["verb"]].makes_run:
        return is_complete(Path(job["home"]))
    return bool(job["state"] == "complete")


def _submit_again(again: list[dict[str, Any]], all_jobs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Resubmit jobs to Slurm; a job that is still in the queue keeps its number."""
    numbers = {name: job["job"] for name, job in all_jobs.items() if job["state"] in ("pending", "running")}
    answers = []
    for job in again:
        after = [numbers[name] for name in job.get("after", []) if name in numbers]
        further = [name for other in job.get("after", []) for name in all_jobs.get(other, {}).get("after", [])]
        before = [numbers[name] for name in further if name in numbers]
        number = submit(Path(job["script"]), after, job.get("when", SUCCEEDED), before)
        numbers[job["name"]] = number
        log = Path(job["log"])
        log = log.with_name(log.name.replace(str(job["job"]), str(number)))
        home = Path(job["script"]).parent
        record = {key: value for key, value in job.items() if key not in FOUND}
        append(home / SUBMITTED, {**record, "job": number, "log": str(log), "time": time.time()})
        behind = f", after {', '.join(str(one) for one in after)}" if after else ""
        print(f"submitted job {number}: {job['name']}{behind}", flush=True)
        answers.append(_answer({**job, "job": number}))
    return answers


def _run_again(again: list[dict[str, Any]], at_once: int) -> dict[str, int]:
    """Run jobs again on this machine; return their exit codes by name."""
    records = []
    for job in again:
        record = {key: value for key, value in job.items() if key not in FOUND}
        records.append({**record, **local_record(), "time": time.time()})
        append(Path(job["home"]) / "launch" / SUBMITTED, records[-1])
    return LocalRunner(records, at_once).run()


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    return {"name": job["name"], "job": job["job"], "after": job.get("after", [])}
