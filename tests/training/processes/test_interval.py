"""How often a run saves: the formula against a simulation, and the run's own history."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from benchmarks.cluster_sim import Assumed, goodput, simulate
from training.processes.interval import NODE_S, best_interval, between_failures, failures_of, ran_seconds


def test_the_formula_meets_youngs_where_failures_are_rare() -> None:
    assert best_interval(2.0, 1e9) == pytest.approx(math.sqrt(2 * 2.0 * 1e9), rel=1e-3)
    assert best_interval(100.0, 40.0) == 40.0, "a checkpoint that costs more than a failure"


def test_the_simulation_loses_least_at_the_best_interval() -> None:
    run = Assumed(nodes=512, blocked_s=5.0, write_s=0.0)
    best = best_interval(run.blocked_s, run.between_s)
    shares = {factor: goodput(run, best * factor, work_s=20 * 86400.0)["work"] for factor in (0.25, 1.0, 4.0)}
    assert shares[1.0] > max(shares[0.25], shares[4.0])
    # overhead to first order (Young): the cost of saving and half an interval per failure, and the restarts
    pause = run.detect_s + (run.restart_s + run.requeue_s) / 2
    overhead = run.blocked_s / best + (best / 2 + pause) / run.between_s
    assert 1 / shares[1.0] - 1 == pytest.approx(overhead, rel=0.15)


def test_a_simulated_run_by_hand() -> None:
    run = Assumed(nodes=1, blocked_s=1.0, write_s=0.0, detect_s=2.0, restart_s=3.0, requeued=0.0)
    calm = simulate(run, 10.0, 30.0, [])
    assert calm["total"] == 33.0 and calm["lost"] == 0.0
    once = simulate(run, 10.0, 30.0, [15.0])
    assert (once["lost"], once["restarting"]) == (4.0, 5.0), "11 s were saved, 4 s of work were not"
    assert once["total"] == 33.0 + 4.0 + 5.0
    late = simulate(Assumed(nodes=1, blocked_s=1.0, write_s=9.0, detect_s=0.0, restart_s=0.0, requeued=0.0), 10.0, 30.0,
                    [15.0])  # fmt: skip
    assert late["lost"] == 14.0, "the first checkpoint was not whole yet"
    assert simulate(run, 10.0, 1e6, random.Random(1)) == simulate(run, 10.0, 1e6, random.Random(1))


def test_a_run_knows_its_own_failures(tmp_path: Path) -> None:
    assert between_failures(0, 0.0, nodes=4) == NODE_S / 4
    assert between_failures(9, 0.0, nodes=4) == NODE_S / 40
    assert failures_of([]) == 0 and ran_seconds(tmp_path, 2) == 0.0
    (tmp_path / "hours.json").write_text('{"1": 1.5, "2": 0.5}')
    assert failures_of([{"code": 137}, {"code": 75}, {"code": 78}, {"code": 130}, {}]) == 2, "neither stop is one"
    assert ran_seconds(tmp_path, 2) == 3600.0
