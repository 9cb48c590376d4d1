"""Runs jobs on this machine, in dependency order and a few at a time, with the same records as on a cluster.

A job is a line of HOME/launch/jobs.jsonl; its start and its end are lines of HOME/launch/events.jsonl.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.common.children import die_with_parent_only, pausing
from slurm.jobs.graph import BEGUN
from slurm.jobs.job import Job
from slurm.jobs.records import EVENTS, append
from slurm.script import environment_lines, setup
from slurm.supervise import End, add_missing, history, judge, last_step, record_end
from training.config.cluster import refuse_unused
from training.config.commands import COMMANDS
from training.processes.endings import unless_ignored
from training.processes.exit_codes import EXIT_PREEMPTED
from training.run.directory import json_lines

POLL_S = 0.2
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask for an end of all jobs."""
SCRIPT = """\
#!/bin/bash
# {title}
cd {directory} || exit 1
finish() {{ exit "$1"; }}
{lines}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
exec "$python" {arguments}
"""


def render_local(job: Job) -> str:
    """Return the script of a job on this machine.

    Raises:
        ConfigError: a setting that only a scheduler could use.
    """
    cluster = job.config.cluster
    refuse_unused(cluster)
    return SCRIPT.format(
        title=job.title,
        directory=shlex.quote(str(Path.cwd())),
        lines="\n".join([*environment_lines(job), *setup(cluster)]),
        code=shlex.quote(str(job.code)),
        arguments=shlex.join(job.arguments),
    )


# ---------------------------------------------------------------------------------------------------- processes


def process_identity(pid: int) -> list[int] | None:
    """Return [pid, start time in clock ticks], which identifies a process even if its pid is reused; None if dead."""
    with suppress(OSError):
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            return [pid, int(numbers[18])]
    return None


def is_alive(process: Sequence[int], host: str) -> bool:
    """Return whether this very process is alive on this machine; `host` is where it was started."""
    return host == socket.gethostname() and process_identity(process[0]) == list(process)


def local_state(record: dict[str, Any], events: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """Return (state, reason) of a job as a queue would report it; None if it has ended or its runner is gone.

    Args:
        record: its line of jobs.jsonl.
        events: the events of its home, oldest first.
    """
    if not is_alive(record["runner"], record["host"]):
        return None
    own = [event for event in events if event["job"] == record["job"]]
    if not own:
        return "PENDING", f"after {', '.join(record['after'])}" if record["after"] else "this machine is busy"
    return ("RUNNING", record["host"]) if own[-1]["what"] == "began" else None


def local_stop(record: dict[str, Any], state: str) -> None:
    """Send TERM to the job's process or, if it is still waiting, to the launch that would start it."""
    events = json_lines(Path(record["home"]) / "launch" / EVENTS)
    process = record["runner"]
    if state == "RUNNING":
        process = next(e["process"] for e in reversed(events) if e["job"] == record["job"] and e["what"] == "began")
    if process and is_alive(process, record["host"]):  # it was seen to have ended when it began
        os.kill(process[0], signal.SIGTERM)


# ------------------------------------------------------------------------------------------------------- running


class LocalRunner:
    """Runs the jobs of one launch.

    Args:
        records: the jobs as in jobs.jsonl, each after those that it waits for (unless they succeeded earlier).
        at_once: most jobs to run at the same time.
    """

    def __init__(self, records: Sequence[dict[str, Any]], at_once: int) -> None:
        self.records, self.at_once = list(records), at_once
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.begun: set[str] = set()
        self.codes: dict[str, int] = {}
        """Exit code of each job that has ended; a cancelled job has that of the job it waited for."""
        self.asked: list[int] = []

    def run(self) -> dict[str, int]:
        """Run until all jobs have ended; return their exit codes by name.

        Ctrl-C, TERM and a closed terminal stop all jobs; a second Ctrl-C kills them.
        """
        previous = {number: signal.signal(number, self._stop) for number in unless_ignored(ASKING)}
        try:
            with pausing(lambda: [child.pid for child in self.running.values()]):
                while len(self.codes) < len(self.records):
                    self._look()
                    for record in self.records:
                        self._consider(record)
                    time.sleep(POLL_S)
        finally:
            for child in self.running.values():
                child.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.asked:
            place = os.path.relpath(os.path.commonpath([record["home"] for record in self.records]))
            _tell(f"stopped; to continue: cascade resume run={shlex.quote(place)}")
        return self.codes

    def _stop(self, number: int, _frame: object) -> None:
        self.asked.append(number)
        for child in self.running.values():
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if self.asked.count(signal.SIGINT) > 1 else signal.SIGTERM)

    def _consider(self, record: dict[str, Any]) -> None:
        """Start a job that is ready, or cancel one that can never be."""
        name, known = record["name"], {other["name"] for other in self.records}
        if name in self.codes or name in self.running:
            return
        before = [other for other in record["after"] if other in known]
        failed = [
            other for other in before if self.codes.get(other) and not (record["when"] == BEGUN and other in self.begun)
        ]
        if failed or self.asked:
            self.codes[name] = self.codes[failed[0]] if failed else EXIT_PREEMPTED
            self._event(record, "cancelled")
            why = "asked to stop" if self.asked else f"{failed[0]} has failed"
            _tell(f"{name}: cancelled, {why}")
        elif len(self.running) < self.at_once and all(
            other in self.begun if record["when"] == BEGUN else self.codes.get(other) == 0 for other in before
        ):
            self._start(record)

    def _start(self, record: dict[str, Any]) -> None:
        with open(record["log"], "ab") as log:
            child = subprocess.Popen(
                ["bash", record["script"]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent_only,
            )
        self.running[record["name"]] = child
        self.begun.add(record["name"])
        self._event(record, "began", process=process_identity(child.pid))
        _tell(f"{record['name']}: began, {record['log']}")

    def _look(self) -> None:
        for record in self.records:
            child = self.running.get(record["name"])
            if child is None or child.poll() is None:
                continue
            del self.running[record["name"]]
            code = child.returncode if child.returncode >= 0 else 128 - child.returncode
            if code and not self.asked and self._again(record, code):
                self._start(record)
                continue
            self.codes[record["name"]] = code
            self._event(record, "ended", code=code)
            how = "succeeded" if code == 0 else f"ended with code {code}, see {record['log']}"
            _tell(f"{record['name']}: {how}")

    def _again(self, record: dict[str, Any], code: int) -> bool:
        """Return whether a failed job should be restarted, judged as within an allocation."""
        home, trains = Path(record["home"]), COMMANDS[record["verb"]].makes_run
        end = End(code, record["job"], step=last_step(home) if trains else -1, why=f"ended with code {code}")
        add_missing(end, home)
        before = [one for one in history(home) if trains or one.job == record["job"]]
        verdict = judge(end, before, requeue=False, most=record["most"], limit_s=float("inf"), spare=False)
        record_end(home, end, verdict)
        if verdict.sentence:
            _tell(f"{record['name']}: {verdict.sentence}", sys.stderr)
        return verdict.action == "restart"

    def _event(self, record: dict[str, Any], what: str, **more: Any) -> None:
        event = {"name": record["name"], "what": what, "job": record["job"], "time": time.time(), **more}
        append(Path(record["home"]) / "launch" / EVENTS, event)


def _tell(sentence: str, stream: TextIO | None = None) -> None:
    """Print what happens to the jobs; a closed terminal or a full disk must not end them."""
    with suppress(OSError):
        print(f"==> {sentence}", file=stream, flush=True)


def local_record() -> dict[str, Any]:
    """Return the fields that only the record of a job on this machine has: its id, and who runs it."""
    return {"job": uuid.uuid4().hex[:8], "runner": process_identity(os.getpid()), "host": socket.gethostname()}
