"""`cascade evaluate action=bisect run=DIR`: at which of a run's stored checkpoints did a figure turn worse?

The first and the newest checkpoint (or `steps_between=[GOOD,BAD]`) are evaluated, then the one in the middle, and so
on: of n checkpoints about log2(n) + 2 are drawn. "Worse" means worse than the good one by more than chance (paired,
95 %). What `watch` has evaluated already is not drawn again, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError
from training.cascade.bundle import checkpoint_dir
from training.checkpoint.store import CheckpointStore
from training.commands.watch import FOLDER, Evaluate, evaluate_step
from training.config.commands import EvaluateCommand
from training.evaluation.series import is_worse, write_series


def bisect(config: EvaluateCommand, evaluate: Evaluate) -> dict[str, Any]:
    """Finds the step; returns `figure`, `good` (the last step that is not worse), `bad` (the first that is; None where
    none is), and `evaluated`.

    Raises:
        ConfigError: `steps_between` names no two stored checkpoints, or `figure` is none of the results'.
        DataError: the run has fewer than two checkpoints.
    """
    store, output = CheckpointStore(checkpoint_dir(config.run.dir)), Path(config.run.dir) / FOLDER
    steps = [step for step in sorted(store.steps()) if store.is_committed(step)]
    if config.steps_between:
        if (
            len(config.steps_between) != 2
            or not set(config.steps_between) <= set(steps)
            or config.steps_between[0] >= config.steps_between[1]
        ):
            raise ConfigError(
                f"steps_between={config.steps_between}: give a good and a later bad step; the stored checkpoints are "
                f"{steps}"
            )
        steps = [step for step in steps if config.steps_between[0] <= step <= config.steps_between[1]]
    if len(steps) < 2:
        raise DataError(
            f"{config.run.dir}: {len(steps) or 'no'} checkpoint there; a search needs two (checkpoint.keep_every)"
        )
    figure, evaluated = config.figure, []

    def worse(step: int) -> bool:
        for one in (steps[0], step):
            evaluate_step(config, store, output, one, evaluate)
        evaluated.append(step)
        series = write_series(output, figure)
        return is_worse(output, steps[0], step, series["figure"])

    good, bad = first_bad(steps, worse)
    chosen = write_series(output, figure)["figure"]
    if bad is None:
        print(f"{chosen}: step {steps[-1]} is not worse than step {steps[0]} by more than chance")
    else:
        print(f"{chosen}: step {good} is not worse than step {steps[0]}, step {bad} is")
    return {"figure": chosen, "good": good, "bad": bad, "evaluated": [steps[0], *evaluated]}


def first_bad(steps: Sequence[int], is_bad: Callable[[int], bool]) -> tuple[int, int | None]:
    """The neighbours between which it happens: the last good one, and the first bad one (None: the last is good).

    Args:
        steps: rising; the first one is good.
        is_bad: asked about log2(len(steps)) + 1 times; once bad, later ones are taken to be bad too.
    """
    if not is_bad(steps[-1]):
        return steps[-1], None
    low, high = 0, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(steps[middle]) else (middle, high)
    return steps[low], steps[high]
