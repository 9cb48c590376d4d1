"""`cascade evaluate action=bisect run=DIR`: finds the stored checkpoint of a run at which a figure became worse.

The first and the newest checkpoint (or `steps_between=[GOOD,BAD]`) are evaluated, then the one in the middle, and so
on: of n checkpoints about log2(n) + 2 are evaluated. "Worse" means significantly worse than the good one (paired, 95
%). Results of `watch` are reused, and vice versa.
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
    """Find the step at which the figure became worse.

    Returns:
        `figure`; `good`, the last step that is not worse; `bad`, the first that is (None: none is); and `evaluated`,
        the steps that were compared.

    Raises:
        ConfigError: `steps_between` is not two stored checkpoints in order, or the results have no such `figure`.
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
            f"{config.run.dir}: it has {len(steps) or 'no'} checkpoint; a search needs two (checkpoint.keep_every)"
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
        print(f"{chosen}: step {steps[-1]} is not significantly worse than step {steps[0]}")
    else:
        print(f"{chosen}: step {bad} is significantly worse than step {steps[0]}, step {good} is not")
    return {"figure": chosen, "good": good, "bad": bad, "evaluated": [steps[0], *evaluated]}


def first_bad(steps: Sequence[int], is_bad: Callable[[int], bool]) -> tuple[int, int | None]:
    """Return the last good step and the first bad one (None if the last step is good), by bisection.

    Args:
        steps: increasing; the first one is good.
        is_bad: called about log2(len(steps)) + 1 times; steps after a bad one are assumed to be bad too.
    """
    if not is_bad(steps[-1]):
        return steps[-1], None
    low, high = 0, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(steps[middle]) else (middle, high)
    return steps[low], steps[high]
