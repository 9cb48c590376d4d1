"""`cascade evaluate watch=true run=DIR`: evaluates each committed checkpoint of a run once, newest first.

    RUN/evaluations/step-########/   the output of `cascade evaluate` for one checkpoint
    RUN/evaluations/series.json      every figure over the steps, and the best step
    RUN/evaluations/report.html      the figures as curves, and the same prompts drawn by every checkpoint
    RUN/evaluations/logged.json      steps already logged to the run's own W&B run, over `checkpoint/step`
    RUN/stop.json                    with stop_after: the training saves and ends at its next step

It runs alongside the training, on other devices or another node, and ends when the run is complete. If it is killed and
started again, it only draws what is missing. The best checkpoint is pinned, so that pruning keeps it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.retry import persist
from training.cascade.bundle import checkpoint_dir
from training.checkpoint.store import CheckpointError, CheckpointStore, step_name
from training.config.commands import EvaluateCommand
from training.evaluation.comparison import RESULT
from training.evaluation.series import best_so_far, evaluation_place, turned_worse, write_series
from training.processes.ranks import read_ranks
from training.run.directory import RunDir, read_json, read_text, recorded_config, replace_file
from training.run.reporting.tracking import log_checkpoints

FOLDER = "evaluations"
LOGGED = "logged.json"
POLL_S = 15.0
Evaluate = Callable[[EvaluateCommand, list[str], Path], Any]
"""Called as (config, runs of the stages, output directory); writes result.json to that directory."""


def watch(config: EvaluateCommand, evaluate: Evaluate) -> dict[str, Any]:
    """Evaluate all existing checkpoints and new ones as they appear; return the content of series.json.

    Raises:
        ConfigError: the results have no such `figure`, or the run is a super-resolution stage that bundle.runs does not
            list.
        DataError: there was no new checkpoint for `wait_s` seconds.
    """
    output = Path(config.run.dir) / FOLDER
    run = RunDir(config)
    last = time.monotonic()
    while True:
        store = CheckpointStore(checkpoint_dir(config.run.dir))  # its path is only known once the run has started
        drawable = _others_began(config)
        step = _newest_unseen(store, output) if drawable else None
        if step is not None:
            evaluate_step(config, store, output, step, evaluate)
            if _is_evaluated(evaluation_place(output, step)):
                series = write_series(output, config.figure)
                print(best_so_far(series))
                store.pin([series["best"]["step"]])
                if config.stop_after and (reason := turned_worse(output, series, config.stop_after)):
                    print(f"{run.path}: {reason}; asking the run to stop")
                    run.ask_to_stop(reason)
            else:
                time.sleep(POLL_S)  # other processes are still drawing
            last = time.monotonic()
            continue
        done, wanted = _progress(store, run)
        ends = done >= wanted or run.asked_to_stop()
        _log(run, store, output, live=not ends)
        if drawable and ends:
            how = "is complete" if done >= wanted else "was asked to stop"
            print(f"{output / 'report.html'}: the run {how}, and all its checkpoints are evaluated")
            return write_series(output, config.figure)
        if time.monotonic() - last > config.wait_s:
            if not drawable:
                raise DataError(
                    f"bundle.runs: a stage before {config.run.dir} had no checkpoint within wait_s={config.wait_s:g} "
                    f"seconds; repeat the command once it has one"
                )
            _log(run, store, output, live=False)
            raise DataError(
                f"{config.run.dir}: no new checkpoint for wait_s={config.wait_s:g} seconds, and the run is at "
                f"step {max(done, 0)}, not complete; repeat the command to continue"
            )
        time.sleep(min(POLL_S, config.wait_s / 4))


def evaluate_step(config: EvaluateCommand, store: CheckpointStore, output: Path, step: int, evaluate: Evaluate) -> None:
    """Evaluate one checkpoint, unless it has already been evaluated.

    Raises:
        CheckpointError, DataError: it cannot be read, although it still exists.
    """
    place = evaluation_place(output, step)
    if _is_evaluated(place):
        return
    try:
        evaluate(config, _runs(config, store, step), place)
    except (CheckpointError, DataError):
        if store.is_committed(step):  # otherwise it was pruned while being read
            raise


def _is_evaluated(place: Path) -> bool:
    return persist(str(place), (place / RESULT).exists)


def _log(run: RunDir, store: CheckpointStore, output: Path, live: bool) -> None:
    """Log results to W&B that it does not have yet; a file records them, so that a restart does not log them twice.

    Args:
        live: the training is still running. Online logging then waits until it ends: two processes that write to one
            W&B run number their rows alike, and later rows replace earlier ones. Offline, each writes its own files.
    """
    ranks = read_ranks()
    if ranks is not None and not ranks.is_main:
        return
    logged = read_json(output / LOGGED).get("steps", [])
    results = {int(file.parent.name.removeprefix("step-")): file for file in output.glob(f"step-*/{RESULT}")}
    fresh = {step: json.loads(read_text(results[step])) for step in sorted(results) if step not in logged}
    newest = store.newest_whole()
    if not fresh or newest < 0:
        return
    meta = store.open(newest).meta
    if live and meta["config"]["wandb"]["mode"] == "online":
        return
    if log_checkpoints(run, meta, fresh):
        replace_file(output / LOGGED, json.dumps({"steps": sorted([*logged, *fresh])}))


def _progress(store: CheckpointStore, run: RunDir) -> tuple[int, float]:
    """Return the newest complete step and the run's train.steps; -1 and infinity before the first checkpoint.

    After an extension, the run's config.yaml has the new train.steps before its next checkpoint does."""
    step = store.newest_whole()
    if step < 0:
        return -1, math.inf
    wanted = store.open(step).meta["config"]["train"]["steps"]
    recorded = recorded_config(run.path).get("train") or {}
    return step, max(wanted, recorded.get("steps", 0))


def _newest_unseen(store: CheckpointStore, output: Path) -> int | None:
    steps = [step for step in store.steps() if not _is_evaluated(evaluation_place(output, step))]
    return next((step for step in steps if store.is_committed(step)), None)


def _others_began(config: EvaluateCommand) -> bool:
    """Return whether each stage before the watched one has a checkpoint to draw with; they may still be training."""
    before: list[str] = []
    for run in config.bundle.runs:
        if Path(run).absolute() == Path(config.run.dir).absolute():
            return all(CheckpointStore(checkpoint_dir(one)).newest_whole() >= 0 for one in before)
        before.append(run)
    return True


def _runs(config: EvaluateCommand, store: CheckpointStore, step: int) -> list[str]:
    """Return the runs of the stages before the watched one, and the watched run's checkpoint of this step."""
    runs, checkpoint = list(config.bundle.runs), f"{store.folder}/{step_name(step)}"
    places = [i for i, run in enumerate(runs) if Path(run).absolute() == Path(config.run.dir).absolute()]
    if not places and store.open(step).meta["config"]["stage"]["low_res_size"]:
        raise ConfigError(f"bundle.runs: {config.run.dir} is not listed; list it and the stages before it, base first")
    return [*runs[: places[0]], checkpoint] if places else [checkpoint]


def one_checkpoint(config: EvaluateCommand, output: Path) -> EvaluateCommand:
    """Return the settings for evaluating one checkpoint, with results in `output`."""
    return replace(
        config,
        action="evaluate",
        watch=False,
        stop_after=0,
        record=False,
        evaluation=replace(config.evaluation, output=str(output)),
    )
