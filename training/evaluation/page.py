"""One self-contained HTML page about an evaluation: figures, pictures and protocol; no server and no network."""

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
from training.evaluation.report import METRICS, protocol_rows

Pictures = Sequence[np.ndarray] | np.ndarray
"""uint8 (N, H, W, 3), as one array or several."""
LARGEST = 256
"""Pictures are embedded at most so wide, pixels."""
EXTREMES = 8
"""Best and worst prompts shown."""


@dataclass
class Shown:
    """One picture of the page."""

    source: str
    caption: str
    note: str = ""
    copy: bool = False
    """Suspiciously near to a reference picture."""


@dataclass
class Section:
    """Pictures under a title."""

    title: str
    pictures: list[Shown]


def html(result: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The page. Captions and settings are escaped."""
    return _rendered(
        "report.html.j2",
        title=f"Evaluation of {result['protocol']['bundle']}",
        result=result,
        groups=list(_groups(result)),
        pictures=[section for section in sections if section.pictures],
        protocol=protocol_rows(result["protocol"]),
    )


def series_html(run: str, series: Mapping[str, Any]) -> str:
    """The page of a run's evaluations: each figure over the steps, with its interval as a band.

    Args:
        series: `figure`, `best` and `steps` (step -> name -> `value`, `interval`).
    """
    steps = {int(step): figures for step, figures in series["steps"].items()}
    names = list(dict.fromkeys(name for figures in steps.values() for name in figures))
    return _rendered(
        "series.html.j2",
        title=f"Checkpoints of {run}",
        steps=len(steps),
        figure=series["figure"],
        best=series["best"],
        curves=[_curve(name, {s: f[name] for s, f in sorted(steps.items()) if name in f}) for name in names],
    )


def _curve(name: str, entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Places of one figure's points in a picture of 320 x 180."""
    steps = list(entries)
    ends = [end for entry in entries.values() for end in entry["interval"]]
    low, high = min(ends), max(ends)

    def place(step: int, value: float) -> str:
        x = 50 + 260 * (step - steps[0]) / ((steps[-1] - steps[0]) or 1)
        return f"{x:.1f},{150 - 140 * (value - low) / ((high - low) or 1):.1f}"

    line = [place(step, entry["value"]) for step, entry in entries.items()]
    band = [place(step, entry["interval"][1]) for step, entry in entries.items()]
    band += [place(step, entry["interval"][0]) for step, entry in reversed(list(entries.items()))]
    return {
        "name": name,
        "line": " ".join(line),
        "band": " ".join(band),
        "dots": [point.split(",") for point in line],
        "low": f"{low:.4g}",
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
    for key, title in (("samples", "Right in samples, as read by the oracle"), ("real", "Right in real drawings")):
        if key in result:
            groups.append({"title": title, "head": "part", "rows": [_row(n, e, "%") for n, e in result[key].items()]})
    for stage, found in (result.get("psnr") or {}).get("stages", {}).items():
        rows = [_row(name, entry, "dB") for name, entry in found.items()]
        groups.append({"title": f"PSNR of {stage} on true low-res input, dB", "head": "way", "rows": rows})
    rows = [
        _row(f"{title} on {name}", entry)
        for metric, title in METRICS.items()
        for name, entry in result.get(metric, {}).items()
    ]
    return [*groups, {"title": "On features", "head": "figure", "rows": rows}] if rows else groups


def _row(name: str, entry: Mapping[str, Any], unit: str = "") -> dict[str, Any]:
    form = {"%": "{:.1%}", "dB": "{:.2f}"}.get(unit, "{:.4g}")
    low, high = entry["interval"]
    return {
        "name": name,
        "value": form.format(entry["value"]),
        "interval": f"{form.format(low)} to {form.format(high)}",
        "n": entry["n"],
        "detectable": form.format(entry["detectable"]),
    }


def embedded(picture: np.ndarray | Image.Image) -> str:
    """A data URI of uint8 (H, W, 3)."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def samples_section(pictures: Pictures, captions: Sequence[str]) -> Section:
    """The first samples with their captions."""
    return Section("Samples", [Shown(embedded(p), c) for p, c in zip(pictures, captions, strict=True)])


def extremes(pictures: Pictures, captions: Sequence[str], scores: np.ndarray, title: str) -> list[Section]:
    """Those of the shown samples that fit their captions best and worst.

    Args:
        scores: one per picture; higher is better.
    """
    order = np.argsort(scores, kind="stable")
    count = min(EXTREMES, len(order) // 2)
    picked = {"worst": order[:count], "best": order[::-1][:count]}
    return [
        Section(
            f"{name.capitalize()} of the shown prompts by {title}",
            [Shown(embedded(pictures[i]), captions[i], f"{title} {scores[i]:.3g}") for i in places],
        )
        for name, places in picked.items()
    ]


def nearest_section(
    pictures: Pictures,
    captions: Sequence[str],
    features: np.ndarray,
    known: np.ndarray,
    originals: Mapping[int, np.ndarray],
    name: str,
) -> Section:
    """Beside each shown sample the nearest known picture; copies are framed.

    Args:
        features, known: (N, d) of the shown samples and (M, d) of the pictures searched.
        originals: place -> picture, of those of the M pictures that are at hand.
    """
    if len(known) < 2:
        return Section("", [])
    ratios, places = closeness(features, known)
    shown = []
    for i, (ratio, place) in enumerate(zip(ratios, places, strict=True)):
        copy = bool(ratio < COPY)
        note = f"distance {ratio:.2f} ({name}){': a copy' if copy else ''}"
        pair = [pictures[i]] if (other := originals.get(int(place))) is None else [pictures[i], other]
        shown.append(Shown(embedded(np.concatenate(pair, axis=1)), captions[i], note, copy))
    return Section("Each sample beside the nearest reference picture; a copy is below 0.5", shown)
