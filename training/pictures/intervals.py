"""Plots of estimates with their intervals, one panel per quantity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from training.pictures.sheets import BAD, FAINT, GOOD, INK, PAPER, default_font

Estimate = tuple[str, float, float, float]
"""Label below the axis, value, and lower and upper end of its interval."""
WIDTH, HEIGHT = 760, 210
LEFT, RIGHT, ABOVE, BELOW = 80, 24, 36, 34


def panels(title: str, estimates: Mapping[str, Sequence[Estimate]], unit: str = "") -> Image.Image:
    """Draw panels below each other, each with a line at 0; intervals below 0 are green, those above it red."""
    image = Image.new("RGB", (WIDTH, ABOVE + HEIGHT * len(estimates)), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 10), title, INK, default_font())
    for number, (name, row) in enumerate(estimates.items()):
        _panel(pen, ABOVE + number * HEIGHT, name, row, unit)
    return image


def _panel(pen: ImageDraw.ImageDraw, top: int, name: str, row: Sequence[Estimate], unit: str) -> None:
    font = default_font()
    low, high = min(0.0, *(one[2] for one in row)), max(0.0, *(one[3] for one in row))
    low, high = (low, high) if high > low else (low - 1, high + 1)
    first, last = top + ABOVE, top + HEIGHT - BELOW

    def y(value: float) -> float:
        return first + (high - value) / (high - low) * (last - first)

    pen.text((LEFT, top + 10), name, INK, font)
    for value in {low, 0.0, high}:
        pen.line((LEFT, y(value), WIDTH - RIGHT, y(value)), FAINT if value == 0 else "#e0e0e0")
        if value == 0 or abs(y(value) - y(0)) > 14:  # otherwise its label would overlap that of 0
            pen.text((LEFT - 8, y(value)), f"{_short(value)}{unit}" if value else "0", FAINT, font, anchor="rm")
    step = (WIDTH - LEFT - RIGHT) / len(row)
    for place, (label, value, below, above) in enumerate(row):
        x = LEFT + (place + 0.5) * step
        colour = GOOD if above < 0 else BAD if below > 0 else FAINT
        pen.line((x, y(below), x, y(above)), colour, 3)
        for end in (below, above):
            pen.line((x - 6, y(end), x + 6, y(end)), colour, 3)
        pen.ellipse((x - 5, y(value) - 5, x + 5, y(value) + 5), colour)
        pen.text((x, last + 8), label, INK, font, anchor="ma")
        pen.text((x + 10, y(value)), _short(value), colour, font, anchor="lm")


def _short(value: float) -> str:
    return f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.2g}"
