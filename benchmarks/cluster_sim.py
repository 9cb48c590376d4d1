"""What failures cost a training on many GPUs, and how often it should save: a simulation, and its check against a run.

    python -m benchmarks.cluster_sim            # the table: GPUs, best interval, goodput, what limits
    python -m benchmarks.cluster_sim 4          # the same with four times the published rate of failures
    python -m benchmarks.cluster_sim check      # a real training here with ranks killed, beside its simulation

Goodput is the share of the allocation's time that went into steps which count. A run works, saves every `interval_s`
(the loop waits `blocked_s`, the checkpoint is whole `write_s` later), and fails after exponential times: the work since
the newest whole checkpoint is lost, and so are `detect_s` and `restart_s` in the same allocation, or, with the share
`requeued` of failures, `requeue_s`. Failure rates are published ones (ASSUMED); the other figures are measured, see
docs/cluster.md.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training.processes.interval import NODE_S, best_interval

GPUS = (16, 64, 256, 1024, 4096)
PER_NODE = 8
DAYS = 60
SEEDS = 8


@dataclass(frozen=True)
class Assumed:
    """One run on one cluster; all times in seconds.

    Attributes:
        node_s: time of one node between failures; blocked_s: that the loop waits for a checkpoint; write_s: until it is
        whole; detect_s: from a failure to its notice; restart_s: from there to the first step, in the same allocation;
        requeued: share of failures that need another node from the queue, which takes requeue_s.
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
        """Mean time between failures of the job."""
        return self.node_s / self.nodes


def simulate(run: Assumed, interval_s: float, work_s: float, failures: list[float] | random.Random) -> dict[str, float]:
    """Seconds by what they went into, until `work_s` of work are saved.

    Args:
        failures: their times, seconds of work and pauses since the beginning, or a source of random ones.
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
            if whole_at <= fails:  # it is whole before anything happens
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
    """Shares of the time, means over SEEDS simulations."""
    found = [simulate(run, interval_s, work_s, random.Random(seed)) for seed in range(SEEDS)]
    return {name: sum(one[name] / one["total"] for one in found) / len(found) for name in found[0] if name != "total"}


def rows(rate: float = 1.0) -> list[dict[str, Any]]:
    """One per size: the best interval by formula, and the goodput there, at half and at twice of it.

    Args:
        rate: failures, times the published ones.
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


STEPS, EVERY = 240, 20


def check() -> dict[str, float]:
    """A training of the demo's base stage on this machine, once in peace and once with its ranks killed, restarted as a
    job's script does; and what the simulation makes of the same failures, with the costs of the first."""
    with tempfile.TemporaryDirectory(prefix="cascade-sim-") as scratch:
        calm = _train(Path(scratch), "calm", [])
        step_s = (calm["last"] - calm["first"]) / (STEPS - 1)
        start_s = calm["first"] - calm["began"]
        rng = random.Random(7)
        work = STEPS * step_s
        kills = sorted(start_s + rng.uniform(0.1, 0.9) * work * (n + 1) / 3 for n in range(3))
        real = _train(Path(scratch), "killed", kills)
    run = Assumed(nodes=1, blocked_s=0.0, write_s=0.0, detect_s=real["detect"], restart_s=start_s, requeued=0.0)
    shifted = [at - start_s for at in real["kills"]]  # the simulation begins with the first step
    said = simulate(run, EVERY * step_s, work, shifted)
    took = real["ended"] - real["began"] - start_s - (calm["ended"] - calm["last"])
    return {"real_s": took, "simulated_s": said["total"], "error": said["total"] / took - 1, "step_s": step_s,
            "start_s": start_s, "kills": len(real["kills"])}  # fmt: skip


def _train(folder: Path, name: str, kills: list[float]) -> dict:
    """Times (time.time) of one run: began, first and last line of metrics, ended."""
    import os
    import signal
    import subprocess

    run = folder / name
    words = ["experiment=demo", f"data.shards={folder}/data/train", f"prepare.output={folder}/data"]
    if not (folder / "data").exists():
        drawn = ["prepare.draw.count=400", "prepare.draw.heldout=8"]
        subprocess.run([*_CASCADE, "prepare", *words[::2], words[2], *drawn], check=True, capture_output=True)
    command = [*_CASCADE, "train", *words[:2], f"run.dir={run}", f"train.steps={STEPS}", f"checkpoint.every={EVERY}",
               "train.log_every=1", "train.sample_every=0", "data.global_batch=16", "tracking=disabled",
               "checkpoint.background=false"]  # fmt: skip
    found: dict = {"began": time.time(), "kills": [], "detect": 0.0}
    while True:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        killed = 0.0
        while child.poll() is None:
            now = time.time() - found["began"]
            if kills and now >= kills[0] and (run / "metrics.jsonl").exists():
                ranks = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
                if ranks:
                    kills.pop(0)
                    os.kill(int(ranks[-1]), signal.SIGKILL)
                    killed = time.time()
                    found["kills"].append(killed - found["began"])
            if "first" not in found and (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
                found["first"] = time.time()
            time.sleep(0.05)
        if killed:
            found["detect"] += (time.time() - killed) / 3
        if child.returncode == 0:
            break
    found["ended"] = time.time()
    found["last"] = (run / "metrics.jsonl").stat().st_mtime
    return found


_CASCADE = [sys.executable, "-P", "-m", "training.cli"]


def main() -> None:
    """Prints the table, or the check, as lines of JSON."""
    if sys.argv[1:] == ["check"]:
        print(json.dumps({name: round(value, 4) for name, value in check().items()}))
        return
    print(json.dumps({"assumed": asdict(replace(Assumed(nodes=0), nodes=0))}))
    for row in rows(float(sys.argv[1]) if sys.argv[1:] else 1.0):
        print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}))


if __name__ == "__main__":
    main()
