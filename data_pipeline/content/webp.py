"""Still WebP pictures decoded straight into an array; Pillow's reader holds four copies of 4 bytes a pixel."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np


@cache
def _decoder(name: str) -> Any:
    """Return a function of libwebp's, from the library that Pillow has loaded; None if it is out of reach."""
    try:
        from PIL import _webp

        found = getattr(ctypes.CDLL(_webp.__file__), name)
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    found.restype = ctypes.c_void_p
    found.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def decode_still(data: bytes, width: int, height: int, mode: str) -> np.ndarray | None:
    """Decode a WebP that is not animated.

    Args:
        data: the encoded picture.
        width, height: its size in pixels, according to its header.
        mode: RGB or RGBA.

    Returns:
        uint8 (H, W, 3) or (H, W, 4); None for animated or damaged pictures, which Pillow must judge.
    """
    decode = _decoder(f"WebPDecode{mode}Into")
    if decode is None:
        return None
    picture = np.zeros((height, width, len(mode)), np.uint8)
    return picture if decode(data, len(data), picture.ctypes.data, picture.nbytes, len(mode) * width) else None
