"""A training on a mixture of data sets: two processes, embeddings, resuming with an added data set, and its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import prepare
from data_pipeline.common.errors import ConfigError
from tests.data_pipeline.shapes import write_shapes
from tests.training import forks
from tests.training.runs import curve, experiment, metrics, newest
from tests.training.text.tiny_models import tiny_model
from training.cascade.cascade import Cascade
from training.commands import embed
from training.config.commands import EmbedCommand, PlanCommand
from training.config.experiment import Experiment, TextConfig
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


def test_a_mixture_trains_resumes_with_an_added_data_set_and_is_planned(folders: list[str], tmp_path: Path) -> None:
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
    with pytest.raises(ConfigError, match=r"has consumed 96 samples; .*1/4 b from 32 on to .*{0: OLD, 96: NEW}"):
        check_named("train", config)
    planned = from_plain(PlanCommand, {**to_dict(config), "gpu": "h100"})
    plan = make_plan(planned)
    assert any("has consumed 96 samples" in problem for problem in plan["problems"])
    assert plan["data"]["datasets"] == {"a": 24, "b": 24} and plan["data"]["samples"] == 48
    config.data.shards = [shards[0], {**shards[1], "weight": {0: 0.25, 96: 0.5}, "start": 32}]
    check_named("train", config)
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text


def test_embeddings_of_a_mixture_are_stored_by_data_set(folders: list[str], tmp_path: Path) -> None:
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


def test_shapes_of_a_mixture_train_under_any_zero_stage(tmp_path: Path) -> None:
    """ZeRO 2 on two processes, ZeRO 3 on one that continues with an added data set, and the plan for it."""
    homes = [tmp_path / name for name in ("set a", "set b")]
    for home in homes:
        home.mkdir()
    shards = entries([write_shapes(homes[0]), write_shapes(homes[1], ((40, 30), (36, 36)))], 0.75, 0.25)
    later: Any = [shards[0], {**shards[1], "start": 16}]
    changes = {"data__buckets": ["1x1", "4x3", "3x4"], "optimizer__decay": "constant"}
    config = experiment(tmp_path, shards[:1], **changes, train__steps=2, zero__stage=2)  # type: ignore[arg-type]
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text
    config.train.steps, config.zero.stage, config.data.shards = 6, 3, later
    running = forks.start(config, 1)
    assert running.codes() == [0], running.text
    alone = experiment(tmp_path / "alone", later, **changes, train__steps=6, zero__stage=0)  # type: ignore[arg-type]
    Path(alone.run.dir).parent.mkdir()
    running = forks.start(alone, 1)
    assert running.codes() == [0], running.text
    for mine, wanted in zip(curve(config), curve(alone), strict=True):
        assert mine[:2] == wanted[:2] and mine[2:] == pytest.approx(wanted[2:], rel=1e-4)
    last = metrics(config)[-1]
    assert last["samples_dataset/a"] + last["samples_dataset/b"] == 48 and 0 < last["samples_dataset/b"] < 32
    plan = make_plan(from_plain(PlanCommand, {**to_dict(config), "gpu": "h100"}))
    assert plan["data"]["dataset_epochs"] == pytest.approx({"a": (16 + 0.75 * 32) / 63, "b": 0.25 * 32 / 63})
    shapes = plan["data"]["buckets"]
    assert [(one["width"], one["height"]) for one in shapes.values()] == [(12, 20), (16, 16), (20, 12)]
    assert sum(one["samples"] for one in shapes.values()) == 126 and not plan["problems"]


def test_a_sweep_over_weights_of_a_mixture(folders: list[str], tmp_path: Path) -> None:
    """Each training of it has its own directory and mixture."""
    pairs = [f"[{{name: a, shards: '{folders[0]}', weight: {w}}}, {{name: b, shards: '{folders[1]}'}}]" for w in (1, 3)]
    words = ["stage.model.preset=tiny_base", "text.dim=32", "data.global_batch=8", "zero=zero2", "train.steps=2"]
    words += ["train.log_every=1", "train.sample_every=0", "tracking=disabled", f"run.dir={tmp_path}/a run"]
    done = forks.command("train", "--multirun", *words, "cluster.threads=1", f"data.shards={','.join(pairs)}")
    assert done.returncode == 0, done.stderr
    shares = [json.loads(file.read_text().splitlines()[-1]) for file in sorted(tmp_path.glob("a run/*/metrics.jsonl"))]
    assert sorted(line["samples_dataset/a"] for line in shares) == [8, 12]


def test_two_encoders_from_embedding_to_pictures(folders: list[str], tmp_path: Path) -> None:
    """Embedding in advance equals encoding in training; the bundle records both, and drawing needs both."""
    clip = {"kind": "clip", "path": tiny_model("clip", tmp_path / "a clip"), "dim": 16, "max_tokens": 8, "layer": -2}
    gemma = tiny_model("gemma2", tmp_path / "a gemma")
    text = TextConfig(kind="hidden", path=gemma, dim=16, max_tokens=20, also=clip)
    config = experiment(tmp_path, folders[0], train__steps=3, zero__stage=0, text=text)
    place = str(tmp_path / "embedded")
    command = EmbedCommand(data=config.data, text=text, output=place, json=True)
    assert embed.main(command)["captions"] == 24
    losses = []
    for embeddings, run in ((None, "online"), (place, "embedded run")):
        config.data.embeddings, config.run.dir = embeddings, str(tmp_path / run)
        running = forks.start(config, 1)
        assert running.codes() == [0], running.text
        losses.append([line["loss"] for line in metrics(config)])
    assert losses[0] == pytest.approx(losses[1], rel=0.02), "bf16 embeddings"

    Cascade.from_runs([config.run.dir]).save(str(tmp_path / "a bundle"))
    loaded = Cascade.from_pretrained(str(tmp_path / "a bundle"))
    assert loaded.text.also == clip and loaded.encoder.max_tokens == 20
    drawn = loaded.draw(["a red circle", "a blue square"], steps=2)
    assert len(drawn) == 2 and drawn[0].image.size == (16, 16)
    config.text = TextConfig(**{**vars(text), "also": {**clip, "layer": -1}, "sha": None})
    running = forks.start(config, 1)
    assert running.codes() == [2] and "text" in running.text, "another second encoder is another one"
