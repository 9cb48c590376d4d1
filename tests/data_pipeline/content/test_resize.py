"""Resizing: Pillow's pixels on every code path, box averages to the bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.content.resize import box_average, resize_square
from tests.data_pipeline.photos import jpegs


def photo(number: int) -> Image.Image:
    return Image.open(io.BytesIO(jpegs()[number])).convert("RGB")


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 7, 8, 20])
def test_box_average_is_exact(factor: int) -> None:
    picture = np.random.default_rng(factor).integers(0, 256, (factor * 9, factor * 6, 3), dtype=np.uint8)
    picture[: 2 * factor] = 255
    mean = picture.reshape(9, factor, 6, factor, 3).astype(float).mean(axis=(1, 3))
    assert np.array_equal(box_average(picture, factor), np.floor(mean + 0.5).astype(np.uint8))


@pytest.mark.parametrize("size", [16, 100, 300])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (7, 0), (0, 5), (7, 5), (6.5, 0), (0, 3.25), (6.5, 3.25), (7, 3.25)])
@pytest.mark.parametrize("length", [150, 133.125])
def test_every_position_gives_pillows_pixels(x: float, y: float, length: float, size: int) -> None:
    """Whole, half and odd positions take different paths to the same picture; only at its edges does a pixel see less
    of its surroundings.

    Each path rounds and clips between its two directions, in its own order.
    """
    image = photo(1)
    box = (x, y, x + length, y + length)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)
    found = resize_square(np.asarray(image), x, y, length, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    border = 2 if size <= length else -(-2 * size // 130)
    difference = np.abs(found.astype(int) - expected)
    assert difference[border:, border:].max() <= 12
    assert difference[border:, border:].mean() < 0.4
    assert difference.mean() < 1.5


def test_a_square_of_the_right_size_is_copied_as_it_is() -> None:
    picture = np.asarray(photo(2)).copy()
    found = resize_square(picture, 11, 4, 64, 64)
    assert np.array_equal(found, picture[4:68, 11:75])
    picture[:] = 0
    assert found.any()


def test_constant_pictures_stay_constant() -> None:
    picture = np.full((70, 90, 3), (255, 0, 77), np.uint8)
    for x, size in ((0, 33), (2.5, 33), (0, 99), (2.5, 99)):
        assert np.all(resize_square(picture, x, 0, 70, size) == (255, 0, 77))
