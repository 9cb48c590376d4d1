"""Decides what to do when the processes of a job have ended: restart in this allocation, requeue, or end.

The script calls it after each srun: `python -P -m slurm.supervise RUN_DIR --code 137 --notes DIR ...`. It prints the
decision for the script (`end CODE`, `restart SECONDS [NODES]` or `requeue [NODES]`, with the seconds to wait and the
nodes to exclude), and explains it in one sentence on stderr. Every end other than a success is a line in
RUN_DIR/restarts.jsonl, which `cascade status` reads. Imports neither torch nor Hydra, because an allocation waits for
it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.storage.atomic import add_line
from slurm.causes import why_requeued
from slurm.task import STOPPED
from training.config.cluster import slurm_seconds
from training.config.commands import COMMANDS
from training.processes.exit_codes import (
    EXIT_CRASH,
    EXIT_DEVICE_LOST,
    EXIT_HUNG,
    EXIT_PREEMPTED,
    EXIT_SLOW_NODE,
    FINAL_CODES,
)
from training.processes.failures import FAILED
from training.processes.flight import who_is_missing
from training.processes.interval import HISTORY

TERMINATED = 128 + signal.SIGTERM
UNEXPLAINED = EXIT_CRASH
"""A bug, or a library that failed: worth one retry, or more if the run has made progress in the meantime."""
OWN = "own"
"""Note of a script that has requeued its own job."""
EXIT_LOST = 137
"""Recorded for a start that a failed node ended, or of which nothing is known except that Slurm requeued the job."""
NODES = "nodes"
"""Note of the script: when this start began (seconds since 1970), and on which nodes."""
QUICK_S, PAUSE_S = 20.0, 15
"""A start that ends within QUICK_S seconds is repeated after PAUSE_S, the next one after twice as long, and so on: for
up to UnkillableStepTimeout (60 s), Slurm also ends new steps of a job while it cleans up its last start."""
BLAMED = 2
"""Number of failures after which a node is excluded."""
PREFLIGHT = "preflight.json"


@dataclass
class End:
    """How the processes of one start ended.

    Attributes:
        code: exit code of the first process that failed; 75 if they were asked to stop, whether or not they had saved.
        job: the job number.
        restart: Slurm's count of requeues.
        attempt: number of the start within the allocation, from 1; 0: recorded after Slurm had requeued the job.
        step: the step from which the newest start of the run began; -1 if unknown.
        rank, node: the rank that failed first, and its node.
        innocent: the node is not to blame: the memory that the job asked for was not enough.
        suspect: after a hang, the node whose rank the others waited for.
        elapsed_s: seconds since the start of the allocation.
        lasted_s: seconds that this start lasted; None: unknown.
        why: the cause, for people.
        action: what was done about it.
    """

    code: int
    job: str
    restart: int = 0
    attempt: int = 1
    step: int = -1
    rank: int | None = None
    node: str | None = None
    suspect: str | None = None
    innocent: bool = False
    elapsed_s: float = 0.0
    lasted_s: float | None = None
    why: str = ""
    action: str = ""
    time: float = field(default_factory=time.time)

    @property
    def is_failure(self) -> bool:
        """Whether it ended with an error, and not because it was complete or asked to stop."""
        return self.code not in (0, EXIT_PREEMPTED)


@dataclass
class Verdict:
    """What the script should do, why in one sentence, and which nodes to exclude."""

    action: str
    sentence: str = ""
    without: tuple[str, ...] = ()


def judge(
    end: End,
    before: Sequence[End],
    *,
    requeue: bool,
    most: int,
    limit_s: float,
    spare: bool,
    slow: Sequence[str] = (),
    least_s: float = 0.0,
) -> Verdict:
    """Decide what to do after an end.

    Args:
        end: how the processes ended.
        before: earlier ends of this run, oldest first.
        requeue: whether the job may be requeued.
        most: consecutive restarts allowed from the same step (cluster.max_restarts_without_progress).
        limit_s: the time limit, seconds.
        spare: whether the job can do with fewer nodes.
        slow: nodes that the preflight of this start found slow.
        least_s: the shortest time limit that leaves time to work, seconds.
    """
    if end.code == 0:
        return Verdict("end 0")
    if end.code in FINAL_CODES:
        return Verdict(f"end {end.code}")
    idle = _idle(end, before, limit_s)
    where = f"step {end.step}" if end.step >= 0 else "the beginning"
    if idle > most:
        return Verdict(
            f"end {end.code}",
            f"gave up: {idle} failures in a row without a checkpoint after {where}; the last: {end.why} "
            f"(cluster.max_restarts_without_progress={most})",
        )
    if end.code == EXIT_PREEMPTED:
        if limit_s < least_s:
            return Verdict(
                f"end {end.code}",
                f"stopped before the end, and not requeued: a time limit of {limit_s:.0f} s, the site's own or a "
                f"changed one, leaves no time to work; set cluster.time to at least {least_s:.0f} s, or a smaller "
                f"cluster.signal_s",
            )
        if requeue:
            return Verdict("requeue", "not finished: requeue")
        return Verdict(f"end {end.code}", "stopped before the end; resubmit it to continue (cluster.requeue=false)")
    if end.code == UNEXPLAINED and idle > 1:
        return Verdict(f"end {end.code}", f"gave up: {end.why}, twice without a checkpoint in between")
    bad = tuple(sorted({*_blamed(before), *_blamed([*before, end]), *slow}))
    if _cause(end) in bad or slow:
        said = f"{', '.join(slow)} is slow" if slow else f"{_cause(end)} has failed {BLAMED} times"
        if spare:
            return Verdict("restart", f"{end.why}; {said}: restart without it", bad)
        if requeue:
            return Verdict("requeue", f"{end.why}; {said}: requeue without it", bad)
        return Verdict(f"end {end.code}", f"{end.why}; {said}, and cluster.requeue=false")
    return Verdict("restart", f"{end.why}: restart in this allocation (from {where} or newer)", bad if spare else ())


def pause_before(end: End, before: Sequence[End], first_s: int = PAUSE_S) -> int:
    """Return how many seconds to wait before a restart in the allocation.

    Args:
        end: the last end.
        before: earlier ends of this run, oldest first.
        first_s: the pause after the first start that ended at once.
    """
    quick = 0
    for one in reversed([*before, end]):
        if (one.job, one.restart) != (end.job, end.restart) or one.lasted_s is None or one.lasted_s >= QUICK_S:
            break
        quick += 1
    return first_s << quick - 1 if quick else 0


def _idle(end: End, before: Sequence[End], limit_s: float) -> int:
    """Count consecutive ends, including this one, of starts from the same step.

    A preemption is no failure: a requested stop counts only if it came late, probably because of the time limit. A lost
    rank and the requeue by Slurm that follows are one failure, of the node.
    """
    count = 0
    ends = [*before, end]
    for earlier, one in reversed([*zip([None, *ends], ends, strict=False)]):
        if one.step != end.step:
            break
        if earlier is not None and _is_known(one, earlier):
            continue
        count += one.is_failure or one.elapsed_s > limit_s / 2
    return count


def _is_known(end: End, earlier: End) -> bool:
    """Return whether an end was recorded after a requeue by Slurm, of a start whose failure is recorded already."""
    same = (earlier.job, earlier.restart, earlier.step) == (end.job, end.restart, end.step)
    return end.attempt == 0 and same and earlier.is_failure


def _blamed(ends: Sequence[End]) -> list[str]:
    """Return the nodes that failed BLAMED times. The rank that reports a hang is not its cause, only the one that the
    others waited for; nor is SIGTERM anybody's failure, which Slurm sends to all ranks of a step."""
    nodes = [_cause(one) for one in ends if one.is_failure]
    return [node for node in nodes if node and nodes.count(node) >= BLAMED]


def _cause(end: End) -> str | None:
    """Return the node to blame for a failure."""
    if end.innocent:
        return None
    return end.suspect if end.code in (EXIT_HUNG, TERMINATED) else end.node


# ---------------------------------------------------------------------------------------------------- files


def read_end(notes: Path, code: int, asked: bool, job: str, **others: Any) -> End:
    """Derive the end from the ranks' notes and srun's exit code; the first rank to fail explains the others, and a GPU
    that failed explains all, since ranks that wait for it may end earlier.

    Args:
        notes: directory of the notes, see `slurm.task`.
        code: exit code of srun.
        asked: whether the job was asked to stop.
        job: the job number.
        others: other attributes of `End`.
    """
    found = []
    for path in notes.glob(FAILED):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    first = min(found, key=lambda note: (note["code"] != EXIT_DEVICE_LOST, note["time"]), default=None)
    if (notes / STOPPED).exists() and not found:
        return End(EXIT_PREEMPTED, job, why="asked to stop, saved", **others)
    if asked and (code or first):
        return End(EXIT_PREEMPTED, job, why="asked to stop, ended before saving", **others)
    if first is None:
        return End(code, job, why=f"srun ended with code {code}" if code else "", **others)
    why = first.get("why") or f"rank {first['rank']} on {first['node']} {_how(first['code'])}"
    innocent = bool(first.get("innocent"))
    return End(first["code"], job, rank=first["rank"], node=first["node"], innocent=innocent, why=why, **others)


def add_missing(end: End, run_dir: Path) -> None:
    """Add to a hang who did not join which collective, by the records that the ranks have left in RUN_DIR/logs."""
    missing = who_is_missing(run_dir / "logs") if end.code == EXIT_HUNG else None
    if missing is not None:
        end.suspect, end.why = missing.node, f"{end.why}; {missing.sentence}"


def _how(code: int) -> str:
    if code == EXIT_HUNG:
        return f"lost another rank, or hung (code {code})"
    return f"was killed by signal {code - 128}" if code > 128 else f"ended with code {code}"


def last_step(run_dir: Path) -> int:
    """Return the step from which the newest start of the run began (code.json); -1 if there was none."""
    try:
        return int(json.loads((run_dir / "code.json").read_text())["starts"][-1]["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return -1


def slow_nodes(run_dir: Path) -> tuple[str, ...]:
    """Return the nodes that the newest preflight found slow."""
    try:
        return tuple(json.loads((run_dir / PREFLIGHT).read_text())["slow"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def history(run_dir: Path) -> list[End]:
    """Return the ends of a run so far, oldest first."""
    ends = []
    try:
        lines = (run_dir / HISTORY).read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            ends.append(End(**json.loads(line)))
        except (ValueError, TypeError):  # an incomplete line
            continue
    return ends


def record_end(run_dir: Path, end: End, verdict: Verdict) -> None:
    """Add an end other than a success to the history, with what was done about it."""
    if not end.code:
        return
    end.action = " ".join([verdict.action, *verdict.without])
    end.why = verdict.sentence if verdict.action.startswith("end") and verdict.sentence else end.why
    run_dir.mkdir(parents=True, exist_ok=True)
    add_line(run_dir / HISTORY, json.dumps(asdict(end)))


def unrecorded(end: End, verdict: Verdict, why: str) -> Verdict:
    """Return what to do about an end that cannot be recorded: failures that nobody counts would be repeated forever."""
    if verdict.action.startswith("end") or end.code == EXIT_PREEMPTED:
        return replace(verdict, sentence=f"{verdict.sentence or end.why} (not recorded: {why})")
    return Verdict(f"end {end.code}", f"{end.why}; no restart, because it cannot be recorded: {why}")


def _seconds(limit: str) -> float:
    """Parse a time limit in seconds or in Slurm's format (1-00:00:00, UNLIMITED); infinite if it is neither."""
    try:
        return float(limit)
    except ValueError:
        pass
    try:
        return slurm_seconds("--limit", limit.strip())
    except ConfigError:
        return float("inf")


def record_requeue(run_dir: Path, notes: Path, end: End) -> None:
    """Add the end of a start to the history that its script could not record, because Slurm ended the script too.

    Args:
        notes: the notes of that start, without the number of the attempt.
        end: the end to record; `code` and `why` are filled in.
    """
    known = [one for one in history(run_dir) if one.job == end.job and one.restart == end.restart]
    by_script = notes.with_name(f"{notes.name}-{OWN}").exists()
    if not by_script and not any(one.action.startswith("requeue") for one in known):
        saved = any(True for _ in notes.parent.glob(f"{notes.name}-*/{STOPPED}"))
        cause = why_requeued(end.job, *_begun(notes))
        end.code = EXIT_LOST if (cause.is_failure if cause else not saved) else EXIT_PREEMPTED
        end.node = cause.node if cause else None
        end.why = f"{cause.why if cause else 'requeued by Slurm'}; {'saved' if saved else 'not saved'}"
        record_end(run_dir, end, Verdict("requeue"))
    for left in notes.parent.glob(f"{notes.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _begun(notes: Path) -> tuple[str, float]:
    """Return the nodes of the last start with these notes, and when it began; ("", 0) if there are none."""
    found = []
    for path in notes.parent.glob(f"{notes.name}-*/{NODES}"):
        began, _, nodes = path.read_text().strip().partition(" ")
        if began.isdecimal():
            found.append((float(began), nodes))
    began_s, nodes = max(found, default=(0.0, ""))
    return nodes, began_s


def main(words: Sequence[str] | None = None) -> int:
    """Judge and record the end; print the decision for the script. Returns 0."""
    parser = argparse.ArgumentParser(prog="slurm.supervise")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--verb", default="train")
    parser.add_argument("--job", default="0")
    for name in ("code", "asked", "restart", "attempt", "most", "elapsed", "lasted"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--limit", type=_seconds, default=float("inf"))
    parser.add_argument("--least", type=float, default=0.0)
    parser.add_argument("--pause", type=int, default=PAUSE_S)
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--spare", action="store_true")
    parser.add_argument("--requeued", action="store_true", help="record that Slurm has requeued the job by itself")
    given = parser.parse_args(words)
    trains = COMMANDS[given.verb].makes_run
    step = last_step(given.run_dir) if trains else -1
    numbers = {"restart": given.restart, "attempt": given.attempt, "step": step, "elapsed_s": float(given.elapsed)}
    if given.requeued:
        record_requeue(given.run_dir, given.notes, End(0, given.job, **numbers))
        return 0
    numbers["lasted_s"] = float(given.lasted)
    end = read_end(given.notes, given.code, bool(given.asked), given.job, **numbers)
    add_missing(end, given.run_dir)
    before = [one for one in history(given.run_dir) if trains or one.job == given.job]
    slow = slow_nodes(given.run_dir) if end.code == EXIT_SLOW_NODE else ()
    rules = {"requeue": given.requeue, "most": given.most, "limit_s": given.limit, "spare": given.spare}
    rules["least_s"] = given.least
    verdict = judge(end, before, **rules, slow=slow)
    try:
        record_end(given.run_dir, end, verdict)
    except OSError as error:
        verdict = unrecorded(end, verdict, f"{given.run_dir / HISTORY}: {error.strerror}")
    if verdict.sentence:
        print(f"==> {verdict.sentence}", file=sys.stderr, flush=True)
    pause = [str(pause_before(end, before, given.pause))] if verdict.action == "restart" else []
    print(" ".join([verdict.action, *pause, *verdict.without]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
