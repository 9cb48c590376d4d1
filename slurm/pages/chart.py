"""Draws curves on common axes, as a picture and in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from slurm.pages.curves import LINES, thinned
from training.pictures.sheets import default_font

MARKS = "ox+*#@%&"
"""Characters that distinguish curves in a terminal."""
MARGINS = (86, 44, 24, 46)
"""Pixels left of, above, right of and below the axes of a picture."""

Curves = Mapping[str, Sequence[tuple[int, float]]]


class Axes:
    """The ranges of all points of some curves."""

    def __init__(self, curves: Curves) -> None:
        points = [point for curve in curves.values() for point in curve]
        self.first, self.last = min(step for step, _ in points), max(step for step, _ in points)
        self.low, self.high = min(value for _, value in points), max(value for _, value in points)

    def place(self, step: int, value: float) -> tuple[float, float]:
        """Return the position (x, y) of a point, each in [0, 1], with y pointing upwards."""
        return (
            (step - self.first) / ((self.last - self.first) or 1),
            (value - self.low) / ((self.high - self.low) or 1),
        )


def picture_of(title: str, curves: Curves, width: int = 900, height: int = 420) -> Image.Image:
    """Draw a chart with its legend below the title. The legend makes it taller than `height`."""
    shown = {name: thinned(curve) for name, curve in curves.items()}
    axes, font = Axes(shown), default_font()
    left, above, right, below = MARGINS
    above += 20 * len(shown)
    image = Image.new("RGB", (width, height + 20 * len(shown)), "white")
    pen = ImageDraw.Draw(image)
    inner_width, inner_height = width - left - right, image.height - above - below
    pen.text((left, 10), title, "black", font)
    for i in range(5):
        y = above + inner_height * i / 4
        pen.line((left, y, width - right, y), "#d0d7de")
        pen.text((left - 8, y), f"{axes.high - (axes.high - axes.low) * i / 4:.4g}", "#57606a", font, anchor="rm")
    pen.text((left, image.height - below + 8), str(axes.first), "#57606a", font)
    pen.text((width - right, image.height - below + 8), f"step {axes.last}", "#57606a", font, anchor="ra")
    for number, (name, curve) in enumerate(shown.items()):
        colour = LINES[number % len(LINES)]
        places = [axes.place(*point) for point in curve]
        line = [(left + x * inner_width, above + (1 - y) * inner_height) for x, y in places]
        if len(line) > 1:
            pen.line(line, colour, 2, joint="curve")
        for x, y in line if len(line) < 60 else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        y = 36 + 20 * number
        pen.line((left, y + 8, left + 24, y + 8), colour, 3)
        pen.text((left + 32, y), f"{name}: {curves[name][-1][1]:.5g}", "black", font)
    return image


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Stack pictures of equal width vertically."""
    whole = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), "white")
    y = 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    return whole


def text_of(title: str, curves: Curves, width: int = 72, height: int = 14) -> str:
    """Draw a chart in characters; `width` and `height` are those of the plot area."""
    axes = Axes(curves)
    rows = [[" "] * width for _ in range(height)]
    for number, curve in enumerate(curves.values()):
        for point in thinned(curve, width):
            x, y = axes.place(*point)
            rows[round((1 - y) * (height - 1))][round(x * (width - 1))] = MARKS[number % len(MARKS)]
    ends = {0: f"{axes.high:.4g}", height - 1: f"{axes.low:.4g}"}
    lines = [f"{ends.get(i, ''):>10} |{''.join(row)}".rstrip() for i, row in enumerate(rows)]
    foot = f"{axes.first}{f'step {axes.last}':>{width - len(str(axes.first))}}"
    key = "   ".join(f"{MARKS[i % len(MARKS)]} {name}" for i, name in enumerate(curves))
    return "\n".join([title, *lines, f"{'':>10} +{'-' * width}", f"{'':>12}{foot}", f"{'':>12}{key}"])
