"""`cascade ablate`: which trainings it consists of, what it refuses, and a real one from first start to table."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from tests.training import forks
from training.ablation import ablate
from training.ablation.arms import arms_of, is_done, learns
from training.checkpoint.store import CheckpointStore
from training.cli import main as cli
from training.cli.compose import ingredients_of, load_config
from training.config.commands import AblateCommand
from training.config.experiment import Experiment
from training.run.directory import RunDir

TINY = (
    "stage.model.preset=tiny_base text.dim=32 data.global_batch=4 data.own_process=false train.steps=2 "
    "train.sample_every=0 tracking=disabled cluster.gpus=false cluster.processes=1 validation.samples=4 "
    "optimizer.warmup_steps=1 'ema.decays=[0.5]'"
).replace("'", "")


def arms(line: str, *words: str) -> tuple[list[Any], list[Any]]:
    typed = [*line.split(), *words]
    config = load_config("ablate", typed)
    assert isinstance(config, AblateCommand)
    return arms_of(typed, config)


def test_each_ingredient_is_one_arm_beside_the_experiment() -> None:
    found, comparisons = arms("experiment=demo ingredient=[muon,min_snr] ablate.together=true seed=3 run=runs/a")
    assert [(arm.name, arm.ingredients) for arm in found] == [
        ("experiment", ()),
        ("with-muon", ("muon",)),
        ("with-min_snr", ("min_snr",)),
        ("with-muon+min_snr", ("muon", "min_snr")),
    ]
    assert [(one.name, one.without, one.with_it) for one in comparisons] == [
        ("muon", "experiment", "with-muon"),
        ("min_snr", "experiment", "with-min_snr"),
        ("muon+min_snr", "experiment", "with-muon+min_snr"),
    ]
    assert ("optimizer.name", "adamw", "muon") in comparisons[0].changes
    assert {key for key, _, _ in comparisons[1].changes} == {"stage.diffusion.weighting", "stage.diffusion.max_weight"}
    run = found[1].run(Path("out"), 2)
    assert (run.seed, run.run.dir, run.checkpoint.dir) == (5, "out/with-muon/seed-2", None)
    assert (run.wandb.name, run.wandb.group) == ("demo/demo_base with-muon/seed-2", "demo/demo_base ablation")
    assert found[1].command(Path("a b"), 2) == (
        "cascade train experiment=demo seed=3 'ingredient=[muon]' seed=5 'run.dir=a b/with-muon/seed-2'"
    )


def test_checkpoints_in_a_store_are_apart() -> None:
    found, _ = arms("experiment=demo ingredient=muon checkpoint.dir=s3://bucket/a/")
    assert found[1].run(Path("out"), 0).checkpoint.dir == "s3://bucket/a/with-muon/seed-0"
    assert found[1].command(Path("out"), 0).endswith("checkpoint.dir=s3://bucket/a/with-muon/seed-0")


def test_an_ingredient_of_the_experiment_is_measured_by_leaving_it_out(tmp_path: Path) -> None:
    lines = "# @package _global_\ndefaults:\n  - demo\n  - override /ingredient: [min_snr, muon]\n"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(lines)
    from training.cli.compose import searching

    with searching(str(tmp_path)):
        assert ingredients_of("train", ["experiment=mine"]) == ["min_snr", "muon"]
        found, comparisons = arms("experiment=mine ingredient=[muon,sigmoid_weighting]")
    assert [(arm.name, arm.ingredients) for arm in found] == [
        ("experiment", ("min_snr", "muon")),
        ("without-muon", ("min_snr",)),
        ("with-sigmoid_weighting", ("min_snr", "muon", "sigmoid_weighting")),
    ]
    assert (comparisons[0].without, comparisons[0].with_it) == ("without-muon", "experiment")
    assert ("optimizer.name", "adamw", "muon") in comparisons[0].changes


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "ingredient: name the ingredients to measure"),
        ("ingredient=nothing", "ingredient=nothing: no such option; the options are .*min_snr"),
        ("ingredient=guidance_interval", "it only changes stage.sampler.guidance_interval"),
        ("ingredient=min_snr stage.diffusion.weighting=v stage.diffusion.max_weight=4", "it changes nothing here"),
        ("ingredient=muon ablate.together=true", "name at least two such ingredients, not 1"),
        ("ingredient=muon ablate.seeds=1", "ablate.seeds=1: it must be at least 2"),
        ("ingredient=muon ablate.levels=[2,0]", "give at least one log-SNR"),
        ("ingredient=muon ablate.output=s3://b/a", "ablate.output=s3://b/a: it must be a local directory"),
        ("ingredient=muon bundle.dir=x", "bundle.dir: cascade ablate would not use it"),
        ("ingredient=muon zero=zero0 cluster.processes=2", "zero.stage=0: it only works with one process, not 2"),
    ],
)
def test_gains_that_cannot_be_measured_are_refused(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        arms(f"experiment=demo {line}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("evaluation.reference=null", "validation.shards: name the held-out shards"),
        ("evaluation.reference={shards}", "evaluation.reference: .* is in data.shards as well"),
        (
            "ablate.levels=[-9,0] evaluation.reference={heldout}",
            "with-x_pred_v_loss is trained at log-SNRs from -8 to 8",
        ),
    ],
)
def test_the_question_is_checked_before_anything_is_trained(
    shards: str, heldout: str, words: str, sentence: str
) -> None:
    line = (
        f"experiment=demo ingredient=x_pred_v_loss data.shards={shards} {words.format(shards=shards, heldout=heldout)}"
    )
    config = load_config("ablate", line.split())
    assert isinstance(config, AblateCommand)
    found, _ = arms_of(line.split(), config)
    with pytest.raises(ConfigError, match=sentence):
        ablate.check_question(found[0].config, found, config.ablate.levels)


def test_what_is_learned_depends_only_on_some_settings() -> None:
    for key in (
        "seed",
        "stage.diffusion.weighting",
        "data.captions.clean",
        "optimizer.options.momentum",
        "train.steps",
        "repa.weight",
    ):
        assert learns(key), key
    for key in ("stage.sampler.steps", "data.threads", "train.log_every", "wandb.name", "cluster.processes"):
        assert not learns(key), key


@pytest.fixture
def heldout(shards: str) -> str:
    """The held-out drawings next to those of the training."""
    return f"{shards.removesuffix('/train')}/heldout"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """The trainings that are started; each is a real one."""
    started: list[Experiment] = []

    def launch(module: str, config: Experiment) -> None:
        started.append(config)
        Path(config.run.dir).parent.mkdir(parents=True, exist_ok=True)
        store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        running = forks.start(config, max(1, config.cluster.processes), module, **store)
        codes = running.codes()
        assert codes == [0] * len(codes), running.text

    monkeypatch.setattr(ablate, "launch", launch)
    return started


def test_an_ablation_from_the_first_start_to_the_table(
    tmp_path: Path, shards: str, heldout: str, trained: list[Experiment], capsys: Any
) -> None:
    output = tmp_path / "of mine"
    words = ["ablate", *TINY.split(), "ingredient=muon", f"data.shards={shards}", "ablate.seeds=2"]
    words += [f"validation.shards={heldout}", f"ablate.output={output}", "ablate.levels=[-2,0,2]", "json=true"]
    cli.main([*words[:-4], "ablate.dry_run=true", *words[-4:]])
    assert not trained and not output.exists()
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["trainings"]
    assert list(shown)[:3] == ["experiment/seed-0", "with-muon/seed-0", "experiment/seed-1"] and len(shown) == 4

    cli.main(words)
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1])
    assert result == json.loads((output / "ablate.json").read_text())
    assert [run.run.dir for run in trained] == [f"{output}/{name}" for name in shown]
    assert [run.seed for run in trained] == [0, 0, 1, 1] and trained[1].optimizer.name == "muon"
    assert "==> training 4 of 4: with-muon, seed 1" in said and "half of what is detectable here takes" in said
    plain, muon = (result["arms"][name]["errors"] for name in ("experiment", "with-muon"))
    apart = [[math.log(b / a) for a, b in zip(one, two, strict=True)] for one, two in zip(plain, muon, strict=True)]
    first = result["gains"]["muon"]["by_level"][0]
    assert first["percent"] == pytest.approx(100 * math.expm1((apart[0][0] + apart[1][0]) / 2))
    mean = sum(map(sum, apart)) / 6
    assert result["gains"]["muon"]["mean"]["percent"] == pytest.approx(100 * math.expm1(mean))
    assert result["gains"]["muon"]["half"]["device_hours"] > 0 and result["gains"]["muon"]["time"] > 0
    assert Image.open(output / "ablate.png").height > 200

    # finished trainings are not started again; another seed adds what is missing
    trained.clear()
    cli.main(words)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not trained and again["arms"]["with-muon"]["errors"] == muon, "the same question has the same answer"
    cli.main([*[word for word in words if not word.startswith("ablate.seeds")], "ablate.seeds=3"])
    assert [run.run.dir for run in trained] == [f"{output}/experiment/seed-2", f"{output}/with-muon/seed-2"]
    assert "4 of 6 trainings are done already" in capsys.readouterr().out

    # settings that would make the arms differ are refused; those that only change the course of a run are not
    trained.clear()
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "optimizer.lr=3e-4"])
    assert ended.value.code == 2 and not trained
    assert f"optimizer.lr=0.0003: {output}/experiment/seed-0 was trained with" in capsys.readouterr().err
    cli.main([*words, "train.log_every=7", "cluster.processes=2"])
    assert not trained


def test_a_training_that_was_stopped_early_is_not_compared(tmp_path: Path, shards: str, trained: Any) -> None:
    found, _ = arms(f"{TINY} ingredient=muon", f"data.shards={shards}")
    run = found[0].run(tmp_path, 0)
    assert not is_done(run)
    ablate.launch("training.train", run)
    file = Path(run.run.dir) / "config.yaml"
    older = yaml.safe_load(file.read_text())
    del older["repa"], older["stage"]["diffusion"]["size_condition"]
    file.write_text(yaml.safe_dump(older))
    assert is_done(run), "a setting that the code did not have yet was at its default"
    longer = replace(run, train=replace(run.train, steps=3))
    with pytest.raises(ConfigError, match=r"train.steps=3: .* was trained with 2"):
        is_done(longer)
    file.write_text(file.read_text().replace("  steps: 2\n", "  steps: 3\n"))
    RunDir(longer).ask_to_stop("worse and worse")
    with pytest.raises(DataError, match=r"asked to stop early, at step 2 \(worse and worse\)"):
        is_done(longer)


def test_two_processes(tmp_path: Path, shards: str, heldout: str, trained: list[Experiment], capsys: Any) -> None:
    words = [
        *TINY.replace("cluster.processes=1", "cluster.processes=2").split(),
        "ingredient=min_snr",
        "json=true",
        f"run={tmp_path}/run",
    ]
    cli.main(["ablate", *words, f"data.shards={shards}", f"evaluation.reference={heldout}", "ablate.seeds=2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["heldout"] == heldout and result["output"] == f"{tmp_path}/run-ablation"
    assert [len(run) for run in result["arms"]["experiment"]["errors"]] == [7, 7]
    assert all(math.isfinite(error) for errors in result["arms"]["with-min_snr"]["errors"] for error in errors)


def test_super_resolution_in_a_store_and_a_killed_ablation(
    tmp_path: Path, shards: str, heldout: str, s3_server: Any, bucket: str, trained: list[Experiment], capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output, place = tmp_path / "of mine", f"s3://{bucket}/of-mine"
    words = ["ablate", *TINY.replace("tiny_base", "tiny_sr").split(), "stage=demo_sr", "ingredient=muon", "json=true"]
    words += [f"data.shards={shards}", f"validation.shards={heldout}", "ablate.seeds=2", "ablate.levels=[-2,2]"]
    words += [f"checkpoint.dir={place}", "checkpoint.every=1", "evaluation.reference=null"]
    start = ablate.launch

    def killed(module: str, config: Experiment) -> None:
        if len(trained) == 2:
            raise SystemExit(137)
        start(module, config)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(ablate, "launch", killed)
        cli.main([*words, f"ablate.output={output}"])
    half = output / "with-muon" / "seed-0"
    assert CheckpointStore(f"{place}/with-muon/seed-0").steps() == [2, 1] and not (half / "checkpoints").exists()
    client: Any = s3_server.client()  # as if it had been killed before the checkpoint of its second step was complete
    for found in client.list_objects_v2(Bucket=bucket, Prefix="of-mine/with-muon/seed-0/step-00000002")["Contents"]:
        client.delete_object(Bucket=bucket, Key=found["Key"])
    (half / "saved.json").unlink()
    trained.clear()
    cli.main([*words, f"ablate.output={output}"])
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [Path(run.run.dir).relative_to(output).as_posix() for run in trained] == [
        "with-muon/seed-0",
        "experiment/seed-1",
        "with-muon/seed-1",
    ]
    assert [start["step"] for start in json.loads((half / "code.json").read_text())["starts"]] == [0, 1]
    assert all(math.isfinite(error) for errors in first["arms"]["with-muon"]["errors"] for error in errors)

    # from elsewhere: the store has everything, and records the settings it was made with
    trained.clear()
    cli.main([*words, f"ablate.output={tmp_path}/elsewhere"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not trained and again["gains"]["muon"]["by_level"] == first["gains"]["muon"]["by_level"]
    assert again["gains"]["muon"]["time"] is None
    with pytest.raises(SystemExit):
        cli.main([*words, f"ablate.output={tmp_path}/elsewhere", "seed=7"])
    said = capsys.readouterr().err
    assert f"seed=7: {place}/experiment/seed-0 was trained with 0" in said and "choose another checkpoint.dir" in said


def test_the_question_does_not_depend_on_what_an_arm_was_trained_with(tmp_path: Path, heldout: str) -> None:
    """A network whose output is its input: as an eps or an x0 prediction, its error has a closed form."""
    from training.processes.ranks import Ranks
    from training.run.validation import Validation

    config: Any = load_config("train", [*TINY.split(), f"validation.shards={heldout}", "validation.every=1"])

    def text(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(batch.captions), 1, 32), torch.zeros(len(batch.captions), 1, dtype=torch.bool)

    def errors(**diffusion: Any) -> list[float]:
        stage = replace(config.stage, diffusion=replace(config.stage.diffusion, **diffusion))
        validation = Validation(replace(config, stage=stage), Ranks(), text)
        return validation.at_levels(lambda z, *_: torch.zeros_like(z), [-1.0, 2.0])

    base = errors(parametrization="x0")
    other = errors(parametrization="x0", schedule="logit_normal", weighting="flow_v", text_drop=0.5)
    assert base == other and base[0] == base[1], "no output is black at every level: the pictures' own power"
    eps = errors(parametrization="eps")  # x0 = z / alpha = x0 + eps sigma / alpha
    assert eps == pytest.approx([math.exp(1.0), math.exp(-2.0)], rel=0.1)
