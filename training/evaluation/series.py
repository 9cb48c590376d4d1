"""The evaluations of a run's checkpoints as a series: curves, the best step, and whether the run has become worse.

OUTPUT/step-########/result.json   the evaluation of one checkpoint
OUTPUT/series.json                 every figure over the steps, and the best step
OUTPUT/report.html                 the figures as curves, and the same prompts drawn by every checkpoint
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.storage.atomic import replacing
from training.evaluation import page
from training.evaluation.comparison import LEVEL, RESULT, compare_results
from training.evaluation.measure import LOWER_IS_BETTER, flattened
from training.evaluation.shown import Shown

SERIES = "series.json"


def evaluation_place(output: Path, step: int) -> Path:
    """Return the directory of a checkpoint's evaluation."""
    return output / f"step-{step:08d}"


def write_series(output: Path, figure: str) -> dict[str, Any]:
    """Write series.json and the page from all results in `output`; return the content of series.json, empty if there
    are no results.

    Args:
        figure: the figure that decides the best step, for example kid.inception; empty: KID on the last feature space.

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
    with replacing(output / SERIES, durable=False) as stream:
        stream.write(json.dumps(series, indent=1).encode())
    with replacing(output / "report.html", durable=False) as stream:
        drawn = {step: Shown.read(evaluation_place(output, step)) for step in found}
        known = {step: pictures for step, pictures in drawn.items() if pictures is not None}
        stream.write(page.series_html(str(output.parent), series, known).encode())
    return series


def best_so_far(series: dict[str, Any]) -> str:
    """Return a sentence with the best step and its figure."""
    figure, best = series["figure"], series["best"]
    return f"step {best['step']} is the best of {len(series['steps'])} so far: {figure} {best['value']:.4g}"


def is_worse(output: Path, good: int, step: int, figure: str, tests: int = 1) -> bool:
    """Return whether the checkpoint of `step` is significantly worse than that of `good` by their paired difference: at
    5 %, divided by the number of `tests` from which this one was selected (Bonferroni).

    Raises:
        ConfigError: the evaluations are not comparable, or have no such figure.
    """
    places = [str(evaluation_place(output, one)) for one in (good, step)]
    figures = compare_results(places)["others"][0]["figures"]
    if figure not in figures:
        raise ConfigError(f"figure={figure}: it cannot be compared picture by picture; choose {', '.join(figures)}")
    return bool(figures[figure]["verdict"] == "worse" and figures[figure]["chance"] <= LEVEL / tests)


def turned_worse(output: Path, series: dict[str, Any], count: int) -> str:
    """Return why the run should stop: its `count` newest evaluated checkpoints are later than the best one, and each is
    significantly worse. Empty: it should continue.

    The best is the luckiest of many, and every new checkpoint is another look: at 95 % for each pair, one in ten runs
    that no longer change would stop within 20 checkpoints, and four in ten within 50. So all pairs of checkpoints count
    as tests."""
    best, figure = series["best"]["step"], series["figure"]
    newest = sorted(step for step in series["steps"] if step > best)[-count:]
    pairs = max(1, math.comb(len(series["steps"]), 2))
    if len(newest) < count or not all(is_worse(output, best, step, figure, pairs) for step in newest):
        return ""
    values = ", ".join(f"{series['steps'][step][figure]['value']:.4g} at step {step}" for step in newest)
    return f"{figure} was {series['best']['value']:.4g} at step {best}, and is {values}"
