"""`cascade distill`: a student with few steps, its teacher, its checkpoints and its pictures."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from tests.training import forks
from tests.training.runs import curve, experiment, metrics, newest, same_tensors
from tests.training.tiny import TEXT, stage_config, tiny_cascade
from training.cascade import Cascade, bundle
from training.cascade.bundle import collect
from training.cli.compose import load_config
from training.config.experiment import Experiment
from training.config.plain import from_plain
from training.config.unet import for_stage
from training.plan.flops import forward_flops
from training.plan.plan import make_plan
from training.plan.table import table
from training.run.directory import check_same_run
from training.run.starting_weights import begin_with, open_teacher
from training.text.identity import pinned
from training.train import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of two stages with random weights, the teachers."""
    path = str(tmp_path_factory.mktemp("teacher") / "bundle")
    tiny_cascade().save(path)
    return path


def student(directory: Path, shards: str, source: str, stage: str = "base", **changes: Any) -> Experiment:
    """A student with two steps, taught six guided ones."""
    settings = {
        "zero__stage": 0,
        "stage": replace(stage_config("base", 16) if stage == "base" else stage_config("sr", 32, 16)),
        "text__max_tokens": TEXT.max_tokens,
        "distill__teacher": source,
        "distill__steps": 2,
        "distill__teacher_steps": 6,
        "distill__guidance": 2.0,
        "train__steps": 6,
        "ema__decays": [0.5],
        "cluster__gpus": False,
        "cluster__threads": 1,
        **changes,
    }
    return checked(experiment(directory, shards, stage=settings.pop("stage"), **settings))


def checked(config: Experiment) -> Experiment:
    """Checks a config as the command line does."""
    return from_plain(Experiment, asdict(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: str, source: str) -> Experiment:
    """An undisturbed run in this process."""
    config = student(tmp_path_factory.mktemp("whole"), shards, source)
    assert main(config)["complete"]
    return config


def again(config: Experiment, directory: Path) -> Experiment:
    """The same run after three of its six steps, in another directory."""
    shutil.copytree(config.run.dir, directory / "run")
    shutil.rmtree(directory / "run" / "checkpoints" / "step-00000006")
    changed = checked(config)
    changed.run.dir = str(directory / "run")
    return changed


def test_a_resumed_student_is_bit_for_bit_the_same(whole: Experiment, tmp_path: Path) -> None:
    config = again(whole, tmp_path)
    main(config)
    assert curve(config)[-6:] == curve(whole)
    mine, wanted = newest(config), newest(whole)
    assert same_tensors(mine, wanted)
    assert mine.meta["teacher"]["sha256"] == wanted.meta["teacher"]["sha256"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_under_zero_learn_the_same(
    whole: Experiment, tmp_path: Path, shards: str, source: str, stage: int
) -> None:
    config = student(tmp_path, shards, source, zero__stage=stage)
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text
    for mine, wanted in zip(curve(config), curve(whole), strict=True):
        assert mine[:2] == wanted[:2] and mine[2:] == pytest.approx(wanted[2:], rel=1e-4)


def test_super_resolution_on_an_object_store(tmp_path: Path, shards: str, bucket: str) -> None:
    teacher, place = f"s3://{bucket}/teacher", f"s3://{bucket}/student"
    tiny_cascade().save(teacher)
    config = student(
        tmp_path, shards, teacher, "sr", checkpoint__dir=place, validation__every=6,
        validation__samples=8, validation__shards=shards.replace("train", "heldout"),
    )  # fmt: skip
    main(config)
    assert metrics(config)[-1]["validation_loss"] > 0
    found = collect([place]).stages[0]
    assert found.origin["distilled"]["teacher_steps"] == 6 and found.origin["distilled"]["path"] == teacher
    assert (found.config.sampler.steps, found.config.sampler.guidance) == (2, 1.0)


def test_a_run_refuses_another_lesson_or_teacher(whole: Experiment, tmp_path: Path, source: str) -> None:
    for key, value in {"guidance": 3.0, "steps": 3, "teacher_steps": 8, "solver": "ddim"}.items():
        config = again(whole, tmp_path / key)
        setattr(config.distill, key, value)
        with pytest.raises(ConfigError, match=rf"distill\.{key}=.* depend on it"):
            main(checked(config))
    config = again(whole, tmp_path / "threshold")
    config.stage.sampler.threshold = "static"
    with pytest.raises(ConfigError, match=r"stage\.sampler\.threshold=static: .* the teacher's targets depend on it"):
        main(config)

    config = again(whole, tmp_path / "other")
    other = tiny_cascade()
    other.stages[0].unet.conv_out.bias.add_(0.1)
    other.save(str(tmp_path / "changed"))
    config.distill.teacher = str(tmp_path / "changed")
    with pytest.raises(DataError, match="its weights are not those of this run's teacher so far"):
        main(config)
    config.distill.teacher = str(shutil.copytree(source, tmp_path / "moved"))
    assert main(config)["complete"], "the same weights in another place"

    config = student(tmp_path / "size", config.data.shards, source)
    config.stage.image_size = 32
    with pytest.raises(ConfigError, match=r"its stage has stage\.image_size=16, not 32"):
        main(config)


def test_a_plain_run_has_no_lesson_to_keep() -> None:
    """Its sampler may change, and with it the settings that a distillation of it would inherit."""
    before = asdict(Experiment())
    now = asdict(Experiment())
    now["distill"]["guidance"] = now["stage"]["sampler"]["guidance"] = 1.5
    assert check_same_run(before, now, "here") == ["stage.sampler.guidance: 3.0 -> 1.5"]
    now["distill"]["steps"] = 2
    with pytest.raises(ConfigError, match=r"distill\.\w+=.*: here was made with"):
        check_same_run(before, now, "here")
    del before["distill"]
    now["distill"]["steps"] = 0
    assert check_same_run(before, now, "a run of an earlier version")


def test_a_distilled_stage_is_drawn_as_it_was_taught(whole: Experiment, tmp_path: Path, source: str) -> None:
    path = str(tmp_path / "bundle")
    stages = [collect([whole.run.dir]).stages[0], bundle.read(source).stages[1]]
    bundle.write(path, bundle.Bundle(bundle.read(source).text, stages))
    cascade = Cascade.from_pretrained(path)
    taught = cascade.stages[0].origin["distilled"]
    assert {"steps": 2, "guidance": 2.0, "teacher_steps": 6, "solver": "dpmpp_2m"}.items() <= taught.items()
    assert cascade.stages[0].config.sampler.name == "ddim"
    counted: list[str] = []
    cascade.generate("a red circle", callback=lambda stage, done, total: counted.append(stage))
    assert counted.count("base") == 2 and counted.count("sr") == 3
    for word, value in {"guidance": 4.0, "steps": 3, "sampler": "heun", "spacing": "log_snr"}.items():
        with pytest.raises(ConfigError, match=rf"^{word}=.*: base is distilled to 2 steps with guidance 2 in its"):
            cascade.generate("a red circle", **{word: value})
    assert cascade.generate("a red circle", guidance={"sr": 3.0}), "the other stage still has a choice"
    with pytest.raises(ConfigError, match=r"strength=0\.5: base is distilled"):
        cascade.generate("a red circle", image=cascade.generate("a red circle")[0], strength=0.5)
    with pytest.raises(ConfigError, match=r"negative_prompts: no stage drawn has guidance"):
        cascade.generate("a red circle", "a blue square", stages=1)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert (
        f"\nbase is distilled to 2 steps with guidance 2 in its weights, from weights with SHA-256 {taught['sha256']}"
        in card
    )
    cascade.save(str(tmp_path / "saved"))
    assert Cascade.from_pretrained(str(tmp_path / "saved")).stages[0].origin["distilled"] == taught


def test_a_student_teaches_only_its_own_steps(
    whole: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"distill__teacher": whole.run.dir, "distill__steps": 1, "distill__teacher_steps": 2}
    given["text__sha"] = pinned(whole.text).sha
    own = given | {"distill__guidance": 1.0, "distill__solver": "ddim"}
    for key, value in {"teacher_steps": 6, "guidance": 2.0, "solver": "dpmpp_2m"}.items():
        config = student(tmp_path, whole.data.shards, "", **own | {f"distill__{key}": value})
        with pytest.raises(ConfigError, match=rf"^distill\.{key}=.*: base is distilled to 2 steps .* so it must be"):
            open_teacher(config, None)
    config = student(tmp_path, whole.data.shards, "", **own)
    teacher = open_teacher(config, None)
    again = student(tmp_path, whole.data.shards, "", **own | {"distill__guidance": 2.0})
    assert open_teacher(again, teacher.record).record == teacher.record, "a run that has begun goes on"
    config.distill.steps, config.train.init_from = 0, whole.run.dir
    begin_with(teacher.unet, config, None)
    assert "they are distilled to 2 steps; this training makes an ordinary stage of them" in caplog.text


def test_the_plan_counts_the_teacher(tmp_path: Path) -> None:
    tiny = ["experiment=demo", "stage=demo_base", "stage.model.preset=tiny_base"]
    words = [*tiny, f"run={tmp_path}", "gpu=h100", "data.shards=null"]
    config = load_config("plan", [*words, "distill.steps=4"])
    taught = make_plan(config)  # type: ignore[arg-type]
    once = forward_flops(for_stage(config.stage, config.text.dim), 16, config.text.max_tokens)
    assert taught["teacher_passes"] == 10, "five steps, two passes each"
    assert taught["flops_per_image"] == 13 * once
    assert taught["memory"]["teacher"] == 4 * taught["parameters"]
    assert "10 of them by the teacher" in " ".join(table(taught).split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("distill stage.sampler.guidance=3", r"stage\.sampler\.guidance: cascade distill would not use it"),
        ("train distill.steps=2", r"distill\.steps: cascade train would not use it; it is a setting of distill"),
        ("distill distill.steps=0", r"distill\.steps=0: set the number of sampling steps"),
        ("distill distill.solver=heun", r"distill\.solver=heun: it must be ddim or dpmpp_2m"),
        ("distill distill.teacher_steps=2", r"distill\.teacher_steps=2: the teacher needs at least as many steps"),
        ("distill distill.teacher=null", r"distill\.teacher: set it to the run"),
        ("distill distill.teacher=a run=a", r"run\.dir=a: this is the teacher's run"),
        ("distill stage.diffusion.parametrization=eps", "a student of few steps starts from pure noise"),
    ],
)
def test_a_lesson_that_cannot_be_taught_is_refused(line: str, sentence: str) -> None:
    verb, *words = line.split()
    with pytest.raises(ConfigError, match=sentence):
        load_config(verb, ["stage=demo_base", "data.shards=x", *words])


def test_the_students_settings_follow_the_experiment() -> None:
    config = load_config("distill", ["experiment=demo", "stage=demo_sr", "distill.steps=2"])
    assert config.run.dir == "runs/demo/demo_sr_2steps" and config.distill.teacher == "runs/demo/demo_sr"
    assert (config.distill.teacher_steps, config.distill.guidance, config.distill.solver) == (10, 1.0, "dpmpp_2m")
    student, teacher = config.stage.sampler, config.distill.teacher_sampler(config.stage.sampler)
    assert (student.name, student.steps, student.guidance, student.aug_level) == ("ddim", 2, 1.0, 0.02)
    assert (teacher.name, teacher.steps, teacher.guidance, teacher.threshold) == ("dpmpp_2m", 10, 1.0, "static")
    assert checked(config).distill == config.distill and checked(config).stage.sampler == student
    assert np.isclose(load_config("distill", ["stage=demo_base"]).distill.guidance, 1.5)
