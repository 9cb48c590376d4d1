from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import yaml

from data_pipeline.common.errors import ConfigError, DataError
from training.checkpoint.provenance import code_version
from training.config.experiment import Experiment
from training.run.directory import RunDir, check_same_run, differences, read_json, to_dict


def changed(**settings: object) -> dict[str, object]:
    config = to_dict(Experiment())
    for key, value in settings.items():
        section = config
        *path, name = key.split("__")
        for part in path:
            section = section[part]
        section[name] = value
    return config


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "stage__image_size",
        "stage__model__preset",
        "stage__diffusion__schedule",
        "text__dim",
        "text__sha",
        "data__window",
    ],
)
def test_changes_that_break_a_run_are_refused_with_their_key(key: str) -> None:
    dotted = key.replace("__", ".")
    with pytest.raises(
        ConfigError, match=rf"{dotted}=7: runs/x was made with {dotted}=.*restore it, or start a new run"
    ):
        check_same_run(to_dict(Experiment()), changed(**{key: 7}), "runs/x")


def test_other_changes_are_reported() -> None:
    found = check_same_run(to_dict(Experiment()), changed(train__steps=7, zero__stage=3, data__shards="s3://b/x"), "x")
    assert found == ["data.shards: null -> s3://b/x", "train.steps: 1000 -> 7", "zero.stage: 1 -> 3"]


def test_the_overrides_of_a_model_count_as_one_setting() -> None:
    """Adding or removing a key changes the network, too."""
    before = changed(stage__model__overrides={"skip_scale": True})
    for now in ({}, {"skip_scale": True, "dropout": 0.5}, {"skip_scale": False}):
        with pytest.raises(ConfigError, match=r"stage\.model\.overrides="):
            check_same_run(before, changed(stage__model__overrides=now), "runs/x")
    less_memory = {"skip_scale": True, "checkpoint_blocks": True}
    assert check_same_run(before, changed(stage__model__overrides=less_memory), "runs/x") == []


def test_damaged_small_files_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "hours.json"
    assert read_json(file) == {}
    for content in ("", "[1]", "{"):
        file.write_text(content)
        assert read_json(file) == {} and f"{file} is damaged" in caplog.text
        caplog.clear()
    file.write_text('{"1": 0.5}')
    assert read_json(file) == {"1": 0.5}


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"reason": ""}', '{"reason": "worse"}'])
def test_any_stop_file_is_a_request(content: str, tmp_path: Path) -> None:
    config = Experiment()
    config.run.dir = str(tmp_path)
    assert RunDir(config).asked_to_stop() == ""
    (tmp_path / "stop.json").write_text(content)
    assert RunDir(config).asked_to_stop() == ("worse" if "worse" in content else "stop.json exists, without a reason")


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    config = Experiment()
    config.run.dir = str(tmp_path / "run")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); choose another run\.dir"):
        RunDir(config).create()


def test_settings_that_one_side_does_not_know() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == [("a.c", None, 2)]
    assert differences({"a": {}}, {"a": {"b": 1}}) == [("a.b", None, 1)], "without a: {} -> None"


def test_small_files(tmp_path: Path) -> None:
    config = Experiment()
    config.run.dir = str(tmp_path / "run")
    run = RunDir(config)
    run.create()
    run.write_config(config)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == to_dict(config)
    code = code_version()
    run.record_start(code, step=0, attempt=1, world_size=2)
    run.record_start(code, step=5, attempt=2, world_size=1)
    content = json.loads((run.path / "code.json").read_text())
    assert [(start["step"], start["attempt"]) for start in content["starts"]] == [(0, 1), (5, 2)]
    assert content["versions"]["deepspeed"] and "commit" in content
    assert run.wandb_id() == run.wandb_id() and len(run.wandb_id()) == 8


def test_a_file_in_place_of_a_directory_is_named(tmp_path: Path) -> None:
    config = Experiment()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, reason in (("file", "there is a file of this name"), ("link", "a link to a place that does not exist")):
        config.run.dir = str(tmp_path / name)
        with pytest.raises(DataError, match=f"cannot be written \\({reason}\\); choose another run.dir"):
            RunDir(config).create()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Experiment()
    config.run.dir = str(tmp_path / "file" / "run")
    with pytest.raises(DataError, match=r"run\.dir=.*cannot be written"):
        RunDir(config).create()
    assert os.listdir(tmp_path) == ["file"]


def run_at(path: Path, **settings: object) -> RunDir:
    config = Experiment()
    config.run.dir = str(path)
    return RunDir(config)


def test_a_copied_run_gets_a_wandb_run_of_its_own_and_a_moved_one_keeps_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = run_at(tmp_path / "a")
    first.create()
    name = first.wandb_id()
    first.record_start(code_version(), step=0, attempt=1, world_size=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = run_at(tmp_path / "b")
    other = copy.wandb_id(saved=name)
    assert other != name and copy.wandb_id(saved=name) == other and first.wandb_id(saved=name) == name
    (tmp_path / "a").rename(tmp_path / "c")
    assert "it continues the same W&B run" not in caplog.text
    assert run_at(tmp_path / "c").wandb_id(saved=name) == name
    assert "it continues the same W&B run; if it is a copy" in caplog.text, "its original may be on another machine"
    (tmp_path / "c" / "wandb_id").write_text("")
    assert run_at(tmp_path / "c").wandb_id(saved=name) == name, "a file that a full disk has left empty"
    fresh = run_at(tmp_path / "d")
    fresh.create()
    assert fresh.wandb_id(saved=name) == name, "a run directory that is lost, with its checkpoints elsewhere"
    part = run_at(tmp_path / "e")
    part.create()
    assert part.wandb_id(saved=name, origin=str(tmp_path / "d")) != name, "only the checkpoints were copied"


def test_changes_since_the_last_start(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    config = Experiment()
    assert run.changes(config) == [], "nothing is recorded"
    config.run.dir = str(tmp_path)
    config.text.sha = "found out"
    run.write_config(config)
    config.text.sha = None
    config.optimizer.lr = 5.0
    assert run.changes(config) == ["optimizer.lr: 0.0001 -> 5.0"]
    config.seed = 3
    with pytest.raises(ConfigError, match=r"seed=3: .* was made with seed=0"):
        run.changes(config)


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    """Not even the parents that it created; what was there before stays."""
    run = run_at(tmp_path / "runs" / "a")
    made = run.create()
    assert made == [str(tmp_path / "runs" / "a"), str(tmp_path / "runs")]
    run.wandb_id()
    for rank in (0, 1):
        run.log_file(rank).touch()
    run.discard(made, rank=1)
    assert run.log_file(0).exists() and not run.log_file(1).exists()
    run.discard(made, rank=0)
    assert list(tmp_path.iterdir()) == []
    assert run.create() == made and run.create() == []
    run.discard([], rank=0)
    (run.path / "config.yaml").touch()
    run.discard(made, rank=0)
    assert (run.path / "logs").exists(), "another start has begun meanwhile"


def test_checkpoints_of_another_run_are_not_resumed(tmp_path: Path) -> None:
    """`checkpoint.dir` in a file that several runs share. Those of a moved run are still its own."""
    config, saved = Experiment(), {"run": {"dir": str(tmp_path / "first")}}
    config.run.dir, config.checkpoint.dir = str(tmp_path / "second"), str(tmp_path / "shared")
    RunDir(config).check_own(saved)
    (tmp_path / "first").mkdir()
    (tmp_path / "first/config.yaml").touch()
    with pytest.raises(ConfigError, match=r"checkpoint.dir=.*shared: it holds the checkpoints of another run, .*first"):
        RunDir(config).check_own(saved)
    config.run.dir = str(tmp_path / "first")
    RunDir(config).check_own({"run": {"dir": "elsewhere"}})
    RunDir(config).check_own(saved)


def test_a_link_to_a_disk_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    config = Experiment()
    config.run.dir = str(tmp_path)
    (tmp_path / "checkpoints").symlink_to("/mnt/none/ck")
    with pytest.raises(DataError, match=r"checkpoint.dir=.*checkpoints: a link to /mnt/none/ck, which does not exist"):
        RunDir(config).create()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_an_unreadable_request_to_stop_is_read_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system fails for a moment: the next step looks again."""

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    config = Experiment()
    config.run.dir = str(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", stale)
        assert RunDir(config).asked_to_stop() == ""
    RunDir(config).ask_to_stop("enough")
    assert RunDir(config).asked_to_stop() == "enough"
