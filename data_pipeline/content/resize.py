"""Resizes uint8 pictures (H, W, 3): Pillow's antialiased bicubic filter, several times faster, and box averages."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_WHOLE = 1e-3
"""Tolerance, in pixels, within which a coordinate counts as a whole pixel."""


def box_average(picture: np.ndarray, factor: int) -> np.ndarray:
    """Return the mean of each block of factor x factor pixels, halves rounded up.

    Args:
        picture: uint8 (H, W, 3); `factor` divides H and W.

    Returns:
        uint8 (H / factor, W / factor, 3).
    """
    wide = np.uint16 if 256 * factor**2 < 2**16 else np.uint32
    rows = picture[::factor].astype(wide)
    for offset in range(1, factor):
        np.add(rows, picture[offset::factor], out=rows)
    total = rows[:, ::factor].copy()
    for offset in range(1, factor):
        np.add(total, rows[:, offset::factor], out=total)
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


def resize_square(picture: np.ndarray, x: float, y: float, length: float, size: int) -> np.ndarray:
    """Return a copy of the square with upper left corner (x, y) and side `length`, resized to size x size pixels.

    torch is fast but can only start at a whole pixel; Pillow handles an axis on which the square does not. The two
    agree to within 1 of 255, except that torch's filter does not look beyond the first edge of the square.
    """
    whole = abs(y - round(y)) < _WHOLE, abs(x - round(x)) < _WHOLE
    if all(whole) and abs(length - size) < _WHOLE:
        return picture[round(y) : round(y) + size, round(x) : round(x) + size].copy()
    if any(whole):
        picture = _fast(picture, (y, x), length, size, whole)
    if all(whole):
        return picture
    top, bottom = (0, size) if whole[0] else (y, min(y + length, picture.shape[0]))
    left, right = (0, size) if whole[1] else (x, min(x + length, picture.shape[1]))
    box = (left, top, right, bottom)
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC, box=box))


def resize_box(picture: np.ndarray, box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """Return the part `box` (left, top, right, bottom) of a picture, resized to `shape` (width, height)."""
    height, width = picture.shape[:2]
    inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
    return np.array(Image.fromarray(picture).resize(shape, Image.Resampling.BICUBIC, box=inside))


def _fast(
    picture: np.ndarray, start: tuple[float, float], length: float, size: int, axes: tuple[bool, bool]
) -> np.ndarray:
    """Resize [start, start + length) of the selected axes (rows, columns) to `size` pixels; keep the others as is."""
    import torch

    reach = 2 * max(length / size, 1)  # radius of the kernel, in source pixels
    for axis in (0, 1):
        if axes[axis]:
            first = round(start[axis])
            part = slice(first, min(math.ceil(first + length + reach), picture.shape[axis]))
            picture = picture[part] if axis == 0 else picture[:, part]
    sides = [size if axes[axis] else picture.shape[axis] for axis in (0, 1)]
    scales = [size / length if axes[axis] else 1.0 for axis in (0, 1)]
    if not picture.flags.writeable:
        picture = picture.copy()  # torch does not support read-only memory
    pixels = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)  # permuted: torch recognises channels_last memory
    # The operator behind F.interpolate, which takes either a size or scales; we need both.
    resized = torch.ops.aten._upsample_bicubic2d_aa(pixels, sides, False, *scales)
    return resized[0].permute(1, 2, 0).numpy()
