"""`cascade evaluate watch=true run=DIR`: evaluates each committed checkpoint of a run once, newest first.

    RUN/evaluations/step-########/   what `cascade evaluate` writes, of one checkpoint
    RUN/evaluations/series.json      every figure over the steps, and the best step
    RUN/evaluations/report.html      the same as curves

It runs beside the training, on other devices or another node, and ends when the run is complete. Killed and started
again it draws only what is missing. The best checkpoint is pinned: pruning leaves it alone.
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
from training.cascade.bundle import checkpoint_dir
from training.checkpoint.store import CheckpointError, CheckpointStore, step_name
from training.config.commands import EvaluateCommand
from training.evaluation import page
from training.evaluation.comparison import RESULT
from training.evaluation.measure import LOWER_IS_BETTER, flattened
from training.run.directory import replace_file

FOLDER = "evaluations"
POLL_S = 15.0


def watch(config: EvaluateCommand, evaluate: Callable[[EvaluateCommand, list[str], Path], Any]) -> dict[str, Any]:
    """Evaluates what is there and what comes; returns the content of series.json.

    Args:
        evaluate: (config, runs of the stages, output directory) -> None; it writes result.json there.

    Raises:
        ConfigError: `evaluate_figure` is no figure of the results, or the run is not the first stage of bundle.runs.
        DataError: no checkpoint came for `wait_s` seconds.
    """
    output = Path(config.run.dir) / FOLDER
    last = time.monotonic()
    while True:
        store = CheckpointStore(checkpoint_dir(config.run.dir))  # where, is known once the run has begun
        step = _newest_unseen(store, output) if _others_began(config) else None
        if step is not None:
            place = output / step_name(step)
            try:
                evaluate(config, _runs(config, store, step), place)
            except (CheckpointError, DataError):
                if store.is_committed(step):  # else it was pruned while it was read
                    raise
            if (place / RESULT).exists():
                store.pin([write_series(output, config.figure)["best"]["step"]])
            else:
                time.sleep(POLL_S)  # other processes still draw
            last = time.monotonic()
            continue
        done, wanted = _progress(store)
        if done >= wanted:
            print(f"{output / 'report.html'}: the run is complete, and so are its evaluations")
            return write_series(output, config.figure)
        if time.monotonic() - last > config.wait_s:
            raise DataError(
                f"{config.run.dir}: no new checkpoint for wait_s={config.wait_s:g} seconds, and the run is at "
                f"step {max(done, 0)}, not complete; start the same again to go on"
            )
        time.sleep(min(POLL_S, config.wait_s / 4))


def _progress(store: CheckpointStore) -> tuple[int, float]:
    """The newest whole step, and the run's train.steps; -1 and infinity before the first checkpoint."""
    step = store.newest_whole()
    return (step, store.open(step).meta["config"]["train"]["steps"]) if step >= 0 else (-1, math.inf)


def _newest_unseen(store: CheckpointStore, output: Path) -> int | None:
    steps = [step for step in store.steps() if not (output / step_name(step) / RESULT).exists()]
    return next((step for step in steps if store.is_committed(step)), None)


def _others_began(config: EvaluateCommand) -> bool:
    """Whether each stage before the watched one has a checkpoint to draw with; they may train at the same time."""
    before: list[str] = []
    for run in config.bundle.runs:
        if Path(run).absolute() == Path(config.run.dir).absolute():
            return all(CheckpointStore(checkpoint_dir(one)).newest_whole() >= 0 for one in before)
        before.append(run)
    return True


def _runs(config: EvaluateCommand, store: CheckpointStore, step: int) -> list[str]:
    """The stages up to the watched one, of which that is the checkpoint."""
    runs, checkpoint = list(config.bundle.runs), f"{store.folder}/{step_name(step)}"
    places = [i for i, run in enumerate(runs) if Path(run).absolute() == Path(config.run.dir).absolute()]
    if not places and store.open(step).meta["config"]["stage"]["low_res_size"]:
        raise ConfigError(f"bundle.runs: {config.run.dir} is not among them; name the stages before it, base first")
    return [*runs[: places[0]], checkpoint] if places else [checkpoint]


def write_series(output: Path, figure: str) -> dict[str, Any]:
    """series.json and the page, from all results in `output`; empty where there are none.

    Args:
        figure: which decides the best step, for example kid.inception; empty: the first KID, by the last features.

    Raises:
        ConfigError: the results have no such figure.
    """
    found = {}
    for file in sorted(output.glob(f"step-*/{RESULT}")):
        figures = dict(flattened(json.loads(file.read_text())))
        found[int(file.parent.name.removeprefix("step-"))] = {
            name: {key: entry[key] for key in ("value", "interval", "n")} for name, entry in figures.items()
        }
    if not found:
        return {}
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    chosen = figure or next((name for name in reversed(names) if name.startswith("kid.")), names[0])
    if chosen not in names:
        raise ConfigError(f"figure={chosen}: the results have {', '.join(names[:12])}")
    sign = 1 if chosen.split(".")[0] in LOWER_IS_BETTER else -1
    best = min((step for step in found if chosen in found[step]), key=lambda step: sign * found[step][chosen]["value"])
    series = {"figure": chosen, "best": {"step": best, **found[best][chosen]}, "steps": found}
    replace_file(output / "series.json", json.dumps(series, indent=1))
    replace_file(output / "report.html", page.series_html(str(output.parent), series))
    print(f"step {best} is the best of {len(found)} so far: {chosen} {found[best][chosen]['value']:.4g}")
    return series


def one_checkpoint(config: EvaluateCommand, output: Path) -> EvaluateCommand:
    """The settings of the evaluation of one checkpoint."""
    return replace(config, watch=False, evaluation=replace(config.evaluation, output=str(output)))
