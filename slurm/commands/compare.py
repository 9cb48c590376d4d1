"""`cascade compare RUN RUN ...`: shows how the settings of runs differ, and how their losses do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError
from slurm.pages.chart import picture_of, stacked, text_of
from slurm.pages.curves import curves_of
from training.config.commands import CompareCommand
from training.pictures.sheets import save
from training.run.directory import VALIDATION, flatten, recorded_config

OWN = ("run.", "wandb.name", "json", "debug")
"""Settings that differ between any two runs, and do not affect their losses."""
SAME_QUESTION = ("validation.", "evaluation.reference", "stage.image_size", "stage.low_res_size", "stage.diffusion.")
"""Settings that change what the validation measures, so that its losses cannot be compared."""
Z = 1.96
"""Half width of a 95 % interval, in standard errors."""


def main(config: CompareCommand) -> dict[str, Any]:
    """Print the settings that differ, draw the curves, and compare the validation losses in pairs.

    Returns:
        {"settings": {key: [values]}, "picture": path, "paired": [{"runs", "step", "difference", "interval", "n"}]}

    Raises:
        ConfigError: fewer than two runs are given.
        DataError: a directory is not a run, or none of the runs has any of the curves.
    """
    if len(config.runs) < 2:
        raise ConfigError("runs: give at least two runs: cascade compare runs/a/base64 runs/b/base64")
    runs = {name: Path(name) for name in config.runs}
    settings = {name: _settings(path) for name, path in runs.items()}
    table = differing(settings)
    print(_settings_table(table, list(runs)), flush=True)
    found = {name: curves_of(path) for name, path in runs.items()}
    charts = {}
    for number in config.curves:
        curves = {name: curves[number] for name, curves in found.items() if number in curves}
        if curves:
            charts[number] = curves
    if not charts:
        raise DataError(f"curves={config.curves}: none of them is in metrics.jsonl of these runs")
    for number, curves in charts.items():
        print("\n" + text_of(number, curves), flush=True)
    Path(config.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    save(stacked([picture_of(number, curves) for number, curves in charts.items()]), config.output)
    print(f"\npicture: {config.output}")
    paired = [pair for a, b in combinations(runs, 2) if (pair := _paired(a, b, table, list(runs)))]
    for pair in paired:
        print(_sentence(pair), flush=True)
    return {"settings": table, "picture": config.output, "paired": paired}


def _settings(run: Path) -> dict[str, Any]:
    found = recorded_config(run)
    if not found:
        raise DataError(f"{run}: not a run (no config.yaml); give run directories")
    return flatten(found)


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return dotted key -> the value in each run, for the settings that are not the same in all."""
    keys = sorted({key for flat in settings.values() for key in flat if not key.startswith(OWN)})
    rows = {key: [flat.get(key) for flat in settings.values()] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _settings_table(table: Mapping[str, Sequence[Any]], names: Sequence[str]) -> str:
    if not table:
        return "the settings are the same"
    lines = [["setting", *names]]
    for key, values in table.items():
        lines.append([key, *("null" if value is None else str(value) for value in values)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# ----------------------------------------------------------------------------------------- validation losses


def _paired(a: str, b: str, table: Mapping[str, Sequence[Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the difference b - a of the losses of the same held-out samples at the newest step that both have, or why
    they cannot be compared; None if a run has no validation losses."""
    losses = [_validations(Path(run)) for run in (a, b)]
    if not losses[0] or not losses[1]:
        return None
    i, j = names.index(a), names.index(b)
    other = [key for key, values in table.items() if key.startswith(SAME_QUESTION) and values[i] != values[j]]
    if other:
        why = f"their validations use different settings ({', '.join(other)})"
        if any(key.startswith("stage.diffusion.") for key in other):
            why += "; cascade ablate measures all arms alike, at fixed noise levels"
        return {"runs": [a, b], "why": why}
    steps = sorted({*losses[0]} & {*losses[1]})
    if not steps:
        return {"runs": [a, b], "why": "they were not validated at the same step"}
    pair = [losses[0][steps[-1]], losses[1][steps[-1]]]
    if len(pair[0]) != len(pair[1]):
        return {"runs": [a, b], "why": "their validations have different numbers of samples"}
    return {"runs": [a, b], "step": steps[-1], **paired_difference(pair[0], pair[1])}


def paired_difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Return the mean of b - a over pairs, with its 95 % interval by the normal approximation; at least two pairs."""
    apart = [y - x for x, y in zip(a, b, strict=True)]
    mean = sum(apart) / len(apart)
    spread = math.sqrt(sum((value - mean) ** 2 for value in apart) / (len(apart) - 1) / len(apart))
    return {"difference": mean, "interval": [mean - Z * spread, mean + Z * spread], "n": len(apart)}


def _validations(run: Path) -> dict[int, list[float]]:
    found = {}
    for path in (run / VALIDATION).glob("step-*.json"):
        try:
            line = json.loads(path.read_text())
            found[int(line["step"])] = line["loss"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _sentence(pair: Mapping[str, Any]) -> str:
    a, b = pair["runs"]
    if "why" in pair:
        return f"validation loss of {b} and {a}: not compared, {pair['why']}"
    low, high = pair["interval"]
    said = "no significant difference" if low <= 0 <= high else f"{b if high < 0 else a} is better"
    return (
        f"validation loss of {b} minus {a} at step {pair['step']}: {pair['difference']:+.5f} "
        f"[{low:+.5f}, {high:+.5f}] (95 %, paired over {pair['n']} held-out samples): {said}"
    )
