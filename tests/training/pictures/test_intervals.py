"""Relative changes and their intervals: their positions and colours in the plot."""

from __future__ import annotations

import math

import numpy as np
from PIL import ImageColor

from training.pictures.intervals import ABOVE, BELOW, HEIGHT, LEFT, RIGHT, WIDTH, panels
from training.pictures.sheets import BAD, FAINT, GOOD


def rows_of(panel: np.ndarray, colour: str, column: int) -> np.ndarray:
    return np.nonzero((panel[:, column] == ImageColor.getrgb(colour)).all(axis=1))[0]


def test_an_interval_is_as_long_as_it_says() -> None:
    estimates = {
        "one": [("a", -40.0, -50.0, -20.0), ("b", 150.0, 100.0, 300.0), ("c", 1.0, -20.0, 25.0)],
        "two": [("a", 0, 0, 0)],
    }
    image = panels("title", estimates)
    assert image.size == (WIDTH, ABOVE + 2 * HEIGHT)
    panel = np.asarray(image)[ABOVE : ABOVE + HEIGHT]
    pixels = (HEIGHT - BELOW - ABOVE) / 3  # per factor of two: the axis goes from a half to four times
    step = (WIDTH - LEFT - RIGHT) / 3
    for place, (colour, low, high) in enumerate([(GOOD, 0.5, 0.8), (BAD, 2, 4), (FAINT, 0.8, 1.25)]):
        rows = rows_of(panel[: HEIGHT - BELOW + 3], colour, round(LEFT + (place + 0.5) * step))
        top, bottom = (ABOVE + (2 - math.log2(factor)) * pixels for factor in (high, low))
        assert abs(rows.min() - top) <= 2 and abs(rows.max() - bottom) <= 2, place
