"""The curves of a run: the values in metrics.jsonl over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.run.directory import json_lines

Curve = list[tuple[int, float]]
"""(step, value), in ascending order of steps."""
MOST_POINTS = 300
"""Most points of a curve on a page or picture; longer curves are averaged over pieces."""
LINES = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#0a3069")
"""Colours of lines, in order."""
LEVELS = ("validation_t/", "loss_t/")
"""Prefixes of losses by noise level, held-out ones first."""


def curves_of(run_dir: Path) -> dict[str, Curve]:
    """Return the curve of every number in metrics.jsonl by name; lines without the number are skipped."""
    found: dict[str, Curve] = {}
    for line in json_lines(run_dir / "metrics.jsonl"):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, []).append((step, float(value)))
    return found


def thinned(curve: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> Curve:
    """Reduce a curve to at most `most` points: means of equal pieces, placed at their last steps."""
    if len(curve) <= most:
        return list(curve)
    cuts = [len(curve) * i // most for i in range(most + 1)]
    pieces = [curve[a:b] for a, b in pairwise(cuts)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def by_level(curves: Mapping[str, Curve]) -> tuple[str, dict[str, Curve]]:
    """Return the losses by noise level: which ones they are (a prefix in LEVELS), and level -> curve.

    They are those of held-out pictures if the run was validated, otherwise those of training.
    """
    for prefix in LEVELS:
        levels = {name.removeprefix(prefix): curve for name, curve in curves.items() if name.startswith(prefix)}
        if levels:
            return prefix, dict(sorted(levels.items()))
    return LEVELS[-1], {}


def drawn(curves: Mapping[str, Sequence[tuple[int, float]]], width: int = 320, height: int = 180) -> dict[str, Any]:
    """Return curves on common axes for an SVG: `lines` (name -> points), `last_values`, and the labels of the axes."""
    left, bottom, top = 46, 26, 8
    shown = {name: thinned(curve) for name, curve in curves.items() if curve}
    steps = [step for curve in shown.values() for step, _ in curve]
    values = [value for curve in shown.values() for _, value in curve]
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def place(step: int, value: float) -> str:
        x = left + (width - left - 8) * (step - first) / ((last - first) or 1)
        return f"{x:.1f},{height - bottom - (height - bottom - top) * (value - low) / ((high - low) or 1):.1f}"

    return {
        "lines": {name: " ".join(place(*point) for point in curve) for name, curve in shown.items()},
        "last_values": {name: f"{curve[-1][1]:.4g}" for name, curve in curves.items() if curve},
        "first": first,
        "last": last,
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
    }
