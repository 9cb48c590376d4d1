"""What every step costs in waiting for others does not grow with the number of ranks."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import BAD_REASONS
from tests.s3 import S3Server
from tests.training import forks
from tests.training.runs import ONE_LEVEL, experiment

GRADIENTS = {
    1: {"c10d.allreduce_": 1, "c10d._allgather_base_": 1},
    3: {"c10d._reduce_scatter_base_": 1, "c10d._allgather_base_": 1},
}
"""Collectives of a step that ZeRO needs for gradients and weights, of a model that fits into one bucket."""
LOGGED = 3
SAVED, DRAWN, EVALUATED, ROLLED_BACK, STEPS = 7, 8, 9, 11, 12
"""What happens at which step; after the last one everything happens again, uncounted."""


def counts(tmp_path: Path, shards: str, place: str, stage: int, ranks: int, env: dict[str, str]) -> dict[int, Any]:
    """Maps each step to what the last rank has waited for; checks that no rank sends an object after the start."""
    config = experiment(
        tmp_path / str(ranks), shards, zero__stage=stage, checkpoint__dir=place and f"{place}/{ranks}",
        train__steps=STEPS, train__log_every=LOGGED, checkpoint__every=SAVED, train__sample_every=DRAWN,
        stage__sampler__steps=1, evaluation__every=EVALUATED, evaluation__samples=8, evaluation__batch=8,
        evaluation__reference=shards.replace("train", "heldout"), train__max_skipped=2,
        stage__model__overrides=ONE_LEVEL,
    )  # fmt: skip
    Path(config.run.dir).parent.mkdir(parents=True)
    bad = [{"what": "nan", "rank": 0, "step": step} for step in (ROLLED_BACK - 1, ROLLED_BACK)]
    running = forks.start(config, ranks, "tests.training.counting", CASCADE_CHAOS=json.dumps(bad), **env)
    assert running.codes() == [0] * ranks, running.text
    assert f"rolled back to the weights of step {SAVED}" in running.text
    reports = [json.loads((Path(config.run.dir) / f"counts-{rank}.json").read_text()) for rank in range(ranks)]
    for report in reports:
        assert report["objects"] == [] and "checkpoint" in report["threads"], report
    return dict(enumerate(reports[-1]["steps"]))


def collectives(counted: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counted.items() if name.startswith("c10d") and count}


@pytest.mark.parametrize(("stage", "sizes"), [(1, (2, 4, 8)), (3, (2, 8))])
def test_collectives_and_syncs_of_a_step_stay_constant(
    tmp_path: Path, shards: str, bucket: str, s3_server: S3Server, stage: int, sizes: tuple[int, ...]
) -> None:
    """One collective per step for all decisions, with one result to wait for; one more per line of the log. No objects
    are sent after the start, and ZeRO 3 gathers its small parameters in one message. What a sample grid, an
    evaluation, a checkpoint and a roll-back need is constant, too."""
    place = f"s3://{bucket}/ck" if stage == 3 else ""
    found = {ranks: counts(tmp_path, shards, place, stage, ranks, s3_server.env) for ranks in sizes}
    for ranks in sizes:
        for step in range(3, SAVED):  # DeepSpeed traces step 1
            assert found[ranks][step] == found[8][step]
        for step in range(SAVED, STEPS):
            assert collectives(found[ranks][step]) == collectives(found[8][step]), (ranks, step)
    logged, *plain = (found[8][step] for step in (LOGGED, *range(LOGGED + 1, 2 * LOGGED)))
    for step in plain:
        wanted = dict(GRADIENTS[stage])
        wanted["c10d.allreduce_"] = wanted.get("c10d.allreduce_", 0) + 1
        assert collectives(step) == wanted
        assert {name: count for name, count in step.items() if name.startswith("Tensor.")} == {"Tensor.tolist": 1}
    more = {name: count - plain[0].get(name, 0) for name, count in logged.items()}
    assert collectives(more) == {"c10d.allreduce_": 1}


def test_every_reason_for_a_bad_sample_has_a_place_in_the_sums() -> None:
    """The ranks add counts up in a fixed order, so each reason that a training can meet must be in it."""
    root = Path(__file__).parents[2] / "data_pipeline"
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if not {"commands", "tables"} & {*path.parts} else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadSample":
                found.add(ast.literal_eval(node.args[0]))
    assert found and found <= set(BAD_REASONS)
