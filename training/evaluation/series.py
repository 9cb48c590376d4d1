"""The evaluations of a run's checkpoints as a series: curves, the best step, and whether the run has become worse.

OUTPUT/step-########/result.json   the evaluation of one checkpoint
OUTPUT/series.json                 every figure over the steps, and the best step
OUTPUT/report.html                 the figures as curves, and the same prompts drawn by every checkpoint
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import PATIENCE, persist
from training.evaluation import page
from training.evaluation.comparison import (
    LEVEL,
    RESULT,
    Evaluated,
    check_same_question,
    compare_results,
    read_result,
    tied_with,
)
from training.evaluation.measure import flattened
from training.evaluation.report import is_higher_better, told_of
from training.evaluation.shown import Shown

SERIES = "series.json"


def evaluation_place(output: Path, step: int) -> Path:
    """Return the directory of a checkpoint's evaluation."""
    return output / f"step-{step:08d}"


def write_series(output: Path, figure: str) -> dict[str, Any]:
    """Write series.json and the page from all results in `output` that can be compared with the newest checkpoint's;
    return the content of series.json, empty if there are no results: `figure`, `best`, the steps `tied` with it (not
    certainly worse; None if the figure cannot be compared picture by picture), `left_out` (step -> why) and `steps`.

    Args:
        figure: the figure that decides the best step, for example kid.inception; empty: KID on the last feature space.

    Raises:
        ConfigError: the results have no such figure.
    """
    results = {int(file.parent.name.removeprefix("step-")): file for file in sorted(output.glob(f"step-*/{RESULT}"))}
    if not results:
        return {}
    left_out = _not_comparable(results)
    found = {}
    for step in results.keys() - left_out.keys():
        figures = dict(flattened(_content(results[step])))
        found[step] = {name: {key: entry[key] for key in ("value", "interval", "n")} for name, entry in figures.items()}
    found = dict(sorted(found.items()))
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    chosen = figure or next((name for name in reversed(names) if name.startswith("kid.")), names[0])
    if chosen not in names:
        raise ConfigError(f"figure={chosen}: the results have {', '.join(names[:12])}")
    sign = -1 if is_higher_better(chosen) else 1
    having = [step for step in found if chosen in found[step]]
    best = min(having, key=lambda step: sign * found[step][chosen]["value"])
    series = {
        "figure": chosen,
        "best": {"step": best, **found[best][chosen]},
        "tied": _tied({step: results[step] for step in having}, best, chosen),
        "left_out": left_out,
        "steps": found,
    }
    with replacing(output / SERIES, durable=False) as stream:
        stream.write(json.dumps(series, indent=1).encode())
    with replacing(output / "report.html", durable=False) as stream:
        drawn = {step: Shown.read(evaluation_place(output, step)) for step in found}
        known = {step: pictures for step, pictures in drawn.items() if pictures is not None}
        stream.write(page.series_html(str(output.parent), series, known).encode())
    return series


def _content(file: Path) -> dict[str, Any]:
    return json.loads(persist(str(file), file.read_text, PATIENCE))  # type: ignore[no-any-return]


def _not_comparable(results: Mapping[int, Path]) -> dict[int, str]:
    """Return which steps were evaluated with other settings than the newest one, and what differs."""
    read = [Evaluated(results[step].parent.name, _content(results[step]), {}, np.zeros(0)) for step in sorted(results)]
    found: dict[int, str] = {}
    for step, result in zip(sorted(results), read, strict=True):
        try:
            check_same_question(read[-1], result)
        except ConfigError as error:
            found[step] = str(error).removeprefix("results: ")
    return found


def _tied(results: Mapping[int, Path], best: int, figure: str) -> list[int] | None:
    """Return the steps that are not certainly worse than the best; None if the figure has no influences."""
    places = {str(file.parent): step for step, file in results.items()}
    try:
        others = (read_result(place) for place, step in places.items() if step != best)
        return sorted(places[path] for path in tied_with(read_result(str(results[best].parent)), others, figure))
    except (DataError, KeyError, ValueError):  # influences are missing, or of another version
        return None


def best_so_far(series: Mapping[str, Any]) -> str:
    """Return in a sentence the best step with its figure, those tied with it, and those left out."""
    figure, best, left_out = series["figure"], series["best"], series["left_out"]
    start = f"step {best['step']} is the best of {len(series['steps'])} so far: {figure} {best['value']:.4g}"
    told = [f"{start} ({told_of(figure)}){page.ties(series)}"]
    told += [
        f"left out: {reason}; delete the older directory to evaluate that step again" for reason in left_out.values()
    ]
    return "\n".join(told)


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
