"""What every step costs in waiting for others does not grow with the number of ranks."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from data_pipeline.common.errors import BAD_REASONS
from tests.training import forks
from tests.training.runs import experiment

GRADIENTS = {
    1: {"c10d.allreduce_": 1, "c10d._allgather_base_": 1},
    3: {"c10d._reduce_scatter_base_": 1, "c10d._allgather_base_": 1},
}
"""Collectives of a step that ZeRO needs for gradients and weights, of a model that fits into one bucket."""
LOGGED = 3


def counts(tmp_path: Path, shards: str, stage: int, ranks: int) -> list[dict[str, int]]:
    """Per step, of the last rank: what it has waited for."""
    config = experiment(
        tmp_path / str(ranks), shards, zero__stage=stage, train__steps=6, train__log_every=LOGGED, checkpoint__every=100
    )
    Path(config.run.dir).parent.mkdir(parents=True)
    running = forks.start(config, ranks, "tests.training.counting")
    assert running.codes() == [0] * ranks, running.text
    return json.loads((Path(config.run.dir) / f"counts-{ranks - 1}.json").read_text())[1:]


@pytest.mark.parametrize(("stage", "sizes"), [(1, (2, 4, 8)), (3, (2, 8))])
def test_collectives_and_syncs_of_a_step_stay_constant(
    tmp_path: Path, shards: str, stage: int, sizes: tuple[int, ...]
) -> None:
    """One collective per step for all decisions, with one result to wait for; one more per line of the log. No objects
    are sent after the start, and ZeRO 3 gathers its small parameters in one message."""
    found = {ranks: counts(tmp_path, shards, stage, ranks)[2:] for ranks in sizes}  # DeepSpeed traces step 1
    assert all(other == found[8] for other in found.values())
    logged, *plain = found[8][LOGGED - 3], *found[8][LOGGED - 2 :]
    for step in plain:
        collectives = {name: count for name, count in step.items() if name.startswith("c10d")}
        wanted = dict(GRADIENTS[stage])
        wanted["c10d.allreduce_"] = wanted.get("c10d.allreduce_", 0) + 1
        assert collectives == wanted
        assert {name: count for name, count in step.items() if name.startswith("Tensor.")} == {"Tensor.tolist": 1}
    more = {name: count - plain[0].get(name, 0) for name, count in logged.items()}
    assert {name: count for name, count in more.items() if name.startswith("c10d") and count} == {"c10d.allreduce_": 1}


def test_every_reason_for_a_bad_sample_has_a_place_in_the_sums() -> None:
    """The ranks add counts up in a fixed order, so each reason that a training can meet must be in it."""
    root = Path(__file__).parents[2] / "data_pipeline"
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if "commands" not in path.parts else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadSample":
                found.add(ast.literal_eval(node.args[0]))
    assert found and found <= set(BAD_REASONS)
