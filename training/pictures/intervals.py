"""Plots of relative changes with their intervals, one panel per quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from training.pictures.sheets import BAD, FAINT, GOOD, INK, PAPER, default_font

Estimate = tuple[str, float, float, float]
"""Label below the axis; a relative change in per cent, > -100, and the lower and upper end of its interval."""
WIDTH, HEIGHT = 760, 210
LEFT, RIGHT, ABOVE, BELOW = 80, 24, 36, 34
ROOM = 14
"""Least distance between two labels of the axis, pixels."""


def panels(title: str, estimates: Mapping[str, Sequence[Estimate]]) -> Image.Image:
    """Draw panels below each other, each with a line at 0; intervals below 0 are green, those above it red.

    The axis is logarithmic, so that a factor looks alike in both directions: +100 % is as far from 0 as -50 %.
    """
    image = Image.new("RGB", (WIDTH, ABOVE + HEIGHT * len(estimates)), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 10), title, INK, default_font())
    for number, (name, row) in enumerate(estimates.items()):
        _panel(pen, ABOVE + number * HEIGHT, name, row)
    return image


def place(percent: float) -> float:
    """Return the place of a change on the axis: the logarithm of the factor that it is."""
    return math.log1p(max(percent, -99.9) / 100)


def _panel(pen: ImageDraw.ImageDraw, top: int, name: str, row: Sequence[Estimate]) -> None:
    font = default_font()
    low, high = min(0.0, *(one[2] for one in row)), max(0.0, *(one[3] for one in row))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    first, last = top + ABOVE, top + HEIGHT - BELOW

    def y(value: float) -> float:
        return first + (place(high) - place(value)) / (place(high) - place(low)) * (last - first)

    pen.text((LEFT, top + 10), name, INK, font)
    labelled: list[float] = []
    for value in (0.0, low, high, -50.0, 100.0):
        if low <= value <= high and all(abs(y(value) - y(other)) >= ROOM for other in labelled):
            labelled.append(value)
            pen.line((LEFT, y(value), WIDTH - RIGHT, y(value)), FAINT if value == 0 else "#e0e0e0")
            pen.text((LEFT - 8, y(value)), f"{_short(value)} %" if value else "0", FAINT, font, anchor="rm")
    step = (WIDTH - LEFT - RIGHT) / len(row)
    for number, (label, value, below, above) in enumerate(row):
        x = LEFT + (number + 0.5) * step
        colour = GOOD if above < 0 else BAD if below > 0 else FAINT
        pen.line((x, y(below), x, y(above)), colour, 3)
        for end in (below, above):
            pen.line((x - 6, y(end), x + 6, y(end)), colour, 3)
        pen.ellipse((x - 5, y(value) - 5, x + 5, y(value) + 5), colour)
        pen.text((x, last + 8), label, INK, font, anchor="ma")
        pen.text((x + 10, y(value) - 1), _short(value), colour, font, anchor="lb")  # above the line at 0


def _short(value: float) -> str:
    return f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.2g}"
