"""Self-contained HTML pages about evaluations: figures, pictures and protocol."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from training.evaluation.metrics.neighbours import COPY, closeness
from training.evaluation.metrics.rows import FeatureRows
from training.evaluation.report import METRICS, protocol_rows, told_of
from training.evaluation.shown import Shown, best_and_worst

Pictures = Sequence[np.ndarray] | np.ndarray
"""uint8 (N, H, W, 3), as one array or several."""
LARGEST = 256
"""Maximum width of embedded pictures, pixels."""
SMALL = 128
"""The same on the page over all checkpoints."""
DETAILS = ("by_word.", "real.", "base.")
"""Prefixes of figures whose curves are collapsed on the page over all checkpoints, to keep the pictures near the
top."""
MOST_CHECKPOINTS = 8
"""Maximum columns of pictures on the page over all checkpoints."""


@dataclass
class Framed:
    """One picture of the page."""

    source: str
    caption: str
    note: str = ""
    copy: bool = False
    """Whether it is suspiciously close to a known picture; adds a frame."""


@dataclass
class Section:
    """Pictures under a title."""

    title: str
    pictures: list[Framed]


def html(result: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return the page of one evaluation. Captions and settings are escaped."""
    return _rendered(
        "report.html.j2",
        title=f"Evaluation of {result['protocol']['bundle']}",
        result=result,
        groups=list(_groups(result)),
        pictures=[section for section in sections if section.pictures],
        protocol=protocol_rows(result["protocol"]),
    )


def series_html(run: str, series: Mapping[str, Any], pictures: Mapping[int, Shown]) -> str:
    """Return the page of a run's evaluations: each figure over the steps, with its interval as a band, and the same
    prompts drawn with the same noise by every checkpoint, first the best and worst, then by category.

    Args:
        series: `figure`, `best`, `tied`, `left_out` and `steps` (by step and name: `value`, `interval`).
        pictures: pictures drawn by each step.
    """
    steps = {int(step): figures for step, figures in series["steps"].items()}
    names = list(dict.fromkeys(name for figures in steps.values() for name in figures))
    curves = [_curve(name, {s: f[name] for s, f in sorted(steps.items()) if name in f}) for name in names]
    return _rendered(
        "series.html.j2",
        title=f"Checkpoints of {run}",
        steps=len(steps),
        figure=series["figure"],
        told=told_of(series["figure"]),
        best=series["best"],
        ties=ties(series),
        left_out=list(series["left_out"].values()),
        curves=[curve for curve in curves if not curve["name"].startswith(DETAILS)],
        details=[curve for curve in curves if curve["name"].startswith(DETAILS)],
        columns=(columns := _columns(sorted(pictures), series["best"]["step"])),
        grids=_grids({step: pictures[step] for step in columns}) if columns else [],
    )


def ties(series: Mapping[str, Any]) -> str:
    """Return the end of the sentence about the best step: which ones cannot be told apart from it."""
    if series["tied"] is None or len(series["steps"]) < 2:
        return ""
    if not series["tied"]:
        return "; certainly better than every other"
    steps = ", ".join(map(str, series["tied"]))
    return f"; cannot be told apart from it: step{'s' if len(series['tied']) > 1 else ''} {steps}"


def _columns(steps: Sequence[int], best: int) -> list[int]:
    """Return the steps whose pictures to show: evenly spread, including the first, the newest and the best."""
    if len(steps) <= MOST_CHECKPOINTS:
        return list(steps)
    spread = {steps[round(i * (len(steps) - 1) / (MOST_CHECKPOINTS - 2))] for i in range(MOST_CHECKPOINTS - 1)}
    return sorted(spread | ({best} & set(steps)))


def _grids(drawn: Mapping[int, Shown]) -> list[dict[str, Any]]:
    """Return the title and rows of each grid; a row is a prompt, a cell one checkpoint's picture of it."""
    newest = drawn[max(drawn)]
    if any(list(one.prompt) != list(newest.prompt) for one in drawn.values()):
        return []  # the checkpoints were evaluated with different prompts
    grids = []
    if np.isfinite(newest.score).all() and len(newest.score) > 1:
        best, worst = best_and_worst(newest.score)
        grids = [("Prompts with the best scores at the newest checkpoint", best), ("... and the worst", worst)]
    for category in dict.fromkeys(newest.category):
        title = f"Category: {category}" if category else "Same prompts, same noise"
        grids.append((title, [int(row) for row in np.flatnonzero(newest.category == category)]))
    return [{"title": title, "rows": [_grid_row(drawn, row) for row in rows]} for title, rows in grids]


def _grid_row(drawn: Mapping[int, Shown], row: int) -> dict[str, Any]:
    cells = []
    for one in drawn.values():
        score = one.score[row]
        note = f"{score:.3g}" if np.isfinite(score) else ""
        cells.append({"source": embedded(one.picture[row], SMALL), "note": note})
    return {"prompt": str(next(iter(drawn.values())).prompt[row]), "cells": cells}


def _curve(name: str, entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the coordinates of one figure's points in a 320 x 180 drawing."""
    steps = list(entries)
    ends = [end for entry in entries.values() for end in entry["interval"]]
    low, high = min(ends), max(ends)

    def place(step: int, value: float) -> str:
        x = 72 + 240 * (step - steps[0]) / ((steps[-1] - steps[0]) or 1)
        return f"{x:.1f},{150 - 140 * (value - low) / ((high - low) or 1):.1f}"

    line = [place(step, entry["value"]) for step, entry in entries.items()]
    band = [place(step, entry["interval"][1]) for step, entry in entries.items()]
    band += [place(step, entry["interval"][0]) for step, entry in reversed(list(entries.items()))]
    return {
        "name": name,
        "told": told_of(name),
        "line": " ".join(line),
        "band": " ".join(band),
        "dots": [point.split(",") for point in line],
        "low": f"{round(low, 12):.4g}",
        "high": f"{high:.4g}",
        "first": steps[0],
        "last": steps[-1],
    }


def _rendered(name: str, **values: Any) -> str:
    import jinja2

    template = resources.files("training.evaluation").joinpath(f"templates/{name}").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(**values)


def _groups(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = []
    for key, title in (
        ("samples", "Right in samples, as read by the oracle; higher is better"),
        ("real", "Right in real drawings: the accuracy of the oracle itself"),
    ):
        if key in result:
            groups.append({"title": title, "head": "part", "rows": [_row(n, e, "%") for n, e in result[key].items()]})
    for stage, found in (result.get("psnr") or {}).get("stages", {}).items():
        rows = [_row(name, entry, "dB") for name, entry in found.items()]
        groups.append(
            {"title": f"PSNR of {stage} on true low-res input, dB; higher is better", "head": "method", "rows": rows}
        )
    rows = [
        {**_row(f"{title} on {name}", entry), "told": told_of(metric)}
        for metric, title in METRICS.items()
        for name, entry in result.get(metric, {}).items()
    ]
    return [*groups, {"title": "On features", "head": "figure", "rows": rows}] if rows else groups


def _row(name: str, entry: Mapping[str, Any], unit: str = "") -> dict[str, Any]:
    form = {"%": "{:.1%}", "dB": "{:.2f}"}.get(unit, "{:.4g}")
    low, high = entry["interval"]
    return {
        "name": name,
        "told": "",
        "value": form.format(entry["value"]),
        "interval": f"{form.format(low)} to {form.format(high)}",
        "n": entry["n"],
        "detectable": form.format(entry["detectable"]),
    }


def reduced(pictures: np.ndarray) -> np.ndarray:
    """Shrink square pictures, uint8 (N, H, W, 3), to at most LARGEST pixels."""
    if not len(pictures) or pictures.shape[1] <= LARGEST:
        return pictures
    return np.stack([np.asarray(Image.fromarray(p).resize((LARGEST, LARGEST))) for p in pictures])


def embedded(picture: np.ndarray | Image.Image, largest: int = LARGEST) -> str:
    """Return uint8 (H, W, 3) as a PNG data URI, shrunk to fit `largest` x `largest` pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.copy()
    image.thumbnail((largest, largest))
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def samples_section(pictures: Pictures, captions: Sequence[str]) -> Section:
    """Return a section of samples with their captions."""
    return Section("Samples", [Framed(embedded(p), c) for p, c in zip(pictures, captions, strict=True)])


def category_sections(pictures: Pictures, captions: Sequence[str], categories: Sequence[str]) -> list[Section]:
    """Return a section per category, or a single one if samples have no categories."""
    if not any(categories):
        return [samples_section(pictures, captions)]
    sections = []
    for category in dict.fromkeys(categories):
        rows = [row for row, own in enumerate(categories) if own == category]
        shown = [Framed(embedded(pictures[row]), captions[row]) for row in rows]
        sections.append(Section(f"Samples: {category or 'no category'}", shown))
    return sections


def extremes(
    pictures: Pictures | FeatureRows, captions: Sequence[str], scores: np.ndarray, title: str
) -> list[Section]:
    """Return sections of the shown samples that match their captions worst and best.

    Args:
        scores: one per picture; higher is better.
        title: name of the score.
    """
    best, worst = best_and_worst(scores)
    picked = {"worst": worst, "best": best}
    return [
        Section(
            f"{name.capitalize()} of the shown prompts by {title}",
            [Framed(embedded(pictures[i]), captions[i], f"{title} {scores[i]:.3g}") for i in places],
        )
        for name, places in picked.items()
    ]


def nearest_section(
    pictures: Pictures,
    captions: Sequence[str],
    features: FeatureRows,
    known: FeatureRows,
    originals: FeatureRows | Sequence[np.ndarray],
    name: str,
) -> Section:
    """Return a section of each shown sample next to the nearest reference picture; copies are framed.

    Args:
        features, known: features (N, d) of the shown samples, and (M, d) of the pictures to search.
        originals: the searched pictures, uint8 (M, H, W, 3), or only the first of them.
        name: name of the features.
    """
    if len(known) < 2:
        return Section("", [])
    ratios, places = closeness(features, known)
    found = {int(place): originals[int(place)] for place in places if place < len(originals)}
    return copies_section(pictures, captions, ratios, places, found, name, "reference")


def copies_section(
    pictures: Pictures,
    captions: Sequence[str],
    distances: np.ndarray,
    places: np.ndarray,
    originals: Mapping[int, np.ndarray],
    name: str,
    of: str,
) -> Section:
    """Return a section of each shown sample next to its nearest known picture; copies are framed.

    Args:
        distances: (N,) in the units of `closeness`.
        places: (N,) index of the nearest picture.
        originals: known pictures by index.
        name: name of the features.
        of: kind of the known pictures: `reference` or `training`.
    """
    shown = []
    for i, (distance, place) in enumerate(zip(distances, places, strict=True)):
        copy = bool(distance < COPY)
        note = f"distance {distance:.2f} ({name}){': a copy' if copy else ''}"
        pair = [pictures[i]] if (other := originals.get(int(place))) is None else [pictures[i], other]
        shown.append(Framed(embedded(np.concatenate(pair, axis=1)), captions[i], note, copy))
    return Section(f"Each sample next to its nearest {of} picture; copies are below {COPY:g}", shown)
