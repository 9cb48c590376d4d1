"""How the preflight judges its figures, and what happens to a slow node."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import DataError
from tests.training.ranks import run_ranks
from tests.training.runs import experiment
from training.config.experiment import ClusterConfig
from training.processes.endings import SlowNode
from training.processes.ranks import Ranks
from training.run import preflight as module
from training.run.directory import RunDir
from training.run.preflight import Measured, judge_measured, preflight

USUAL = [Measured(rank, f"n{rank}", 100.0 + rank, 5.0, 8.0, 20.0, 1.0, 2.0) for rank in range(4)]


def findings(**slow: float) -> list[tuple[str, bool]]:
    """(node, excluded) where rank 2 has these figures."""
    return [(one.node, one.excludes) for one in judge_measured([*USUAL[:2], replace(USUAL[2], **slow), USUAL[3]])]


def test_a_normal_allocation_has_no_findings() -> None:
    assert judge_measured(USUAL) == [] and judge_measured(USUAL[:1]) == []


def test_a_slow_node_is_named() -> None:
    assert findings(tflops=60.0) == [("n2", True)]
    assert findings(read_gb_s=0.1) == [("n2", True)]
    assert findings(clock_s=65.0) == [("n2", False)], "a wrong clock is told, the node may stay"
    said = judge_measured([USUAL[0], replace(USUAL[1], tflops=50.0)])
    assert [one.node for one in said] == ["n1"]
    from_memory = [replace(USUAL[0], read_gb_s=12.0), replace(USUAL[1], read_gb_s=1.3)]
    assert judge_measured(from_memory) == [], "1.3 GB/s is no reason to exclude a node"
    assert "rank 1 on n1 computes 50 TFLOP/s, 2.0 times slower" in said[0].sentence


def test_a_link_and_a_node_that_is_slow_both_ways() -> None:
    assert findings(receive_gb_s=5.0) == [("n2", False)], "one direction is a link"
    both = [*USUAL[:2], replace(USUAL[2], receive_gb_s=5.0), replace(USUAL[3], receive_gb_s=5.0)]
    assert [(one.node, one.excludes) for one in judge_measured(both)] == [("n2", True)]


def test_the_preflight_measures_and_leaves_nothing_in_the_store(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, cluster__preflight=True)
    run = RunDir(config)
    run.create()
    assert preflight(config, Ranks(), run, node="n1") == []
    report = json.loads((run.path / "preflight.json").read_text())
    (one,) = report["ranks"]
    assert one["node"] == "n1" and one["tflops"] > 0 and one["write_gb_s"] > 0 and report["slow"] == []
    assert one["all_reduce_gb_s"] is None and abs(one["clock_s"] - time.time()) < 60
    assert not list(Path(run.checkpoints).glob(".preflight*"))


def measured(ranks: Ranks, store: str) -> dict[str, Any]:
    return asdict(module.measure(ranks, store, f"n{ranks.rank}"))


@pytest.mark.parametrize("processes", [1, 2])
def test_links_are_measured_between_ranks(tmp_path: Path, processes: int) -> None:
    """A single rank also has process groups, but no rank to send to: gloo reports "Pair is not connected" to itself."""
    (tmp_path / "store").mkdir()
    for figures in run_ranks(measured, processes, tmp_path, str(tmp_path / "store")):
        for name in ("all_reduce_gb_s", "receive_gb_s"):
            assert (figures[name] is None) if processes == 1 else (figures[name] > 0)


def refused(ranks: Ranks, *stores: str) -> str:
    """As with one rank per node, each of which writes to the store."""
    try:
        module.measure(replace(ranks, local_rank=0), stores[ranks.rank], "n")
    except DataError as error:
        return str(error)
    return ""


def test_a_store_that_one_node_cannot_write_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "file").touch()
    said = run_ranks(refused, 2, tmp_path, str(tmp_path / "store"), str(tmp_path / "file"))
    assert said[0] == said[1] and "Not a directory" in said[0]


@pytest.mark.parametrize("exclude", [False, True])
def test_a_slow_node_ends_the_start_if_requested(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch, exclude: bool
) -> None:
    config = experiment(tmp_path, shards)
    config.cluster = ClusterConfig(preflight=True, preflight_exclude=exclude)
    run = RunDir(config)
    run.create()
    bad = replace(USUAL[3], tflops=10.0)
    monkeypatch.setattr(module, "gather_json", lambda value, ranks: [vars(one) for one in (*USUAL[:3], bad)])
    if not exclude:
        assert [one.node for one in preflight(config, Ranks(), run)] == ["n3"]
        return
    with pytest.raises(SlowNode, match=r"the preflight found n3 slow .*code 79"):
        preflight(config, Ranks(), run)
    assert json.loads((run.path / "preflight.json").read_text())["slow"] == ["n3"]
