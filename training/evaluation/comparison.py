"""`cascade evaluate action=compare results=[A,B,...]`: paired differences of evaluations.

Two results are compared picture by picture: the same prompts with the same noise against the same reference. They may
differ in what is being compared (weights, sampler, guidance); any other difference is refused by name.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import load_files
from training.evaluation.measure import LOWER_IS_BETTER, flattened
from training.evaluation.metrics.figure import Figure

RESULT, INFLUENCES = "result.json", "influences.npz"
FORMAT = 2
SAME = (
    "kind",
    "n.samples",
    "n.reference",
    "protocol.size",
    "protocol.seed",
    "protocol.prompts",
    "protocol.images_per_prompt",
    "protocol.reference_fingerprint",
    "protocol.reference_rule",
    "protocol.extractors",
)
"""Fields that must be equal for results to be comparable."""
SAID = (
    *("protocol.from_stage", "protocol.text", "protocol.text_sha", "protocol.precision", "protocol.device"),
    *("protocol.commit", "protocol.dirty", "protocol.versions"),
)
"""Fields whose differences are reported."""
NEEDS = {"copies": ("protocol.training",), "psnr": ("psnr.n",)}
"""Fields without whose agreement a metric is not compared."""
LEVEL = 0.05
"""Chance of any wrong `certain` in a comparison."""
POWER = 0.8
"""Probability of seeing a difference with the number of pictures that a sentence names."""
MOST = 1_000_000
"""Number of pictures above which the sentence gives none."""
SHOWN = 3
"""Figures to name in a sentence."""


@dataclass
class Evaluated:
    """The content of one result.json, and every figure with its influences."""

    path: str
    result: dict[str, Any]
    figures: dict[str, Figure]
    prompts: np.ndarray
    """int (N,): the prompt of each sample, by number."""


def write_influences(folder: Path, figures: Mapping[str, Figure], prompts: np.ndarray) -> None:
    """Write next to result.json the contribution of each picture to each figure, in fp64, and of shares which pictures
    count."""
    arrays = {f"{name}/samples": figure.samples for name, figure in figures.items()}
    arrays |= {f"{name}/reference": figure.reference for name, figure in figures.items()}
    arrays |= {f"{name}/halves": figure.halves for name, figure in figures.items()}
    arrays |= {f"{name}/of_{f.of}": f.outcomes.astype(np.int8) for name, f in figures.items()}
    with replacing(folder / INFLUENCES, durable=False) as file:
        np.savez(file, prompts=prompts, **arrays)  # type: ignore[arg-type]


def read_result(path: str) -> Evaluated:
    """Read a result.json, given its path or its directory.

    Raises:
        DataError: it is missing or damaged, or another version of this project wrote it.
        StoreError: its file system kept failing.
    """
    return load_files(path, partial(_read_result, path))


def _read_result(path: str) -> Evaluated:
    file = Path(path)
    file = file / RESULT if file.is_dir() else file
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise DataError(f"results: {path}: there is no {RESULT} to read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"results: {file}: not valid JSON ({error})") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise DataError(f"results: {file}: written by another version of this project; evaluate again")
    try:
        with np.load(file.parent / INFLUENCES) as stored:
            figures = {
                name: _stored_figure(stored, name, entry["value"])
                for name, entry in flattened(result)
                if f"{name}/samples" in stored
            }
            return Evaluated(path, result, figures, stored["prompts"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"results: {file.parent / INFLUENCES}: missing or damaged; evaluate again") from error


def _stored_figure(stored: Mapping[str, np.ndarray], name: str, value: float) -> Figure:
    """Return a figure; earlier versions stored neither halves nor which pictures count."""
    samples, reference = stored[f"{name}/samples"], stored[f"{name}/reference"]
    of = next((of for of in ("samples", "reference") if f"{name}/of_{of}" in stored), "")
    found = Figure(value, samples, reference, of=of or ("samples" if len(samples) else "reference"))
    if f"{name}/halves" in stored:
        found = replace(found, halves=stored[f"{name}/halves"])
    return replace(found, outcomes=stored[f"{name}/of_{of}"].astype(np.float64)) if of else found


def field_of(result: Mapping[str, Any], name: str) -> Any:
    """Return a value by its dotted name; None if it is missing."""
    value: Any = result
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check_same_question(first: Evaluated, other: Evaluated) -> None:
    """Check that two results are comparable.

    Raises:
        ConfigError: they are not; the message names the first field that differs, and both values.
    """
    for name in SAME:
        here, there = field_of(first.result, name), field_of(other.result, name)
        if here == there:
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            key = next(key for key in {**here, **there} if here.get(key) != there.get(key))
            name, here, there = f"{name}.{key}", here.get(key), there.get(key)
        raise ConfigError(
            f"results: {first.path} and {other.path} cannot be compared: {name} is {here} in the first and {there} "
            "in the second"
        )


def compare_results(results: Sequence[str]) -> dict[str, Any]:
    """Return the differences of each result from the first one, figure by figure.

    Returns:
        `baseline`, and `others`: for each result its `path`, `said` (allowed differences in the protocol), and
        `figures`: by name, `value`, `interval`, `n` and `detectable` of the difference, the values `baseline` and
        `other`, a `verdict`: `better`, `worse`, or `undecided` if the interval includes 0, the `chance` of such a
        difference between equals, and whether it is `certain`, also considering how many figures of how many results
        are compared here (Holm 1979: in 95 % of comparisons, nothing is wrongly called certain); and `conclusion`, a
        sentence.

    Raises:
        ConfigError: fewer than two results, or results that are not comparable.
        DataError: a result cannot be read.
    """
    if len(results) < 2:
        raise ConfigError("results: give at least two evaluations: results=[A,B]")
    first, *others = [read_result(str(path)) for path in results]
    for other in others:
        check_same_question(first, other)
    compared = [_difference(first, other) for other in others]
    every = [entry for difference in compared for entry in difference["figures"].values()]
    for entry, certain in zip(every, holm([entry["chance"] for entry in every]), strict=True):
        entry["certain"] = certain
    for difference in compared:
        difference["conclusion"] = conclusion(first.path, difference, len(every))
    return {"baseline": first.path, "others": compared}


def _difference(first: Evaluated, other: Evaluated) -> dict[str, Any]:
    here, there = first.result, other.result
    figures: dict[str, Any] = {}
    apart: dict[str, Any] = {}
    lacking = {name: fields for name, fields in NEEDS.items() if _differing(here, there, fields)}
    for name, figure in other.figures.items():
        if name in first.figures and name.split(".")[0] not in lacking:
            if (sizes := [_sizes(first.figures[name]), _sizes(figure)])[0] != sizes[1]:  # of an earlier version
                apart[f"influences of {name}"] = sizes
                continue
            prompts = other.prompts if len(figure.samples) == len(other.prompts) else None
            difference = figure.minus(first.figures[name])
            entry = difference.as_dict(prompts)
            figures[name] = entry | {
                "baseline": first.figures[name].value,
                "other": figure.value,
                "verdict": _verdict(name, entry["interval"]),
                "chance": difference.chance(prompts),
            }
    shared = {name.split(".")[0] for name in first.figures if name in other.figures} & set(lacking)
    said = _differing(_stages(here), _stages(there), ("stages",))
    said |= _differing(here, there, (*SAID, *(field for name in sorted(shared) for field in lacking[name])))
    return {"path": other.path, "said": said | apart, "figures": figures}


def _stages(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return which checkpoint each stage is, and how it was sampled, `STAGE.KEY` -> value."""
    found: dict[str, Any] = {}
    for stage in field_of(result, "protocol.stages") or []:
        facts = {"step": stage.get("step"), "ema_decay": stage.get("ema_decay"), **stage.get("sampler", {})}
        found |= {f"{stage['name']}.{key}": value for key, value in facts.items()}
    return {"stages": found}


def _sizes(figure: Figure) -> str:
    divided = f", {len(figure.halves)} divisions" if len(figure.halves) else ""
    return f"{len(figure.samples)} samples, {len(figure.reference)} reference pictures{divided}"


def _differing(here: Mapping[str, Any], there: Mapping[str, Any], fields: Sequence[str]) -> dict[str, list[Any]]:
    """Return both values of the fields that differ; of dictionaries, of their entries that differ."""
    found: dict[str, list[Any]] = {}
    for name in fields:
        one, two = field_of(here, name), field_of(there, name)
        if isinstance(one, dict) and isinstance(two, dict):
            found |= {
                f"{name}.{key}": [one.get(key), two.get(key)] for key in {**one, **two} if one.get(key) != two.get(key)
            }
        elif one != two:
            found[name] = [one, two]
    return found


def tied_with(best: Evaluated, others: Iterable[Evaluated], name: str) -> list[str]:
    """Return the paths of the results that are not certainly worse than the best in one figure: by paired differences,
    with Holm's correction for the number of results.

    Raises:
        KeyError: a result has no such figure with influences.
    """
    chances: dict[str, float] = {}
    for other in others:
        difference = other.figures[name].minus(best.figures[name])
        prompts = other.prompts if len(difference.samples) == len(other.prompts) else None
        chances[other.path] = difference.chance(prompts)
    return [path for path, certain in zip(chances, holm(list(chances.values())), strict=True) if not certain]


def holm(chances: Sequence[float]) -> list[bool]:
    """Return which of several tests are significant together at `LEVEL`, given the p-value of each (Holm 1979)."""
    found, order = [False] * len(chances), sorted(range(len(chances)), key=lambda i: chances[i])
    for rank, place in enumerate(order):
        if chances[place] > LEVEL / (len(chances) - rank):
            break
        found[place] = True
    return found


def conclusion(baseline: str, other: Mapping[str, Any], tests: int) -> str:
    """Return in a sentence which of two results is better, and by how much; or that they cannot be told apart, and how
    many pictures would tell, if as many `tests` are made."""
    figures = other["figures"]
    if not figures:
        return f"{other['path']} and {baseline} have no figure in common"
    certain = sorted((name for name in figures if figures[name]["certain"]), key=lambda name: figures[name]["chance"])
    if not certain:
        return _undecided(baseline, other, tests)
    sides = {verdict: [n for n in certain if figures[n]["verdict"] == verdict] for verdict in ("better", "worse")}
    told = [f"{verdict} than {baseline} in {_named(figures, names)}" for verdict, names in sides.items() if names]
    rest = len(figures) - len(certain)
    undecided = f"; the other {rest} figures do not tell them apart" if rest > 1 else ""
    return f"{other['path']} is {', and '.join(told)}{undecided}"


def _named(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    shown = [
        f"{name} by {abs(e['value']):.3g} ({min(map(abs, e['interval'])):.3g} to {max(map(abs, e['interval'])):.3g})"
        for name, e in ((name, figures[name]) for name in names[:SHOWN])
    ]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*shown, *more])


def _undecided(baseline: str, other: Mapping[str, Any], tests: int) -> str:
    figures = other["figures"]
    name = min(figures, key=lambda name: figures[name]["chance"])
    entry, normal = figures[name], NormalDist()
    start = f"{other['path']} and {baseline} cannot be told apart"
    if not any(entry["value"] for entry in figures.values()):
        return f"{start}: all figures are equal"
    seen = normal.inv_cdf(1 - entry["chance"] / 2)
    needed = normal.inv_cdf(1 - LEVEL / tests / 2) + normal.inv_cdf(POWER)
    pictures = entry["n"] * (needed / seen) ** 2 if seen > 0 else math.inf
    wanted = f"{float(f'{pictures:.2g}'):,.0f}" if pictures < MOST else f"more than {MOST:,}"
    return (
        f"{start}: the clearest difference is {abs(entry['value']):.3g} in {name}; if it is as large as that, about "
        f"{wanted} pictures would show it, instead of {entry['n']:,}"
    )


def _verdict(name: str, interval: Sequence[float]) -> str:
    low, high = interval
    if low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == (name.split(".")[0] in LOWER_IS_BETTER) else "worse"


def as_text(comparison: Mapping[str, Any]) -> str:
    """Format the comparison for the terminal, one table per result."""
    lines = []
    tests = sum(len(other["figures"]) for other in comparison["others"])
    for other in comparison["others"]:
        lines.append(f"{other['path']} against {comparison['baseline']} (paired, 95 % intervals):")
        for name, values in other["said"].items():
            apart = next((metric for metric, fields in NEEDS.items() if name.startswith(fields)), "")
            apart = apart or (name.removeprefix("influences of ") if name.startswith("influences of ") else "")
            lines.append(
                f"  note: {name} differs: {values[0]} and {values[1]}{f'; {apart} is not compared' if apart else ''}"
            )
        width = max(map(len, other["figures"]), default=0)
        for name, entry in other["figures"].items():
            low, high = entry["interval"]
            doubt = "" if entry["certain"] or entry["verdict"] == "undecided" else " (perhaps by chance)"
            lines.append(
                f"  {name:{width}}  {entry['baseline']:>10.5g} -> {entry['other']:<10.5g} "
                f"{entry['value']:+.3g} [{low:+.3g}, {high:+.3g}]  {entry['verdict']}{doubt}"
            )
        lines.append(f"{other['conclusion']}.")
    if tests > 1:
        lines.append(
            f"{tests} differences were tested, of which 1 in 20 would seem better or worse between equal results: the "
            "sentences count those that are more than this chance."
        )
    return "\n".join(lines)
