"""A training on a mixture of data sets: two processes, embeddings, a resume with one more, and the plan's word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import prepare
from data_pipeline.common.errors import ConfigError
from tests.training import forks
from tests.training.runs import experiment, metrics, newest
from training.commands import embed
from training.config.commands import EmbedCommand, PlanCommand
from training.config.experiment import Experiment
from training.config.plain import from_plain
from training.plan.checks import check_named
from training.plan.plan import make_plan
from training.run.directory import to_dict


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two drawn data sets in a directory with a blank."""
    home = tmp_path_factory.mktemp("two sets")
    for number in range(2):
        config = Experiment(seed=number)
        config.prepare.output = str(home / f"set {number}")
        config.prepare.draw.count, config.prepare.draw.heldout, config.prepare.draw.size = 24, 4, 16
        prepare.main(config)
    return [str(home / f"set {number}" / "train") for number in range(2)]


def entries(folders: list[str], *weights: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "shards": folder, "weight": weight}
        for name, folder, weight in zip("ab", folders, weights, strict=False)
    ]


def test_a_mixture_trains_resumes_with_a_data_set_more_and_is_planned(folders: list[str], tmp_path: Path) -> None:
    shards = entries(folders, 0.75, 0.25)
    first: Any = shards[:1]
    config = experiment(tmp_path, first, train__steps=4, validation__every=4, validation__samples=4)  # type: ignore[arg-type]
    config.validation.shards = folders[0].replace("/train", "/heldout")
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text
    config.train.steps = 12
    config.data.shards = [shards[0], {**shards[1], "start": 32}]
    running = forks.start(config, 1)
    assert running.codes() == [0], running.text
    lines = metrics(config)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert (lines[3]["samples_dataset/a"], lines[-1]["samples_dataset/a"]) == (32, 80)
    assert lines[-1]["samples_dataset/b"] == 16 and "bad_dataset/a" in lines[-1]
    for line in lines[4:]:
        parts = {name: line[f"loss_dataset/{name}"] for name in "ab"}
        assert 0.75 * parts["a"] + 0.25 * parts["b"] == pytest.approx(line["loss"], rel=1e-4)
    assert newest(config).meta["data"]["schedule"] == [[0, {"a": "1"}], [32, {"a": "3/4", "b": "1/4"}]]

    config.train.steps = 14
    config.data.shards = [shards[0], {**shards[1], "weight": 0.5, "start": 32}]
    with pytest.raises(ConfigError, match=r"has consumed 96 samples, .*1/4 b from 32 on to .*{0: OLD, 96: NEW}"):
        check_named("train", config)
    planned = from_plain(PlanCommand, {**to_dict(config), "gpu": "h100"})
    plan = make_plan(planned)
    assert any("has consumed 96 samples" in problem for problem in plan["problems"])
    assert plan["data"]["datasets"] == {"a": 24, "b": 24} and plan["data"]["samples"] == 48
    config.data.shards = [shards[0], {**shards[1], "weight": {0: 0.25, 96: 0.5}, "start": 32}]
    check_named("train", config)
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text


def test_embeddings_of_a_mixture_lie_by_data_set(folders: list[str], tmp_path: Path) -> None:
    shards = entries(folders, 1, 1)
    config = experiment(tmp_path, shards, train__steps=2)  # type: ignore[arg-type]
    place = str(tmp_path / "embedded text")
    command = EmbedCommand(data=config.data, text=config.text, output=place, json=True)
    assert embed.main(command)["captions"] == 48
    assert {path.name for path in Path(place).iterdir()} == {"a", "b"}
    online = forks.start(config, 1)
    assert online.codes() == [0], online.text
    config.data.embeddings, config.run.dir = place, str(tmp_path / "again")
    running = forks.start(config, 1)
    assert running.codes() == [0], running.text
    losses = [json.loads(path.read_text().splitlines()[-1])["loss"] for path in tmp_path.glob("*/metrics.jsonl")]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=0.02), "bf16 embeddings"
