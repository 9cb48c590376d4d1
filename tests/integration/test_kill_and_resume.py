"""Twenty kills at random moments, of one rank or of all, wherever they strike; the result is as if nothing had
happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.training import forks
from tests.training.runs import curve, experiment, newest, store

KILLS, STEPS = 20, 60


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.timeout(1200)
def test_twenty_kills(tmp_path: Path, shards: str) -> None:
    """Two ranks, a checkpoint every second step (so that many kills hit a write), killed 0 to 6 lines of the log after
    each start or while it starts."""
    calm = experiment(tmp_path, shards, run__dir=str(tmp_path / "calm"), train__steps=STEPS, checkpoint__every=2)
    rough = experiment(
        tmp_path, shards, run__dir=str(tmp_path / "rough"), train__steps=STEPS, checkpoint__every=2,
        data__own_process=True,
    )  # fmt: skip
    assert forks.start(calm, 2).codes() == [0, 0]
    chance = random.Random(7)
    log = Path(rough.run.dir) / "metrics.jsonl"
    kills = 0
    while kills < KILLS and store(rough).newest_whole() < STEPS:
        running = forks.start(rough, 2)
        if chance.random() < 0.8:  # otherwise in the middle of starting
            goal = chance.randint(0, 6)
            seen, last = 0, lines(log)
            while seen < goal and all(process.exitcode is None for process in running.processes):
                now = lines(log)  # a start removes lines, so only growth counts
                seen, last = seen + max(0, now - last), now
                time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        running.kill(chance.choice([0, 1, None]))
        running.codes(grace_s=1)
        kills += 1
    assert kills >= KILLS // 2, "the run was over before it had been hurt"
    again = forks.start(rough, 2)
    assert again.codes() == [0, 0], again.text
    assert curve(rough) == curve(calm)
    mine, wanted = newest(rough), newest(calm)
    assert all(torch.equal(mine.read(name), wanted.read(name)) for name in wanted.names())
    assert mine.meta["data"] == wanted.meta["data"]
    assert mine.manifest["attempt"] > kills // 2
