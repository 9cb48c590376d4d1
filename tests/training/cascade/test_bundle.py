"""`cascade bundle`: from run directories to a bundle directory, and the messages when something is missing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.saved_runs import make_run
from tests.training.tiny import random_unet, stage_config
from training.cascade import Cascade, bundle
from training.config.experiment import BundleConfig, Experiment, RunConfig, StageConfig, TextConfig, TrainConfig
from training.model.lora import weights_sha256
from training.run.starting_weights import begin_with


def command(runs: list[str], path: Path) -> Experiment:
    return Experiment(bundle=BundleConfig(runs=runs, dir=str(path)), run=RunConfig(name="demo"))


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [
        make_run(tmp_path / "base", stage_config("base", 16), steps=(5, 9)),
        make_run(tmp_path / "sr", stage_config("sr", 32, 16)),
    ]


def test_bundle_holds_the_averaged_weights_of_the_newest_checkpoints(runs: list[str], tmp_path: Path, capsys) -> None:
    answer = bundle.main(command(runs, tmp_path / "bundle"))
    assert answer["bundle"] == str(tmp_path / "bundle")
    assert [(s["name"], s["origin"]["step"]) for s in answer["stages"]] == [("base", 9), ("sr", 5)]
    assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == [
        "README.md",
        "base.safetensors",
        "bundle.json",
        "sr.safetensors",
    ]
    expected = random_unet(stage_config("base", 16), seed=9).state_dict()
    found = load_file(tmp_path / "bundle" / "base.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    content = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert content["stages"][0]["origin"] == {
        "run": runs[0], "checkpoint": f"{runs[0]}/checkpoints/step-00000009", "step": 9, "position": 576,
        "ema_decay": 0.99, "code": "abc", "text": None,
    }  # fmt: skip
    assert "step 9" in content["index"]["base.safetensors"] and "abc" in content["index"]["base.safetensors"]
    assert content["text"]["dim"] == 32 and content["stages"][1]["config"]["low_res_size"] == 16
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "| sr | 16 -> 32 px |" in card and "Cascade.from_pretrained" in card and "pipeline_tag" in card
    *_, made, further = capsys.readouterr().out.splitlines()
    assert made == f"{tmp_path}/bundle: bundle of 2 stages"
    assert further == f"next: cascade sample experiment=demo bundle.dir={tmp_path}/bundle"
    json.dumps(answer)


def test_the_card_counts_the_licences_of_each_stages_pictures(runs: list[str], tmp_path: Path) -> None:
    bundle.main(command(runs, tmp_path / "bundle"))
    assert "Not recorded for base, sr" in (tmp_path / "bundle" / "README.md").read_text()
    data = {"fingerprint": "f", "licences": {"CC0": 1200, "a|b": 3}}
    runs[1] = make_run(tmp_path / "licensed", stage_config("sr", 32, 16), data=data)
    bundle.main(command(runs, tmp_path / "bundle"))
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Not recorded for base:" in card
    assert "| licence | sr |\n|---|---|\n| CC0 | 1,200 |\n| a\\|b | 3 |\n" in card


def test_a_bundle_draws_what_its_runs_draw(runs: list[str], tmp_path: Path) -> None:
    bundle.main(command(runs, tmp_path / "bundle"))
    a = Cascade.from_pretrained(str(tmp_path / "bundle")).generate("red")[0]
    assert a.size == (32, 32) and a.tobytes() == Cascade.from_runs(runs).generate("red")[0].tobytes()


def test_checkpoints_elsewhere_and_single_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", stage_config("base", 16), steps=(5, 9), checkpoints=tmp_path / "elsewhere")
    for path, step in ((run, 9), (str(tmp_path / "elsewhere"), 9), (str(tmp_path / "elsewhere" / "step-00000005"), 5)):
        assert bundle.collect([path]).stages[0].origin["step"] == step


def test_a_damaged_newest_checkpoint_is_skipped(runs: list[str]) -> None:
    newest = Path(runs[0]) / "checkpoints" / "step-00000009"
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    assert bundle.collect(runs).stages[0].origin["step"] == 5


def test_a_run_without_checkpoint_is_named_with_the_command(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "demo_sr").mkdir()
    for missing in (str(tmp_path / "demo_sr"), str(tmp_path / "absent")):
        with pytest.raises(
            DataError, match=f"{missing} has no checkpoint yet; make one with: cascade train experiment=demo"
        ):
            bundle.main(command([runs[0], missing], tmp_path / "bundle"))


def test_a_failure_leaves_the_old_bundle_alone(runs: list[str], tmp_path: Path) -> None:
    bundle.main(command(runs, tmp_path / "bundle"))
    with pytest.raises(DataError):
        bundle.main(command([runs[0], str(tmp_path / "absent")], tmp_path / "bundle"))
    assert len(bundle.read(str(tmp_path / "bundle")).stages) == 2


def test_adapters_do_not_replace_the_bundle_that_they_are_added_to(runs: list[str], tmp_path: Path) -> None:
    base, tuned = tmp_path / "bundle", tmp_path / "tuned"
    bundle.main(command(runs, base))
    lora = {"path": str(base), "sha256": weights_sha256(bundle.read(str(base)).stages[0].tensors()), "scale": 1.0}
    manifest = Path(runs[0]) / "checkpoints" / "step-00000009" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["meta"]["lora"] = lora
    manifest.write_text(json.dumps({**content, "sha256": ""}))
    with pytest.raises(ConfigError, match=r"the adapters \(lora\) of base are added to the weights in this bundle"):
        bundle.main(command(runs, base))
    bundle.main(command(runs, tuned))
    assert (
        f"base has adapters (LoRA) merged into weights with SHA-256 {lora['sha256']}.\n"
        in (tuned / "README.md").read_text()
    )
    (base / bundle.INDEX).unlink()
    with pytest.raises(DataError, match="are no longer in"):
        bundle.main(command(runs, tuned))
    assert len(bundle.read(str(tuned)).stages) == 2


def test_stages_must_fit(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="base draws from text alone, but sr comes before it; list the stages base first"
    ):
        bundle.collect(runs[::-1])
    with pytest.raises(ConfigError, match="same name"):
        bundle.collect([runs[0], runs[0]])
    made = Cascade.from_runs(runs)
    for stages, words in ((made.stages[::-1], "list the stages base first"), ([], "it has no stages")):
        made.stages = stages
        with pytest.raises(ConfigError, match=words):
            made.save(str(tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(ConfigError, match=r"bundle\.runs: list the run directories"):
        bundle.collect([])


def test_runs_with_different_text_settings_are_refused(runs: list[str], tmp_path: Path) -> None:
    manifest = Path(runs[1]) / "checkpoints" / "step-00000005" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["meta"]["config"]["text"]["max_tokens"] = 99
    manifest.write_text(json.dumps({**content, "sha256": ""}))
    with pytest.raises(ConfigError, match=r"text\.max_tokens=99 but .* with 10"):
        bundle.collect(runs)


def test_weights_for_another_text_encoder_are_accepted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = stage_config("base", 16)
    run = make_run(tmp_path / "r", stage)
    manifest = tmp_path / "r" / "checkpoints" / "step-00000005" / "manifest.json"
    for sha, warned in (("theirs", True), ("mine", False)):
        content = json.loads(manifest.read_text())
        content["meta"]["config"]["text"]["sha"] = sha
        manifest.write_text(json.dumps({**content, "sha256": ""}))
        config = Experiment(stage=stage, text=TextConfig(dim=32, sha="mine"), train=TrainConfig(init_from=run))
        caplog.clear()
        begin_with(random_unet(stage, seed=1), config, None)
        assert ("trained with a different text encoder (text.sha=theirs)" in caplog.text) == warned


def test_weights_of_another_structure_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", stage_config("base", 16))
    manifest = tmp_path / "r" / "checkpoints" / "step-00000005" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["meta"]["config"]["stage"]["model"]["overrides"] = {"widths": [32, 64], "head_dim": 32}
    manifest.write_text(json.dumps({**content, "sha256": ""}))
    with pytest.raises(DataError, match="weights do not fit the U-Net"):
        bundle.collect([run])


def test_damaged_bundles_are_refused(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    bundle.main(command(runs, path))
    good = (path / "bundle.json").read_text()
    content = json.loads(good)
    content["stages"][0]["config"]["colour"] = "blue"
    (path / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bundle\.json: made by another version of this project .*colour"):
        bundle.read(str(path))
    (path / "bundle.json").write_text(json.dumps(json.loads(good) | {"format": 99}))
    with pytest.raises(DataError, match="format 99 is not 1"):
        bundle.read(str(path))
    base, sr = content["stages"]
    base["config"].pop("colour")
    for changed, words in (
        ([], "not the index of a bundle"),
        ({**content, "stages": []}, "no stages"),
        ({**content, "stages": ["a"]}, "or changed"),
        ({**content, "stages": [{**base, "file": "../other/base.safetensors"}, sr]}, "is not a file in this directory"),
        ({**content, "stages": [sr, base]}, "base draws from text alone, but sr comes before it"),
        ({**content, "stages": [{**base, "unet": {**base["unet"], "head_dim": 7}}, sr]}, "head_dim=7"),
    ):
        (path / "bundle.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=words):
            bundle.read(str(path))
    (path / "bundle.json").write_text(good)
    weights = path / "sr.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(DataError, match="does not match its SHA-256"):
        bundle.load_unet(bundle.read(str(path)).stages[1])
    weights.write_bytes(whole)
    with pytest.raises(DataError, match=f"there is one in {path}"):
        bundle.read(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"sr\.safetensors: has \d+ bytes instead of \d+"):
        bundle.read(str(path))
    weights.unlink()
    with pytest.raises(DataError, match="is missing"):
        bundle.read(str(path))


def test_settings_survive_json() -> None:
    config = stage_config("base", 16)
    assert bundle.from_dict(StageConfig, json.loads(json.dumps(asdict(config))), "here") == config
    text = TextConfig(path="/data/${x}")
    assert bundle.from_dict(TextConfig, asdict(text), "here") == text


def test_a_file_that_is_cut_while_its_weights_are_in_use_kills_nobody(runs: list[str], tmp_path: Path) -> None:
    """In a bundle and in a run: weights are read, not mapped from the file."""
    bundle.main(command(runs, tmp_path / "bundle"))
    stages = [*bundle.read(str(tmp_path / "bundle")).stages, *bundle.collect(runs).stages]
    networks = [bundle.load_unet(stage) for stage in stages]
    for file in tmp_path.rglob("*.safetensors"):
        os.truncate(file, 0)
    child = os.fork()
    if child == 0:
        for network in networks:
            for weights in network.parameters():
                weights.numpy().tobytes()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "SIGBUS"


def test_a_checkpoint_without_its_settings_is_named(runs: list[str]) -> None:
    manifest = Path(runs[0]) / "checkpoints" / "step-00000009" / "manifest.json"
    content = json.loads(manifest.read_text())
    for meta, words in (
        ({}, "has no config"),
        ({"config": {"text": 3}}, r"does not contain the settings \(text\)"),
    ):
        manifest.write_text(json.dumps({**content, "meta": meta, "sha256": ""}))
        with pytest.raises(DataError, match=words):
            bundle.collect(runs)
