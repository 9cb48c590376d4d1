"""`cascade evaluate action=pareto results=[...]`: distance against CLIP score over a sweep, as in the Imagen paper.

A point is on the front if no other point is at least as good in both figures and better in one. Without CLIP weights
the second figure is recall: guidance trades variety for fidelity, which a distance alone does not show.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data_pipeline.common.errors import ConfigError
from training.evaluation.comparison import Evaluated, check_same_question, read_result, tied_with
from training.pictures.sheets import FAINT, GOOD, INK, PAPER, default_font, save

WIDTH, HEIGHT, EDGE = 900, 600, 70


@dataclass(frozen=True)
class Point:
    """One evaluation of the sweep."""

    path: str
    settings: dict[str, Any]
    """The settings that differ between points, such as `STAGE.guidance`."""
    x: dict[str, Any]
    """Value and interval of CLIP score or recall; higher is better."""
    y: dict[str, Any]
    """Value and interval of a distance; lower is better."""


def draw_curve(paths: Sequence[str], output: Path) -> dict[str, Any]:
    """Write pareto.json and pareto.png; return the content of the JSON: `axes`, `points`, and the indices of the
    `front`, of the `best` (smallest distance), and of those `tied` with it.

    Raises:
        ConfigError: the results are not comparable, or lack a figure.
    """
    results = [read_result(str(path)) for path in paths]
    for other in results[1:]:
        check_same_question(results[0], other)
    axes = _axes(results)
    settings = [_settings(result) for result in results]
    varied = [key for key in settings[0] if len({json.dumps(s.get(key)) for s in settings}) > 1]
    points = [
        Point(result.path, {key: own.get(key) for key in varied}, *(_figure(result, axis) for axis in axes))
        for result, own in zip(results, settings, strict=True)
    ]
    front = on_front([(point.x["value"], point.y["value"]) for point in points])
    best = min(range(len(points)), key=lambda i: points[i].y["value"])
    equal = tied_with(results[best], (result for i, result in enumerate(results) if i != best), axes[1])
    tied = [i for i, result in enumerate(results) if result.path in equal]
    found = {"axes": axes, "points": [vars(point) for point in points], "front": front, "best": best, "tied": tied}
    output.mkdir(parents=True, exist_ok=True)
    (output / "pareto.json").write_text(json.dumps(found, indent=1))
    save(picture(points, front, axes), output / "pareto.png")
    for place in front:
        point = points[place]
        print(f"{point.settings}: {axes[1]} {point.y['value']:.4g}, {axes[0]} {point.x['value']:.4g} ({point.path})")
    others = ", ".join(str(points[i].settings) for i in tied) or "no other setting"
    print(f"smallest {axes[1]}: {points[best].settings}; cannot be told apart from it: {others}")
    print(f"{output / 'pareto.png'}: {len(front)} of {len(points)} settings are on the front")
    return found


def on_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (high x and low y are better) for which no other point is at least as good in
    both and better in one, by increasing x."""
    front = [i for i, (x, y) in enumerate(points) if not any(a >= x and b <= y and (a, b) != (x, y) for a, b in points)]
    return sorted(front, key=lambda i: points[i][0])


def _axes(results: Sequence[Evaluated]) -> tuple[str, str]:
    """Return the names of the two figures to plot, by the strongest features that all results have."""
    names = [name for name in results[0].figures if all(name in other.figures for other in results)]
    for x in ("clip_score.", "recall."):
        for y in ("frechet.inception", "frechet."):
            first = next((name for name in names if name.startswith(x)), None)
            second = next((name for name in names if name.startswith(y)), None)
            if first and second:
                return first, second
    raise ConfigError("results: they lack a common distance and CLIP score or recall; evaluate with a reference")


def _figure(result: Evaluated, name: str) -> dict[str, Any]:
    metric, _, features = name.partition(".")
    return {key: result.result[metric][features][key] for key in ("value", "interval")}


def _settings(result: Evaluated) -> dict[str, Any]:
    return {
        f"{stage['name']}.{key}": value
        for stage in result.result["protocol"]["stages"]
        for key, value in stage["sampler"].items()
    }


def picture(points: Sequence[Point], front: Sequence[int], axes: Sequence[str]) -> Image.Image:
    """Plot the points with 95 % intervals as crosses; those of the front are green and connected."""
    paper = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font = ImageDraw.Draw(paper), default_font()
    ends = [[point.x["interval"] for point in points], [point.y["interval"] for point in points]]
    low, high = zip(*((min(map(min, axis)), max(map(max, axis))) for axis in ends), strict=True)

    def place(x: float, y: float) -> tuple[float, float]:
        shares = [(v - a) / ((b - a) or 1) for v, a, b in zip((x, y), low, high, strict=True)]
        return EDGE + shares[0] * (WIDTH - 2 * EDGE), HEIGHT - EDGE - shares[1] * (HEIGHT - 2 * EDGE)

    pen.rectangle((EDGE, EDGE, WIDTH - EDGE, HEIGHT - EDGE), outline=FAINT)
    pen.text((WIDTH / 2, HEIGHT - 30), f"{axes[0]} (higher is better)", fill=INK, font=font, anchor="mm")
    pen.text((EDGE, EDGE / 2), f"{axes[1]} (lower is better)", fill=INK, font=font, anchor="lm")
    for axis, values in enumerate(zip(low, high, strict=True)):
        for value in values:
            at = place(value, low[1]) if axis == 0 else place(low[0], value)
            shift = (0, 14) if axis == 0 else (-34, 0)
            pen.text((at[0] + shift[0], at[1] + shift[1]), f"{value:.4g}", fill=FAINT, font=font, anchor="mm")
    line = [place(points[i].x["value"], points[i].y["value"]) for i in front]
    if len(line) > 1:
        pen.line(line, fill=GOOD, width=2)
    for i, point in enumerate(points):
        x, y = point.x["value"], point.y["value"]
        colour = GOOD if i in front else FAINT
        pen.line([place(point.x["interval"][0], y), place(point.x["interval"][1], y)], fill=colour)
        pen.line([place(x, point.y["interval"][0]), place(x, point.y["interval"][1])], fill=colour)
        at = place(x, y)
        pen.ellipse((at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4), fill=colour)
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.settings.items())
        side, anchor = (-7, "rs") if at[0] > WIDTH / 2 else (7, "ls")  # towards the middle: whole on the paper
        pen.text((at[0] + side, at[1] - 7), label, fill=INK, font=font, anchor=anchor)
    return paper
