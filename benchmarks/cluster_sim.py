"""What failures cost a training on many GPUs, and how often it should save: a simulation, checked against a real run.

    python -m benchmarks.cluster_sim            # the table: GPUs, best interval, goodput, largest loss
    python -m benchmarks.cluster_sim 4          # the same with four times the published failure rate
    python -m benchmarks.cluster_sim check      # a real training here whose process is killed, and its simulation

Goodput is the share of the allocation's time spent on steps that count. A run works, saves every `interval_s` (the loop
waits `blocked_s`, and the checkpoint is complete `write_s` later), and fails after exponentially distributed times. A
failure loses the work since the newest complete checkpoint, then `detect_s`, and then `restart_s` in the same
allocation or, for the share `requeued` of failures, `requeue_s`. The failure rate is a published one; the costs in
`Assumed` are assumptions, see docs/cluster.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from training.processes.interval import NODE_S, best_interval

GPUS = (16, 64, 256, 1024, 4096)
PER_NODE = 8
DAYS = 60
SEEDS = 8


@dataclass(frozen=True)
class Assumed:
    """A run on a cluster; all times in seconds.

    Attributes:
        nodes: number of nodes.
        node_s: mean time between failures of one node.
        blocked_s: how long the loop waits for a checkpoint.
        write_s: from there until the checkpoint is complete.
        detect_s: from a failure until it is noticed.
        restart_s: from there to the first step, in the same allocation.
        requeued: share of failures that need another node from the queue.
        requeue_s: what these take instead of restart_s.
    """

    nodes: int
    node_s: float = NODE_S
    blocked_s: float = 2.0
    write_s: float = 30.0
    detect_s: float = 20.0
    restart_s: float = 60.0
    requeued: float = 0.5
    requeue_s: float = 180.0

    @property
    def between_s(self) -> float:
        """Mean time between failures of the whole job."""
        return self.node_s / self.nodes


def simulate(run: Assumed, interval_s: float, work_s: float, failures: list[float] | random.Random) -> dict[str, float]:
    """Simulate a run until `work_s` of work are done; return the seconds spent by category, and `total`.

    Args:
        run: the assumptions.
        interval_s: work between checkpoints.
        work_s: work to do.
        failures: times of the failures in seconds since the start, or a random generator for them.
    """
    spent = dict.fromkeys(("work", "saving", "lost", "restarting"), 0.0)
    clock, saved, since, whole_at = 0.0, 0.0, 0.0, 0.0
    pending: float | None = None
    times = iter(sorted(failures)) if isinstance(failures, list) else None

    def next_failure(now: float) -> float:
        if times is not None:
            return next((at for at in times if at > now), float("inf"))
        assert isinstance(failures, random.Random)
        return now + failures.expovariate(1 / run.between_s)

    fails = next_failure(0.0)
    while saved + since < work_s:
        piece = min(interval_s, work_s - saved - since) if since == 0 else interval_s
        ends = clock + piece + run.blocked_s
        if fails >= ends:
            since += piece
            spent["saving"] += run.blocked_s
            clock = ends
            if pending is not None and whole_at <= clock:
                saved, since, pending = saved + pending, since - pending, None
            pending, whole_at = since, clock + run.write_s
            if whole_at <= fails:  # complete before the next failure
                saved, since, pending = saved + pending, 0.0, None
            continue
        if pending is not None and whole_at <= fails:
            saved, since, pending = saved + pending, since - pending, None
        spent["lost"] += since + (fails - clock)
        since, pending = 0.0, None
        again = isinstance(failures, random.Random) and failures.random() < run.requeued
        pause = run.detect_s + (run.requeue_s if again else run.restart_s)
        spent["restarting"] += pause
        clock = fails + pause
        fails = next_failure(clock)
    spent["work"] = work_s
    spent["total"] = sum(spent.values())
    return spent


def goodput(run: Assumed, interval_s: float, work_s: float = DAYS * 86400.0) -> dict[str, float]:
    """Return the share of time by category, averaged over SEEDS simulations."""
    found = [simulate(run, interval_s, work_s, random.Random(seed)) for seed in range(SEEDS)]
    return {name: sum(one[name] / one["total"] for one in found) / len(found) for name in found[0] if name != "total"}


def rows(rate: float = 1.0) -> list[dict[str, Any]]:
    """Return a row per number of GPUs: the best interval by formula, and the goodput at it, at half and at twice of it.

    Args:
        rate: failure rate as a multiple of the published one.
    """
    found = []
    for gpus in GPUS:
        run = Assumed(nodes=gpus // PER_NODE, node_s=NODE_S / rate)
        best = best_interval(run.blocked_s, run.between_s)
        shares = {factor: goodput(run, best * factor) for factor in (0.5, 1.0, 2.0)}
        at_best = shares[1.0]
        limit = max(("saving", "lost", "restarting"), key=lambda name: at_best[name])
        found.append(
            {
                "gpus": gpus,
                "between_failures_h": run.between_s / 3600,
                "best_interval_min": best / 60,
                "goodput": at_best["work"],
                "half": shares[0.5]["work"],
                "twice": shares[2.0]["work"],
                "limit": limit,
                **{name: at_best[name] for name in ("saving", "lost", "restarting")},
            }
        )
    return found


# ------------------------------------------------------------------------------------------------------ check


STEPS, EVERY, KILLS = 400, 40, 4
"""The run of the check: steps, steps between checkpoints, and how often its process is killed."""
KILL_AT = (EVERY + EVERY // 2, 2 * EVERY - 5)
"""Steps at which runs are killed to measure what a restart takes."""
POLL_S = 0.01


@dataclass(frozen=True)
class Measured:
    """What checkpoints and restarts cost on this machine; all times in seconds.

    Attributes:
        step_s: a step while no checkpoint is being written (median).
        blocked_s: what the loop loses to one checkpoint, by waiting and by slower steps.
        write_s: from there until the checkpoint is complete.
        start_s: from a start to the first step.
        restart_s: the same for a start that resumes.
        detect_s: until the death of the process is noticed.
    """

    step_s: float
    blocked_s: float
    write_s: float
    start_s: float
    restart_s: float
    detect_s: float


@dataclass
class Trained:
    """Observations of one run, restarted until it was complete. All times are those of time.time()."""

    began: float = 0.0
    steps: list[tuple[int, float]] = field(default_factory=list)
    """Each step and when it ended; lost steps occur again."""
    whole: dict[int, float] = field(default_factory=dict)
    """Step -> when its checkpoint was complete."""
    kills: list[tuple[float, float, float]] = field(default_factory=list)
    """When the process was killed, when that was noticed, and when the first step of the next process ended."""


def check() -> dict[str, Any]:
    """Check the simulation: train the demo's base stage on this machine, with checkpoints written in the background.

    The costs are measured in runs before and after one whose process is killed at random times and restarted. The
    simulation then gets the same failures and these costs.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="cascade-sim-") as scratch:
        costs = [measure(Path(scratch), "before")]
        rng = random.Random(7)
        work = STEPS * costs[0].step_s
        kills = [work * (number + rng.uniform(0.1, 0.9)) / KILLS for number in range(KILLS)]
        real = _train(Path(scratch), "killed", STEPS, kills_s=kills)
        costs.append(measure(Path(scratch), "after"))
    mean = Measured(**{name: (value + asdict(costs[1])[name]) / 2 for name, value in asdict(costs[0]).items()})
    found = {name: value for name, value in asdict(mean).items() if name not in ("step_s", "start_s")}
    zero = real.steps[0][1] - mean.step_s  # the simulation starts with the first step
    failures = [at - zero for at, _, _ in real.kills]
    said = simulate(Assumed(nodes=1, requeued=0.0, **found), EVERY * mean.step_s, STEPS * mean.step_s, failures)
    took = real.steps[-1][1] - zero
    error = said["total"] / took - 1
    return {"real_s": took, "simulated_s": said["total"], "error": error, "kills": len(failures), "spent": said,
            "before": asdict(costs[0]), "after": asdict(costs[1]), "load": [load, os.getloadavg()[0]]}  # fmt: skip


def measure(folder: Path, name: str) -> Measured:
    """Measure the costs in an undisturbed run and in runs that are killed at KILL_AT."""
    calm = _train(folder, f"{name}-calm", STEPS)
    ends = dict(calm.steps)
    took = {step: ends[step] - ends[step - 1] for step in ends if step > 1}
    half = EVERY // 2
    beside = {step for step in took if step > EVERY and 1 <= step % EVERY <= half}
    quiet = median(took[step] for step in took if step not in beside and step > half)
    blocked = sum(took[step] - quiet for step in beside) / len({(step - 1) // EVERY for step in beside})
    again = [_train(folder, f"{name}-{step}", 2 * EVERY, kill_at=step).kills[0] for step in KILL_AT]
    return Measured(
        step_s=quiet,
        blocked_s=max(0.0, blocked),
        write_s=max(0.0, median(calm.whole[step] - ends[step] for step in calm.whole if step < STEPS) - blocked),
        start_s=ends[1] - calm.began - quiet,
        restart_s=fmean(first - noticed for _, noticed, first in again) - quiet,
        detect_s=fmean(noticed - killed for killed, noticed, _ in again),
    )


def _train(folder: Path, name: str, steps: int, kills_s: Sequence[float] = (), kill_at: int = 0) -> Trained:
    """Train `steps` steps, killing and restarting the process.

    Args:
        kills_s: seconds after the first step at which to kill it.
        kill_at: step at which to kill it once; 0: never.
    """
    run = folder / name
    if not (folder / "data").exists():
        drawn = ["prepare.draw.count=400", "prepare.draw.heldout=8", f"prepare.output={folder}/data"]
        subprocess.run([*_CASCADE, "prepare", "experiment=demo", *drawn], check=True, capture_output=True)
    command = [*_CASCADE, "train", "experiment=demo", f"data.shards={folder}/data/train", f"run.dir={run}",
               f"train.steps={steps}", f"checkpoint.every={EVERY}", "checkpoint.keep_last=1000", "train.log_every=1",
               "train.sample_every=0", "data.global_batch=16", "tracking=disabled", "validation.every=0"]  # fmt: skip
    found, due = Trained(began=time.time()), list(kills_s)
    while True:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, killed = _step(run), 0.0
        while child.poll() is None:
            now, step = time.time(), _step(run)
            if step and step != before:  # a resumed run drops the lines of lost steps, so `step` may go back
                before = step
                resumed = not found.kills or found.kills[-1][2]
                if not resumed and step % EVERY == 1:
                    found.kills[-1] = (*found.kills[-1][:2], now)
                    resumed = True
                if resumed:
                    found.steps.append((step, now))
                    late = bool(due) and now - found.steps[0][1] >= due[0]
                    if not killed and (late or (kill_at and step >= kill_at)):
                        child.kill()
                        killed, kill_at, due = time.time(), 0, due[1:]
            for path in run.glob("checkpoints/step-*/manifest.json"):
                found.whole.setdefault(int(path.parent.name.partition("-")[2]), path.stat().st_mtime)
            time.sleep(POLL_S)
        if child.returncode == 0:
            return found
        found.kills.append((killed, time.time(), 0.0))


def _step(run: Path) -> int:
    """Return the last step in the run's metrics; 0 if there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, ValueError, IndexError):
        return 0


_CASCADE = [sys.executable, "-P", "-m", "training.cli"]


def main() -> None:
    """Print the table, or the check, as lines of JSON."""
    if sys.argv[1:] == ["check"]:
        print(json.dumps(check(), default=float))
        return
    print(json.dumps({"assumed": asdict(replace(Assumed(nodes=0), nodes=0))}))
    for row in rows(float(sys.argv[1]) if sys.argv[1:] else 1.0):
        print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}))


if __name__ == "__main__":
    main()
