"""`cascade evaluate action=compare results=[A,B,...]`: paired differences of evaluations.

Two results are compared picture by picture: the same prompts with the same noise against the same reference. They may
differ in what is being compared (weights, sampler, guidance); any other difference is refused by name.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.atomic import replacing
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
SAID = ("protocol.from_stage", "protocol.text", "protocol.precision", "protocol.device", "protocol.commit")
"""Fields whose differences are reported."""


@dataclass
class Evaluated:
    """The content of one result.json, and every figure with its influences."""

    path: str
    result: dict[str, Any]
    figures: dict[str, Figure]
    prompts: np.ndarray
    """int (N,): the prompt of each sample, by number."""


def write_influences(folder: Path, figures: Mapping[str, Figure], prompts: np.ndarray) -> None:
    """Write the contribution of each picture to each figure, in fp64, next to result.json."""
    arrays = {f"{name}/samples": figure.samples for name, figure in figures.items()}
    arrays |= {f"{name}/reference": figure.reference for name, figure in figures.items()}
    with replacing(folder / INFLUENCES, durable=False) as file:
        np.savez(file, prompts=prompts, **arrays)  # type: ignore[arg-type]


def read_result(path: str) -> Evaluated:
    """Read a result.json, given its path or its directory.

    Raises:
        DataError: it is missing or damaged, or another version of this project wrote it.
    """
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
                name: Figure(entry["value"], stored[f"{name}/samples"], stored[f"{name}/reference"])
                for name, entry in flattened(result)
                if f"{name}/samples" in stored
            }
            return Evaluated(path, result, figures, stored["prompts"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"results: {file.parent / INFLUENCES}: missing or damaged; evaluate again") from error


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
        `other`, and a `verdict`: `better`, `worse`, or `undecided` if the interval includes 0.

    Raises:
        ConfigError: fewer than two results, or results that are not comparable.
        DataError: a result cannot be read.
    """
    if len(results) < 2:
        raise ConfigError("results: give at least two evaluations: results=[A,B]")
    first, *others = [read_result(str(path)) for path in results]
    for other in others:
        check_same_question(first, other)
    return {"baseline": first.path, "others": [_difference(first, other) for other in others]}


def _difference(first: Evaluated, other: Evaluated) -> dict[str, Any]:
    figures = {}
    for name, figure in other.figures.items():
        if name in first.figures:
            prompts = other.prompts if len(figure.samples) == len(other.prompts) else None
            difference = figure.minus(first.figures[name]).as_dict(prompts)
            verdict = _verdict(name, difference["interval"])
            figures[name] = difference | {
                "baseline": first.figures[name].value,
                "other": figure.value,
                "verdict": verdict,
            }
    said = {
        name: [field_of(first.result, name), field_of(other.result, name)]
        for name in SAID
        if field_of(first.result, name) != field_of(other.result, name)
    }
    return {"path": other.path, "said": said, "figures": figures}


def _verdict(name: str, interval: Sequence[float]) -> str:
    low, high = interval
    if low <= 0 <= high:
        return "undecided"
    return "better" if (high < 0) == (name.split(".")[0] in LOWER_IS_BETTER) else "worse"


def as_text(comparison: Mapping[str, Any]) -> str:
    """Format the comparison for the terminal, one table per result."""
    lines = []
    for other in comparison["others"]:
        lines.append(f"{other['path']} against {comparison['baseline']} (paired, 95 % intervals):")
        for name, values in other["said"].items():
            lines.append(f"  note: {name} differs: {values[0]} and {values[1]}")
        width = max(map(len, other["figures"]), default=0)
        for name, entry in other["figures"].items():
            low, high = entry["interval"]
            lines.append(
                f"  {name:{width}}  {entry['baseline']:>10.5g} -> {entry['other']:<10.5g} "
                f"{entry['value']:+.3g} [{low:+.3g}, {high:+.3g}]  {entry['verdict']}"
            )
    return "\n".join(lines)
