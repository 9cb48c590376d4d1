"""The overhead of the loop over the bare forward, backward and optimizer, measured alternately in the same process.

    python -m benchmarks.loop            # about a minute on 2 cores

Prints one line of JSON: seconds per step of both, and `overhead` as a fraction (median over the turns).
`overhead_cpu` is the same in CPU time of the training thread, which other programs on the machine hardly affect; it
does not include waiting for data.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from data_pipeline.commands import prepare
from training.config.experiment import Experiment
from training.processes.launcher import free_port
from training.processes.ranks import Ranks

TURNS, STEPS = 7, 6


def settings(scratch: str) -> Experiment:
    """Return settings for the demo's base U-Net, ZeRO 1, one process; draws its data."""
    config = Experiment()
    config.prepare.output = f"{scratch}/data"
    config.prepare.draw.count, config.prepare.draw.heldout, config.prepare.draw.size = 512, 8, 64
    prepare.main(config)
    config.data.shards, config.data.global_batch = f"{scratch}/data/train", 32
    config.run.dir, config.wandb.mode = f"{scratch}/run", "disabled"
    config.train.steps, config.train.log_every, config.train.sample_every = 10_000, 20, 0
    config.checkpoint.every, config.cluster.threads = 10_000, 1
    return config


def main() -> dict[str, Any]:
    from training.engine.start import init_distributed
    from training.run.session import Session
    from training.run.watchdog import Watchdog

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory() as scratch:
        config = settings(scratch)
        watchdog = Watchdog(Ranks(), None, *Watchdog.limits(config.train))
        session = Session(config, init_distributed(Ranks(), config), watchdog)
        session.begin()
        batches = [next(session.data.loader) for _ in range(STEPS)]
        bare, looped, bare_cpu, looped_cpu, step = [], [], [], [], 0
        for _ in range(TURNS + 1):
            began, began_cpu = time.perf_counter(), time.thread_time()
            for batch in batches:
                for micro_batch in batch:
                    session.state.engine.backward(session.loss(micro_batch))
                session.state.engine.step(step)
                step += 1
            bare.append((time.perf_counter() - began) / STEPS)
            bare_cpu.append(time.thread_time() - began_cpu)
            began, began_cpu = time.perf_counter(), time.thread_time()
            for _ in range(STEPS):
                one_step(session, step)
                step += 1
            looped.append((time.perf_counter() - began) / STEPS)
            looped_cpu.append(time.thread_time() - began_cpu)
        session.close(0)
        ratios = [a / b for a, b in zip(looped[1:], bare[1:], strict=True)]  # the first turn warms up
        cpu = [a / b for a, b in zip(looped_cpu[1:], bare_cpu[1:], strict=True)]
        return {
            "benchmark": "loop",
            "bare_s": round(statistics.median(bare[1:]), 4),
            "loop_s": round(statistics.median(looped[1:]), 4),
            "overhead": round(statistics.median(ratios) - 1, 4),
            "overhead_cpu": round(statistics.median(cpu) - 1, 4),
            "spread": [round(min(ratios) - 1, 4), round(max(ratios) - 1, 4)],
            "where": Path("/proc/cpuinfo").read_text().split("model name")[1].split(":")[1].split("\n")[0].strip(),
        }


def one_step(session: Any, step: int) -> None:
    """Do what training/train.py does in a step, including logging."""
    with session.phase("data", step):
        batches = session.next_batch(healthy=True)
    share: Any = 0.0
    for batch in batches:
        with session.phase("forward", step):
            mean = session.loss(batch)
        with session.phase("backward", step):
            session.state.engine.backward(mean)
        share = share + mean.detach() / len(batches)
    with session.phase("step", step):
        info = session.state.engine.step(step, share, session.votes(0), session.judge)
    session.hear(info.votes, healthy=True)
    session.guard.accept(info.loss)
    if (step + 1) % session.config.train.log_every == 0:
        session.log(step + 1, {"loss": info.loss, "grad_norm": info.grad_norm, "lr": info.lr})


if __name__ == "__main__":
    print(json.dumps(main()))
