"""What happens after the processes of a job have ended: again here, again in the queue, or not at all.

The script calls it after each srun: `python -P -m slurm.supervise SETTINGS --code 137 --notes DIR ...`. It prints one
word for the script (`end CODE`, `restart [NODES]` or `requeue [NODES]`, with nodes to do without), and says why in one
sentence on stderr. Every end but a success is a line of RUN_DIR/restarts.jsonl, which `cascade status` reads.
Imports neither torch nor Hydra: an allocation waits for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slurm.task import FAILED, STOPPED
from training.config.commands import COMMANDS
from training.processes.exit_codes import (
    EXIT_CRASH,
    EXIT_HUNG,
    EXIT_PREEMPTED,
    EXIT_SLOW_NODE,
    FINAL_CODES,
)
from training.processes.interval import HISTORY

UNEXPLAINED = EXIT_CRASH
"""A bug, or a library that failed: worth one more try, unless the run has got on meanwhile."""
BLAMED = 2
"""A node that failed so often is left out."""
PREFLIGHT = "preflight.json"


@dataclass
class End:
    """How the processes of one start ended.

    Attributes:
        code: exit code of the first that failed; 75 when they were asked to stop and have saved, or were on the way.
        step: newest step that a start of the run began from; -1 where that is not known.
        rank, node: who failed first.
        restart: Slurm's count of requeues; attempt: starts within the allocation.
        elapsed_s: since the allocation began.
    """

    code: int
    job: str
    restart: int = 0
    attempt: int = 1
    step: int = -1
    rank: int | None = None
    node: str | None = None
    elapsed_s: float = 0.0
    why: str = ""
    action: str = ""
    time: float = field(default_factory=time.time)

    @property
    def is_failure(self) -> bool:
        """Whether it ended with an error, rather than complete or stopped in order to be requeued."""
        return self.code not in (0, EXIT_PREEMPTED)


@dataclass
class Verdict:
    """What the script is to do, and the sentence for people."""

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
) -> Verdict:
    """The decision.

    Args:
        slow: nodes that the preflight told this start to do without.
        before: earlier ends of this run, oldest first.
        requeue: whether the job may be submitted again.
        most: restarts in a row that may begin from the same step (cluster.max_restarts_without_progress).
        limit_s: the time limit, seconds.
        spare: whether fewer nodes than there are would do.
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
        if requeue:
            return Verdict("requeue", "not finished: requeue")
        return Verdict(f"end {end.code}", "stopped before the end; resubmit it to continue (cluster.requeue=false)")
    if end.code == UNEXPLAINED and idle > 1:
        return Verdict(f"end {end.code}", f"gave up: {end.why}, twice without a checkpoint in between")
    bad = tuple(sorted({*_blamed(before), *_blamed([*before, end]), *slow}))
    if end.node in bad or slow:
        said = f"{', '.join(slow)} is slow" if slow else f"{end.node} has failed {BLAMED} times"
        if spare:
            return Verdict("restart", f"{end.why}; {said}: restart without it", bad)
        if requeue:
            return Verdict("requeue", f"{end.why}; {said}: requeue without it", bad)
        return Verdict(f"end {end.code}", f"{end.why}; {said}, and cluster.requeue=false")
    return Verdict("restart", f"{end.why}: restart in this allocation (from {where} or newer)", bad if spare else ())


def _idle(end: End, before: Sequence[End], limit_s: float) -> int:
    """Ends in a row, this one included, after starts from the same step. A preemption is nobody's failure: a stop on
    request counts only when it came late, from the time limit."""
    count = 0
    for one in [*before, end][::-1]:
        if one.step != end.step:
            break
        count += one.is_failure or one.elapsed_s > limit_s / 2
    return count


def _blamed(ends: Sequence[End]) -> list[str]:
    """Nodes that failed BLAMED times. Of a hang, the rank that speaks is not the one that stood still."""
    nodes = [one.node for one in ends if one.node and one.is_failure and one.code != EXIT_HUNG]
    return [node for node in nodes if nodes.count(node) >= BLAMED]


# ---------------------------------------------------------------------------------------------------- files


def read_end(notes: Path, code: int, asked: bool, job: str, **others: Any) -> End:
    """What the ranks' notes and srun's exit code say together: the first rank that failed explains the others."""
    found = []
    for path in notes.glob(FAILED):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    first = min(found, key=lambda note: note["time"], default=None)
    if (notes / STOPPED).exists() and not found:
        return End(EXIT_PREEMPTED, job, why="asked to stop, saved", **others)
    if asked and (code or first):
        return End(EXIT_PREEMPTED, job, why="asked to stop, ended before saving", **others)
    if first is None:
        return End(code, job, why=f"srun ended with code {code}" if code else "", **others)
    why = f"rank {first['rank']} on {first['node']} {_how(first['code'])}"
    return End(first["code"], job, rank=first["rank"], node=first["node"], why=why, **others)


def _how(code: int) -> str:
    if code == EXIT_HUNG:
        return f"lost another rank, or hung (code {code})"
    return f"was killed by signal {code - 128}" if code > 128 else f"ended with code {code}"


def last_step(run_dir: Path) -> int:
    """Step that the newest start of the run began from (code.json); -1 where there was none."""
    try:
        return int(json.loads((run_dir / "code.json").read_text())["starts"][-1]["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return -1


def slow_nodes(run_dir: Path) -> tuple[str, ...]:
    """The nodes that the newest preflight found slow."""
    try:
        return tuple(json.loads((run_dir / PREFLIGHT).read_text())["slow"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def history(run_dir: Path) -> list[End]:
    """The ends of a run so far, oldest first."""
    ends = []
    try:
        lines = (run_dir / HISTORY).read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            ends.append(End(**json.loads(line)))
        except (ValueError, TypeError):  # half a line
            continue
    return ends


def record_end(run_dir: Path, end: End, verdict: Verdict) -> None:
    """Adds an end that was no success to the history, with what was done about it."""
    if not end.code:
        return
    end.action = " ".join([verdict.action, *verdict.without])
    end.why = verdict.sentence if verdict.action.startswith("end") and verdict.sentence else end.why
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / HISTORY, "a") as file:
        file.write(json.dumps(asdict(end)) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Judges, records, prints the word for the script."""
    parser = argparse.ArgumentParser(prog="slurm.supervise")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--verb", default="train")
    parser.add_argument("--job", default="0")
    for name in ("code", "asked", "restart", "attempt", "most", "elapsed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--limit", type=float, default=float("inf"))
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--spare", action="store_true")
    given = parser.parse_args(words)
    trains = COMMANDS[given.verb].makes_run
    step = last_step(given.run_dir) if trains else -1
    numbers = {"restart": given.restart, "attempt": given.attempt, "step": step, "elapsed_s": float(given.elapsed)}
    end = read_end(given.notes, given.code, bool(given.asked), given.job, **numbers)
    before = [one for one in history(given.run_dir) if trains or one.job == given.job]
    slow = slow_nodes(given.run_dir) if end.code == EXIT_SLOW_NODE else ()
    rules = {"requeue": given.requeue, "most": given.most, "limit_s": given.limit, "spare": given.spare}
    verdict = judge(end, before, **rules, slow=slow)
    record_end(given.run_dir, end, verdict)
    if verdict.sentence:
        print(f"==> {verdict.sentence}", file=sys.stderr, flush=True)
    print(" ".join([verdict.action, *verdict.without]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
