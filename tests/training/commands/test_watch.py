"""A run's checkpoints are evaluated once each, newest first; the best is pinned; torn ones are never read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.saved_runs import make_run
from tests.training.tiny import stage_config
from training.checkpoint.store import CheckpointStore
from training.commands import evaluate, watch
from training.config.commands import EvaluateCommand
from training.config.experiment import BundleConfig, ClusterConfig, EvaluationConfig, RunConfig
from training.processes.ranks import Ranks


def command(run: Path, runs: list[str] | None = None, **keys: Any) -> EvaluateCommand:
    return EvaluateCommand(
        run=RunConfig(dir=str(run)),
        bundle=BundleConfig(runs=runs or []),
        cluster=ClusterConfig(gpus=False),
        evaluation=EvaluationConfig(samples=6, psnr_samples=0),
        watch=True,
        **keys,
    )


def test_each_checkpoint_is_evaluated_once_and_the_best_is_never_pruned(tmp_path: Path, capsys) -> None:
    run = tmp_path / "base"
    make_run(run, stage_config("base", 32), steps=(5, 9, 1000))
    torn = run / "checkpoints" / "step-00001001"
    torn.mkdir()
    (torn / "0.safetensors").write_bytes(b"half")
    series = evaluate.main(command(run))
    assert list(series["steps"]) == [5, 9, 1000] and series["figure"] == "kid.random_filters_64"
    values = {step: figures["kid.random_filters_64"]["value"] for step, figures in series["steps"].items()}
    assert series["best"]["step"] == min(values, key=lambda step: values[step])
    results = sorted((run / "evaluations").glob("step-*/result.json"), key=lambda file: file.stat().st_mtime_ns)
    assert [file.parent.name for file in results] == ["step-00001000", "step-00000009", "step-00000005"]
    page = (run / "evaluations" / "report.html").read_text()
    assert page.count("<polyline") == len(series["steps"][5]) and "Best by kid.random_filters_64" in page
    drawn = {file: file.stat().st_mtime_ns for file in results}
    again = evaluate.main(command(run))
    assert drawn == {file: file.stat().st_mtime_ns for file in results} and again["best"] == series["best"]
    store = CheckpointStore(str(run / "checkpoints"))
    assert store.pinned() == {series["best"]["step"]}
    store.pin([5])
    store.claim(Ranks())
    store.save(1002, {"param/x": torch.zeros(2)}, {"step": 1002}, Ranks())
    store.prune(keep_last=1)
    assert [step for step in store.steps() if store.is_committed(step)] == [1002, 5]
    assert "the run is complete" in capsys.readouterr().out


def test_a_super_resolution_run_is_drawn_behind_the_stages_before_it(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", stage_config("base", 16), steps=(3,))
    sr = make_run(tmp_path / "sr", stage_config("sr", 32, 16), steps=(7, 1000))
    series = evaluate.main(command(tmp_path / "sr", [base, sr], figure="frechet.colour_grid_4x4"))
    result = json.loads((tmp_path / "sr" / "evaluations" / "step-00000007" / "result.json").read_text())
    assert [(s["name"], s["step"]) for s in result["protocol"]["stages"]] == [("base", 3), ("sr", 7)]
    assert series["figure"] == "frechet.colour_grid_4x4"
    with pytest.raises(ConfigError, match=r"figure=nothing: the results have samples\.background"):
        watch.write_series(tmp_path / "sr" / "evaluations", "nothing")
    make_run(tmp_path / "other", stage_config("sr", 32, 16), steps=(7,))
    with pytest.raises(ConfigError, match=r"bundle\.runs: .*other is not among them"):
        evaluate.main(command(tmp_path / "other", [base]))


def test_it_waits_for_the_stages_before(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    make_run(tmp_path / "sr", stage_config("sr", 32, 16), steps=(7,))
    runs = [str(tmp_path / "base"), str(tmp_path / "sr")]
    with pytest.raises(DataError, match="no new checkpoint"):
        evaluate.main(command(tmp_path / "sr", runs, wait_s=0.1))


def test_it_begins_before_the_run(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "base"
    (run / "launch").mkdir(parents=True)

    def begin(_: float) -> None:
        shutil.rmtree(run)
        make_run(run, stage_config("base", 32), steps=(1000,))

    monkeypatch.setattr(watch.time, "sleep", begin)
    assert evaluate.main(command(run))["best"]["step"] == 1000


def test_a_run_that_does_not_go_on_is_given_up(tmp_path: Path, monkeypatch) -> None:
    make_run(tmp_path / "base", stage_config("base", 32), steps=(5,))
    with pytest.raises(
        DataError, match=r"no new checkpoint for wait_s=0\.1 seconds, and the run is at step 5, not complete"
    ):
        evaluate.main(command(tmp_path / "base", wait_s=0.1))
    with pytest.raises(ConfigError, match="watch=true: it belongs to action=evaluate"):
        command(tmp_path, action="compare", results=["a", "b"])
