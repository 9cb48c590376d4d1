"""A run's checkpoints are evaluated once each, newest first; the best is pinned; incomplete ones are never read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.saved_runs import make_run
from tests.training.tiny import stage_config
from tests.training.wandb_files import read_wandb
from training.checkpoint.store import CheckpointStore
from training.commands import evaluate, watch
from training.commands.bisect import bisect, first_bad
from training.config.commands import EvaluateCommand
from training.config.experiment import BundleConfig, ClusterConfig, EvaluationConfig, RunConfig
from training.evaluation.comparison import FORMAT, write_influences
from training.evaluation.metrics.figure import Figure
from training.evaluation.series import best_so_far, evaluation_place, is_worse, turned_worse, write_series
from training.processes.ranks import Ranks
from training.run.directory import RunDir


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
    make_run(run, stage_config("base", 32), steps=(5, 9, 1000), wandb="offline")
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
    printed = capsys.readouterr().out
    assert "the run is complete" in printed
    assert printed.count("is the best of") == len(results), "after each evaluation, not again at the end"
    logged = [values for _, values in read_wandb(RunDir(command(run))) if "checkpoint/step" in values]
    assert [values["checkpoint/step"] for values in logged] == [5, 9, 1000], "once, over both starts of watch"
    best = logged[[5, 9, 1000].index(series["best"]["step"])]
    assert best["checkpoint/kid/random_filters_64"] == series["best"]["value"]
    low, high = (best[f"checkpoint/kid/random_filters_64/{end}"] for end in ("low", "high"))
    assert [low, high] == series["best"]["interval"]


def write_result(place: Path, values: np.ndarray) -> None:
    """A result with one figure, `kid.x`, the mean of the values."""
    place.mkdir(parents=True)
    figure = Figure.mean(values)
    result = {"format": FORMAT, "n": {"samples": len(values)}, "kid": {"x": figure.as_dict()}, "protocol": {}}
    (place / "result.json").write_text(json.dumps(result))
    write_influences(place, {"kid.x": figure}, np.arange(len(values)))


def test_a_run_is_getting_worse_when_its_newest_checkpoints_are(tmp_path: Path) -> None:
    output = tmp_path / "evaluations"
    pictures = np.random.default_rng(0).normal(size=40)
    for step, worse in ((5, 0.0), (9, 0.0), (12, 0.3), (15, 0.001), (20, 0.4), (25, 0.5)):
        own = np.random.default_rng(step).normal(size=40) * 0.1
        write_result(evaluation_place(output, step), pictures + own + worse)
    write_result(evaluation_place(output, 3), pictures[:30] - 1)
    series = write_series(output, "")
    assert series["best"]["step"] in (5, 9, 15) and is_worse(output, 5, 20, "kid.x")
    assert sorted([series["best"]["step"], *series["tied"]]) == [5, 9, 15]
    other = "step-00000025 and step-00000003 cannot be compared: n.samples is 40 in the first and 30 in the second"
    assert series["left_out"] == {3: other} and f"left out: {other}; delete the older" in best_so_far(series)
    assert not is_worse(output, 5, 15, "kid.x") and not is_worse(output, 20, 5, "kid.x")
    assert not turned_worse(output, series, 4), "the fourth newest is not worse by more than chance"
    assert turned_worse(output, series, 2).startswith("kid.x was ")


def test_the_training_is_informed_by_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    run, output = tmp_path / "base", tmp_path / "base" / "evaluations"
    make_run(run, stage_config("base", 32), steps=(5, 9, 12))
    pictures = np.random.default_rng(0).normal(size=40)
    worse = {5: 0.0, 9: 0.5, 12: 0.6}

    def evaluated(_config: EvaluateCommand, _runs: list[str], place: Path) -> None:
        write_result(place, pictures + worse[int(place.name[-2:])])

    found = watch.watch(command(run, stop_after=2, figure="kid.x"), evaluated)
    assert found["best"]["step"] == 5 and sorted(found["steps"]) == [5, 9, 12]
    reason = RunDir(command(run)).asked_to_stop()
    assert reason.startswith("kid.x was ") and "at step 5" in reason and "at step 12" in reason
    printed = capsys.readouterr().out
    assert "asking the run to stop" in printed and f"{output / 'report.html'}: the run was asked to stop" in printed


def test_bisection_finds_the_step(tmp_path: Path) -> None:
    run = tmp_path / "base"
    steps = (5, 9, 12, 15, 20, 25, 30)
    make_run(run, stage_config("base", 32), steps=steps)
    pictures = np.random.default_rng(0).normal(size=40)

    def evaluated(_config: EvaluateCommand, _runs: list[str], place: Path) -> None:
        write_result(place, pictures + (0.5 if int(place.name[-2:]) >= 15 else 0.0))

    config = replace(command(run), watch=False, action="bisect")
    found = bisect(config, evaluated)
    assert (found["figure"], found["good"], found["bad"]) == ("kid.x", 12, 15)
    assert len(found["evaluated"]) == 5 < len(steps), "log2(n) + 2"
    assert bisect(replace(config, steps_between=[5, 12]), evaluated)["bad"] is None
    with pytest.raises(ConfigError, match=r"steps_between=\[5, 6\]: give a good .* checkpoints are \[5, 9"):
        bisect(replace(config, steps_between=[5, 6]), evaluated)
    assert first_bad([1, 2], lambda step: True) == (1, 2)


def test_bisection_with_real_checkpoints(tmp_path: Path) -> None:
    make_run(tmp_path / "base", stage_config("base", 32), steps=(5, 9))
    config = replace(command(tmp_path / "base"), watch=False, action="bisect", figure="frechet.colour_grid_4x4")
    found = evaluate.main(config)
    assert found["evaluated"] == [5, 9] and (found["good"], found["bad"]) in ((9, None), (5, 9))
    page = (tmp_path / "base" / "evaluations" / "report.html").read_text()
    assert page.count("<th>step 5</th><th>step 9</th>") == 1 and page.count("data:image/png") == 12, "side by side"


def test_a_super_resolution_run_is_drawn_after_the_stages_before_it(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", stage_config("base", 16), steps=(3,))
    sr = make_run(tmp_path / "sr", stage_config("sr", 32, 16), steps=(7, 1000))
    series = evaluate.main(command(tmp_path / "sr", [base, sr], figure="frechet.colour_grid_4x4"))
    result = json.loads((tmp_path / "sr" / "evaluations" / "step-00000007" / "result.json").read_text())
    assert [(s["name"], s["step"]) for s in result["protocol"]["stages"]] == [("base", 3), ("sr", 7)]
    assert series["figure"] == "frechet.colour_grid_4x4"
    with pytest.raises(ConfigError, match=r"figure=nothing: the results have samples\.background"):
        write_series(tmp_path / "sr" / "evaluations", "nothing")
    make_run(tmp_path / "other", stage_config("sr", 32, 16), steps=(7,))
    with pytest.raises(ConfigError, match=r"bundle\.runs: .*other is not listed"):
        evaluate.main(command(tmp_path / "other", [base]))


def test_a_run_that_has_been_extended_is_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "base"
    make_run(run, stage_config("base", 32), steps=(1000,))
    extended = command(run, wait_s=0.1)
    extended.train.steps = 2000
    RunDir(extended).write_config(extended)
    evaluated = []

    def evaluate_one(_config: EvaluateCommand, _runs: list[str], place: Path) -> None:
        evaluated.append(place.name)
        write_result(place, np.zeros(4))

    with pytest.raises(DataError, match=r"no new checkpoint for wait_s=0\.1 seconds, .* step 1000, not complete"):
        watch.watch(extended, evaluate_one)
    assert evaluated == ["step-00001000"]


def test_watching_waits_for_the_earlier_stages(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    make_run(tmp_path / "sr", stage_config("sr", 32, 16), steps=(1000,))
    runs = [str(tmp_path / "base"), str(tmp_path / "sr")]
    with pytest.raises(DataError, match=r"a stage before .*sr had no checkpoint within wait_s=0\.1 seconds"):
        evaluate.main(command(tmp_path / "sr", runs, wait_s=0.1))  # complete, but not evaluated


def test_watching_may_begin_before_the_run(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "base"
    (run / "launch").mkdir(parents=True)

    def begin(_: float) -> None:
        shutil.rmtree(run)
        make_run(run, stage_config("base", 32), steps=(1000,))

    monkeypatch.setattr(watch.time, "sleep", begin)
    assert evaluate.main(command(run))["best"]["step"] == 1000


def test_a_run_without_progress_is_given_up(tmp_path: Path, monkeypatch) -> None:
    make_run(tmp_path / "base", stage_config("base", 32), steps=(5,))
    with pytest.raises(
        DataError, match=r"no new checkpoint for wait_s=0\.1 seconds, and the run is at step 5, not complete"
    ):
        evaluate.main(command(tmp_path / "base", wait_s=0.1))
    with pytest.raises(ConfigError, match="watch=true: it belongs to action=evaluate"):
        command(tmp_path, action="compare", results=["a", "b"])


@pytest.mark.parametrize(("mode", "expected"), [("online", ["sleep", "log"]), ("offline", ["log", "sleep"])])
def test_online_figures_wait_for_the_end_of_the_training(
    tmp_path: Path, monkeypatch, mode: str, expected: list[str]
) -> None:
    """Two processes that write to one W&B run at the same time would replace each other's rows."""
    make_run(tmp_path / "base", stage_config("base", 32), steps=(5,), wandb=mode)
    events: list[str] = []

    class Clock:
        """A clock that only `sleep` advances."""

        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            events.append("sleep")
            self.now += seconds

    monkeypatch.setattr(watch, "time", Clock())
    monkeypatch.setattr(watch, "log_checkpoints", lambda *_: events.append("log") or True)
    with pytest.raises(DataError, match="no new checkpoint for"):
        evaluate.main(command(tmp_path / "base", wait_s=60))
    assert list(dict.fromkeys(events)) == expected and events.count("log") == 1
