"""Estimates with their intervals: where they are drawn, and in which colour."""

from __future__ import annotations

import numpy as np
from PIL import ImageColor

from training.pictures.intervals import ABOVE, BELOW, HEIGHT, LEFT, RIGHT, WIDTH, panels
from training.pictures.sheets import BAD, FAINT, GOOD


def rows_of(panel: np.ndarray, colour: str, column: int) -> np.ndarray:
    return np.nonzero((panel[:, column] == ImageColor.getrgb(colour)).all(axis=1))[0]


def test_an_interval_is_as_long_as_it_says() -> None:
    estimates = {
        "one": [("a", -4.0, -6.0, -2.0), ("b", 4.0, 1.0, 10.0), ("c", 1.0, -1.0, 3.0)],
        "two": [("a", 0, 0, 0)],
    }
    image = panels("title", estimates, " %")
    assert image.size == (WIDTH, ABOVE + 2 * HEIGHT)
    panel = np.asarray(image)[ABOVE : ABOVE + HEIGHT]
    pixels = (HEIGHT - BELOW - ABOVE) / 16  # per unit: the axis goes from -6 to 10
    step = (WIDTH - LEFT - RIGHT) / 3
    for place, (colour, low, high) in enumerate([(GOOD, -6, -2), (BAD, 1, 10), (FAINT, -1, 3)]):
        rows = rows_of(panel[: HEIGHT - BELOW + 3], colour, round(LEFT + (place + 0.5) * step))
        top, bottom = ABOVE + (10 - high) * pixels, ABOVE + (10 - low) * pixels
        assert abs(rows.min() - top) <= 2 and abs(rows.max() - bottom) <= 2, place
