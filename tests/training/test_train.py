"""Whole runs: real loader, real U-Net, real DeepSpeed in two processes."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import forks
from tests.training.runs import ONE_LEVEL, STEPS, chaos, curve, experiment, metrics, newest, same_tensors, store
from training.checkpoint.store import CheckpointStore
from training.config.experiment import Experiment, ProfileConfig
from training.train import main, objective


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Experiment:
    """An undisturbed run in two processes."""
    config = experiment(tmp_path_factory.mktemp("whole"), shards, train__sample_every=5, data__own_process=True)
    running = forks.start(config, 2)
    assert running.codes() == [0, 0], running.text
    result = json.loads(running.result.read_text())
    assert result["step"] == STEPS and result["complete"]
    return config


def test_the_run_directory_explains_itself(whole: Experiment) -> None:
    run = Path(whole.run.dir)
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["position"] for line in lines] == [8 * step for step in range(1, STEPS + 1)]
    named = {
        "loss",
        "grad_norm",
        "lr",
        "images_per_second",
        "data_wait",
        "skipped",
        "device_hours",
        "param_norm",
        "bad",
    }
    assert named <= set(lines[-1])
    assert any(key.startswith("loss_t/") for key in lines[-1]), "loss by noise level"
    hours = [line["device_hours"] for line in lines]
    assert hours == sorted(hours) and hours[0] > 0
    code = json.loads((run / "code.json").read_text())
    assert {"commit", "versions", "starts"} <= set(code) and code["starts"][0]["world_size"] == 2
    assert (run / "config.yaml").read_text().count("tiny_base") == 1
    assert sorted(path.name for path in (run / "logs").glob("rank-*.log")) == ["rank-0.log", "rank-1.log"]
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000005.png", "step-00000010.png"]
    assert store(whole).steps() == [10, 9], "keep_last=2"
    meta = newest(whole).meta
    assert (meta["step"], meta["position"], meta["updates"]) == (STEPS, STEPS * 8, STEPS)
    assert meta["config"]["text"]["sha"].endswith("-words")
    assert meta["config"]["stage"]["model"]["preset"] == "tiny_base" and meta["data"]["position"] == STEPS * 8


def test_progress_reads_well_in_a_log(whole: Experiment) -> None:
    log = next(Path(whole.run.dir).parent.glob("forks-*/output")).read_text()
    made = [f"{whole.run.dir}: complete, all {STEPS} steps are done; checkpoint {store(whole).folder}/step-00000010"]
    assert log.splitlines()[-2:] == [*made, f"samples: {whole.run.dir}/samples/step-00000010.png"]
    assert log.count("step 10/10 [####################] 100%") == 1, "only rank 0 speaks"
    assert "images/s" in log and "left" in log and "\r" not in log


def test_a_complete_run_reports_that_it_is_complete(whole: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(whole)["complete"]
    said = capsys.readouterr().out
    assert f"complete, all {STEPS} steps are done" in said
    assert said.splitlines()[-1] == f"samples: {whole.run.dir}/samples/step-00000010.png", "in no bundle"


def test_a_finished_training_names_the_next_command(
    whole: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sr = whole.run.dir, f"{whole.run.dir}-sr/other"
    config = replace(whole, stage=replace(whole.stage, name=Path(base).name), run=replace(whole.run, name="mine"))
    config.bundle = replace(whole.bundle, runs=[base, sr])
    assert next_step(config, capsys) == "next: cascade train experiment=mine stage=other"
    Path(sr).mkdir(parents=True)
    Path(sr, "config.yaml").write_text("")
    assert next_step(config, capsys) == "next: cascade bundle experiment=mine"
    typed = ["--config-dir", "my conf", "experiment=photos", "run.name=mine", "data.shards=a b/*.tar", "train.steps=1"]
    monkeypatch.setattr(sys, "argv", ["cascade", "train", *typed])
    words = "'--config-dir=my conf' experiment=photos run.name=mine"
    assert next_step(config, capsys) == f"next: cascade bundle {words}", "what the next command needs of those typed"
    Path(sr, "config.yaml").unlink()
    assert next_step(config, capsys) == f"next: cascade train {words} 'data.shards=a b/*.tar' stage=other"


def next_step(config: Experiment, capsys: pytest.CaptureFixture[str]) -> str:
    main(config)
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "events",
    [
        [{"what": "kill", "rank": 1, "step": 7}],
        [{"what": "kill", "rank": 0, "step": 7}, {"what": "kill", "rank": 1, "step": 7}],
        [{"what": "write", "rank": 0, "step": 6}],
        [{"what": "write", "rank": 1, "step": 6}],
    ],
    ids=["one rank", "all ranks", "rank 0 inside a write", "rank 1 inside a write"],
)
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    whole: Experiment, tmp_path: Path, shards: str, events: list[dict[str, Any]]
) -> None:
    config = experiment(tmp_path, shards)
    assert -signal.SIGKILL in chaos(config, 2, *events).codes(grace_s=2)
    assert store(config).newest_whole() in (3, 6), "the last checkpoint before the crash is there"
    again = forks.start(config, 2)
    assert again.codes() == [0, 0], again.text
    assert "resuming from step" in again.text
    assert curve(config) == curve(whole)
    assert same_tensors(newest(config), newest(whole))


def test_any_number_of_ranks_and_any_zero_stage_resume(whole: Experiment, tmp_path: Path, shards: str) -> None:
    """2 ranks ZeRO 3 -> 1 rank plain -> 2 ranks ZeRO 2, stopped by signals that one rank alone received."""
    config = experiment(tmp_path, shards, zero__stage=3)
    first = chaos(config, 2, {"what": "sigterm", "rank": 1, "step": 3})
    assert first.codes() == [75, 75]
    assert "stopped by SIGTERM after step 4; everything is saved" in first.text
    config.zero.stage = 0
    second = chaos(config, 1, {"what": "sigusr1", "rank": 0, "step": 6})
    assert second.codes() == [75]
    assert "changed since: zero.stage: 3 -> 0" in second.text
    config.zero.stage, config.data.micro_batch = 2, 2
    third = forks.start(config, 2)
    assert third.codes() == [0, 0], third.text
    for mine, wanted in zip(curve(config), curve(whole), strict=True):
        assert mine[:2] == wanted[:2]
        assert mine[2:] == pytest.approx(wanted[2:], rel=1e-5)


def test_ctrl_c_saves_and_stops(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, zero__stage=0)
    running = chaos(config, 1, {"what": "sigint", "rank": 0, "step": 2})
    assert running.codes() == [130]
    assert newest(config).step == 3


def test_a_damaged_checkpoint_is_skipped(whole: Experiment, tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=6, zero__stage=0, optimizer__decay="constant")
    assert forks.start(config).codes() == [0]
    file = next((Path(config.run.dir) / "checkpoints" / "step-00000006").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    config.train.steps = 7
    again = forks.start(config)
    assert again.codes() == [0], again.text
    assert "step-00000006" in again.text and "bytes instead of" in again.text and "resuming from step 3" in again.text
    assert [line["step"] for line in metrics(config)] == list(range(1, 8)), "every step stands there once"


def test_a_change_that_breaks_resume_is_refused(whole: Experiment, shards: str) -> None:
    for change in (
        {"seed": 1},
        {"stage__model__preset": "demo_base"},
        {"data__global_batch": 16},
        {"text__sha": "abc"},
    ):
        config = experiment(Path(whole.run.dir).parent, shards, train__steps=STEPS + 1, **change)
        running = forks.start(config)
        assert running.codes() == [2]
        (key,) = change
        assert f"{key.replace('__', '.')}={next(iter(change.values()))}" in running.text
        assert "Traceback" not in running.text


def test_a_gradient_that_is_not_finite_is_skipped_and_named(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=4)
    running = chaos(config, 2, {"what": "nan", "rank": 1, "step": 2})
    assert running.codes() == [0, 0], running.text
    assert "step 2 was skipped" in running.text
    assert "step 2: samples of this rank: " in (Path(config.run.dir) / "logs" / "rank-1.log").read_text()
    lines = metrics(config)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None and lines[2]["loss"] is not None
    assert newest(config).meta["updates"] == 3


def test_too_many_skipped_steps_roll_back_and_continue(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, zero__stage=1, train__max_skipped=2, checkpoint__every=4, train__steps=12)
    events = [{"what": "nan", "rank": rank, "step": step} for rank in (0, 1) for step in (6, 7)]
    running = chaos(config, 2, *events)
    assert running.codes() == [0, 0], running.text
    assert "rolled back to the weights of step 4; training continues with step 8" in running.text
    meta = newest(config).meta
    assert (meta["position"], meta["updates"]) == (96, 4 + 5), "no step of the data is taken twice"
    assert meta["counters"] == {"skipped": 2, "rollbacks": 0}


def test_a_streak_of_skipped_steps_outlives_a_kill(tmp_path: Path, shards: str) -> None:
    """Killed after two of three refused steps: the next start rolls back where the run that was not killed does."""
    nans = [{"what": "nan", "rank": 0, "step": step} for step in (3, 4, 5)]
    curves, lines = [], []
    for name, kill in (("whole", []), ("killed", [{"what": "kill", "rank": 0, "step": 5}])):
        config = experiment(
            tmp_path / name, shards, zero__stage=0, train__max_skipped=3, checkpoint__every=2,
            checkpoint__background=False,
        )  # fmt: skip
        config.run.dir = str(tmp_path / name / "run")
        Path(config.run.dir).mkdir(parents=True)
        if kill:
            assert chaos(config, 1, *nans, *kill).codes() == [-9]
            assert newest(config).step == 4 and newest(config).meta["refused"] == 2
        running = chaos(config, 1, *nans)
        assert running.codes() == [0], running.text
        assert "rolled back to the weights of step 2; training continues with step 6" in running.text
        curves.append(curve(config))
        lines.append([line["rollbacks"] for line in metrics(config)])
    assert curves[0] == curves[1]
    assert lines[0] == lines[1] == [0] * 5 + [1] * 5, "all of the run, also after the next healthy checkpoint"


def test_rolling_back_in_vain_ends_the_run(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, zero__stage=0, train__max_skipped=2)
    running = chaos(config, 1, *({"what": "nan", "rank": 0, "step": step} for step in range(5, 10)))
    assert running.codes() == [76]
    assert "even after rolling back to the checkpoint of step 3" in running.text
    again = chaos(config, 1)
    assert again.codes() == [0], "a restart tries again from the newest checkpoint"


def test_a_run_without_a_checkpoint_to_roll_back_to_ends(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, zero__stage=0, train__max_skipped=1)
    running = chaos(config, 1, {"what": "nan", "rank": 0, "step": 1})
    assert running.codes() == [76]
    assert "there is no checkpoint to roll back to" in running.text


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_a_spike_is_not_applied(tmp_path: Path, shards: str, stage: int, ranks: int) -> None:
    """The step is refused although its gradient is finite, and the next one is as if it had not been."""
    config = experiment(
        tmp_path, shards, zero__stage=stage, train__steps=20, data__micro_batch=2, stage__model__overrides=ONE_LEVEL
    )
    running = chaos(config, ranks, *({"what": "spike", "rank": rank, "step": 18} for rank in range(ranks)))
    assert running.codes() == [0] * ranks, running.text
    assert "step 18 was skipped: its loss" in running.text and "times the median" in running.text
    lines = metrics(config)
    assert lines[17]["grad_norm"] is None and lines[19]["skipped"] == 1
    assert newest(config).meta["updates"] == 19
    before, after = lines[16]["param_norm"], lines[17]["param_norm"]
    assert before == after != lines[18]["param_norm"]


def test_data_that_breaks_on_one_rank_stops_all_after_saving(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards)
    running = chaos(config, 2, {"what": "data", "rank": 1, "step": 5})
    assert running.codes() == [2, 2]
    assert "the shard is gone" in running.text and "Traceback" not in running.text
    assert newest(config).step == 4 and newest(config).meta["healthy"]
    log = (Path(config.run.dir) / "logs/rank-1.log").read_text()
    assert "ends with code 2" in log and "DataError: the shard is gone" in log
    assert chaos(config, 2).codes() == [0, 0]
    assert metrics(config)[-1]["position"] == STEPS * 8


def test_validation_and_evaluation_are_the_same_on_any_number_of_ranks(tmp_path: Path, shards: str) -> None:
    """The second run is stopped when they are due for the first time, and makes up for them after the restart."""
    results, figures = [], []
    for ranks, stage in ((1, 0), (2, 3)):
        config = experiment(
            tmp_path / str(ranks), shards, zero__stage=stage, train__steps=4, validation__every=2,
            validation__samples=8, evaluation__reference=shards.replace("train", "heldout"), checkpoint__every=2,
            checkpoint__keep_last=1, train__log_every=3, evaluation__every=2, evaluation__samples=7,
            evaluation__batch=3, train__profile=ProfileConfig([3, 4]), stage__sampler__steps=4,
            stage__model__overrides=ONE_LEVEL, train__sample_every=2,
        )  # fmt: skip
        (tmp_path / str(ranks)).mkdir()
        if ranks == 2:
            stopped = chaos(config, ranks, {"what": "stop", "rank": 1, "phase": "forward", "step": 1})
            assert stopped.codes() == [75, 75] and newest(config).step == 2 and not metrics(config)
        running = forks.start(config, ranks)
        assert running.codes() == [0] * ranks, running.text
        lines = metrics(config)
        assert [line["step"] for line in lines] == [2, 3, 4]
        grids = sorted(path.name for path in (Path(config.run.dir) / "samples").iterdir())
        assert grids == ["step-00000002.png", "step-00000004.png"]
        traces = sorted((Path(config.run.dir) / "profile").iterdir())
        assert [path.name for path in traces] == [f"steps-3-4-rank-{rank}.json.gz" for rank in range(ranks)]
        events = json.loads(gzip.decompress(traces[-1].read_bytes()))["traceEvents"]
        names = [event.get("name", "") for event in events]
        assert names.count("aten::conv2d") > 2 and (ranks == 1) != any("gloo" in name for name in names)
        results.append([(line["validation_loss"], line["validation_loss_ema"]) for line in (lines[0], lines[2])])
        for step, line in ((2, lines[0]), (4, lines[2])):
            singles = json.loads((Path(config.run.dir) / f"validation/step-{step:08d}.json").read_text())["loss"]
            assert len(singles) == 8 and sum(singles) / 8 == pytest.approx(line["validation_loss_ema"], rel=1e-6)
            levels = [value for name, value in line.items() if name.startswith("validation_t/")]
            assert len(levels) == 5 and min(levels) <= line["validation_loss_ema"] <= max(levels)
        figures.append({key: value for key, value in lines[2].items() if key.startswith("evaluation/")})
        assert lines[0]["evaluation/kid/colour_grid_4x4"] != lines[2]["evaluation/kid/colour_grid_4x4"]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    assert results[0][0][0] != results[0][0][1], "raw and averaged weights differ"
    assert figures[0] == pytest.approx(figures[1], rel=0.02, abs=1e-3)
    assert {"evaluation/frechet/random_filters_64", "evaluation/kid/colour_grid_4x4/plus_minus"} < set(figures[0])


def test_validation_without_held_out_data_is_refused(tmp_path: Path, shards: str) -> None:
    running = forks.start(experiment(tmp_path, shards, validation__every=2), 2)
    assert running.codes() == [2, 2]
    assert "validation.shards" in running.text
    assert not (tmp_path / "run").exists(), "a start that was refused leaves nothing"


def test_a_run_begins_with_the_weights_of_another(whole: Experiment, tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, zero__stage=0, train__steps=1, train__init_from=whole.run.dir)
    config.optimizer.lr = 1e-12
    running = forks.start(config)
    assert running.codes() == [0], running.text
    assert f"starting from the weights of {whole.run.dir}" in running.text
    mine, theirs = newest(config), newest(whole)
    name = "conv_out.weight"
    assert torch.allclose(mine.read(f"param/{name}"), theirs.read(f"ema/0/{name}"), atol=1e-6)
    other = experiment(tmp_path / "other", shards, zero__stage=0, train__init_from=whole.run.dir)
    other.stage.model.overrides = {"widths": [32, 64]}
    (tmp_path / "other").mkdir()
    running = forks.start(other)
    assert (
        running.codes() == [2]
        and f"train.init_from={whole.run.dir}: its weights are of a different network" in running.text
    )


def test_missing_weights_are_named(tmp_path: Path, shards: str) -> None:
    running = forks.start(experiment(tmp_path, shards, zero__stage=0, train__init_from="/nowhere"))
    assert running.codes() == [2]
    assert "train.init_from=/nowhere: this is neither a bundle nor a run with a checkpoint" in running.text


def test_super_resolution(tmp_path: Path, shards: str) -> None:
    config = experiment(
        tmp_path, shards, zero__stage=0, train__steps=2, train__sample_every=2, stage__model__preset="tiny_sr",
        stage__image_size=32, stage__low_res_size=8, stage__name="sr",
    )  # fmt: skip
    running = forks.start(config)
    assert running.codes() == [0], running.text
    assert (Path(config.run.dir) / "samples" / "step-00000002.png").exists()


def test_the_launcher_and_the_command_line(tmp_path: Path, shards: str) -> None:
    """`python -m training.train` starts its own processes, and no compiler; SIGTERM to the parent saves, the same
    command resumes."""
    compiler = tmp_path / "programs/gcc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/compiled\nexit 1\n')
    compiler.chmod(0o755)
    environ = {**os.environ, "PATH": f"{compiler.parent}:{os.environ['PATH']}"}
    words = ["stage.model.preset=tiny_base", "text.dim=32", f"data.shards={shards}", "data.global_batch=8"]
    words += [f"run.dir={tmp_path}/run", "train.log_every=1", "train.sample_every=0", "tracking=offline", "json=true"]
    words += ["cluster.processes=2", "cluster.threads=1", "stage.image_size=32", "train.steps=100000"]
    command = [sys.executable, "-m", "training.train", *words]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert started.stdout is not None
    for line in started.stdout:
        if "step      3/" in line:
            started.send_signal(signal.SIGTERM)
            break
    rest = started.stdout.read()
    assert started.wait() == 75, rest
    assert not (tmp_path / "compiled").exists(), (tmp_path / "compiled").read_text()
    assert "stopped by SIGTERM after step" in rest
    step = CheckpointStore(f"{tmp_path}/run/checkpoints").newest_whole()
    words[-1] = f"train.steps={step + 2}"
    done = forks.command(*words, module="training.train")
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {step}" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["step"] == step + 2
    assert not re.search("W&B (is switched off|failed)", rest + done.stdout), "no trouble with it"
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one W&B run over both starts"


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ([{"step": n, "loss": float(n)} for n in range(1, 21)], 19.5),
        ([{"loss": 1.0}, {"validation_loss": 0.5}, {"loss": 0.9}, {"validation_loss": 0.25}, {"loss": 0.8}], 0.25),
        ([{"loss": None}, {"step": 1}], None),
    ],
)
def test_a_sweeper_minimises_the_last_validation_loss(
    tmp_path: Path, lines: list[dict[str, Any]], value: float | None
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert objective({"run_dir": str(tmp_path)}) == value
    assert objective({"run_dir": str(tmp_path / "none")}) is None
