"""Why Slurm ended a job, or requeued it: what nobody else records, because Slurm ends the script of the job too.

Three sources are asked in turn. The node of the script writes a line into the job's log ("CANCELLED AT ... DUE TO NODE
FAILURE"), unless it is the node that failed; the accounting database has the state of every start, where a site runs
one; and the states of the nodes show which of them have failed since.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slurm.client import ask

NODE_FAIL, PREEMPTED, REQUEUED, TIMEOUT = "NODE_FAIL", "PREEMPTED", "REQUEUED", "TIMEOUT"
CANCELLED, NEVER, NO_LAUNCH = "CANCELLED", "DependencyNeverSatisfied", "JobLaunchFailure"
"""States of a job, as in sacct(1), and reasons of scontrol for CANCELLED and FAILED."""
WRITTEN = {
    "NODE FAILURE": NODE_FAIL,
    "PREEMPTION": PREEMPTED,
    "JOB REQUEUE": REQUEUED,
    "TIME LIMIT": TIMEOUT,
}
"""slurmstepd's reason in the log -> the state; without a reason, the job was cancelled."""
WHY = {
    NODE_FAIL: "a node failed",
    PREEMPTED: "preempted by a job of higher priority",
    REQUEUED: "requeued by `scontrol requeue`, or by the site",
    TIMEOUT: "ended by Slurm at its time limit, before it had saved; raise cluster.signal_s",
    CANCELLED: "cancelled by `scancel`",
    NEVER: "a job that it waits for has failed",
    NO_LAUNCH: "Slurm could not start it: the directory of its log is not there, or cannot be written, on its node",
    "OUT_OF_MEMORY": "killed by Slurm because it ran out of memory; raise cluster.mem",
    "DEADLINE": "ended by Slurm at its deadline",
    "BOOT_FAIL": "its nodes did not boot",
    "FAILED": "failed",
}
LINE = re.compile(
    r"^slurmstepd\S*: (?:error: )?\*\*\* JOB \S+ ON \S+ CANCELLED AT (?P<at>\S+)(?: DUE TO (?P<why>[A-Z ]+[A-Z]))?",
    re.MULTILINE,
)
BEGAN = "==> job "
"""How the script's first line in the log begins."""
TAIL = 1 << 16
"""Bytes at the end of a log that are searched."""
SKEW_S = 2.0
"""Seconds by which the clocks of two nodes may differ."""
UNFINISHED = ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING", "SUSPENDED", "RESIZING", "COMPLETED")
BAD_NODE = re.compile(r"DOWN|NOT_RESPONDING|FAIL|ERROR|POWERED_DOWN|REBOOT")


@dataclass(frozen=True)
class Cause:
    """Why a job, or a start of it, ended.

    Attributes:
        state: Slurm's state, such as NODE_FAIL.
        node: the node that failed, if that is known.
        time: when, seconds since 1970; 0 if unknown.
    """

    state: str
    node: str | None = None
    time: float = 0.0

    @property
    def why(self) -> str:
        """The cause in words."""
        if self.node:
            return f"node {self.node} failed"
        return WHY.get(self.state, f"ended by Slurm ({self.state})")

    @property
    def is_failure(self) -> bool:
        """Whether the job did not end as somebody wanted."""
        return self.state not in (CANCELLED, NEVER, PREEMPTED, REQUEUED)


def why_requeued(job: str, nodes: str, began: float) -> Cause | None:
    """Return why Slurm has requeued a start of this job; None if no source knows.

    Args:
        job: number of the job; of a task of an array, ARRAY_TASK.
        nodes: the nodes of that start, as Slurm writes them (n[1-4]); empty: unknown.
        began: when it began, seconds since 1970.
    """
    found = told_by_log(_log_of(job), began) or told_by_accounting(job, began)
    if found is not None and found.state != NODE_FAIL:
        return found
    failed = failed_nodes(nodes, began)
    if found is None and not failed:
        return None
    return Cause(NODE_FAIL, failed[0] if len(failed) == 1 else None, found.time if found else 0.0)


def why_ended(job: str, log: Path) -> Cause | None:
    """Return why Slurm has ended a job whose script recorded no end; None if no source knows.

    Args:
        job: number of the job.
        log: its log.
    """
    if (found := told_by_log(log)) is not None:
        return found
    shown = ask("scontrol", "show", "job", job) or ""  # Slurm forgets it after minutes
    state = _field(shown, "JobState")
    if not state or state in UNFINISHED:
        return told_by_accounting(job, time.time())
    reason = _field(shown, "Reason")
    return Cause(reason if reason in (NEVER, NO_LAUNCH) else state, time=_seconds(_field(shown, "EndTime")))


def told_by_log(log: Path | None, began: float | None = None) -> Cause | None:
    """Return what the job's log says about its end.

    Args:
        log: the file.
        began: the line must be later than this; None: it must be later than the last start in the log.
    """
    if log is None:
        return None
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    found = list(LINE.finditer(text))
    if not found or (began is None and text.rfind(f"\n{BEGAN}") > found[-1].start()):
        return None
    at = _seconds(found[-1]["at"])
    if began is not None and at < began - SKEW_S:
        return None
    return Cause(WRITTEN.get(found[-1]["why"], CANCELLED), time=at)


def told_by_accounting(job: str, began: float) -> Cause | None:
    """Return what the accounting database says about the last start of a job that began, or was cancelled without one,
    no later than `began`; None where there is no database."""
    answer = ask("sacct", "-D", "-X", "-n", "-P", "-j", job, "-o", "Start,End,State,Reason")
    starts = []
    for line in (answer or "").splitlines():
        if line.count("|") != 3:  # what a wrapper of the site prints
            continue
        start, end, state, reason = line.split("|")
        at = _seconds(start) or _seconds(end)  # a job that never began has None or Unknown
        if 0 < at <= began + SKEW_S:
            waited = state == CANCELLED and reason == "Dependency"  # by a person: "CANCELLED by UID"
            starts.append((at, NEVER if waited else state.split()[0], _seconds(end)))
    if not starts:
        return None
    _, state, ended = max(starts, key=lambda one: one[0])
    return None if state in UNFINISHED else Cause(state, time=ended)


def failed_nodes(nodes: str, since: float) -> list[str]:
    """Return those of these nodes that Slurm holds for failed, or whose daemon has started since."""
    if not nodes:
        return []
    found = []
    for node in re.split(r"^(?=NodeName=)", ask("scontrol", "show", "node", nodes) or "", flags=re.MULTILINE):
        name, state = _field(node, "NodeName"), _field(node, "State")
        started = [_seconds(_field(node, key)) for key in ("BootTime", "SlurmdStartTime")]
        if name and (BAD_NODE.search(state) or max(started) > since):
            found.append(name)
    return found


def _log_of(job: str) -> Path | None:
    """Return where Slurm writes the errors of a job. Newer versions of scontrol show it with its patterns."""
    shown = ask("scontrol", "show", "job", job) or ""
    match = re.search(r"^\s*StdErr=(.+)$", shown, re.MULTILINE)
    if not match or Path(match[1]).exists():
        return Path(match[1]) if match else None
    number, _, task = job.partition("_")
    own = {"%": "%", "j": _field(shown, "JobId") or job, "A": number, "a": task, "x": _field(shown, "JobName")}
    return Path(re.sub(r"%([%jAax])", lambda found: own[found[1]], match[1]))


def _field(shown: str, name: str) -> str:
    """Return a field of what `scontrol show` prints; empty if it is not there."""
    match = re.search(rf"(?:^|\s){name}=(\S+)", shown)
    return match[1] if match else ""


def _seconds(moment: str) -> float:
    """Parse a moment in this machine's time zone (2026-01-31T12:00:00); 0 if it is not one (Unknown)."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0
