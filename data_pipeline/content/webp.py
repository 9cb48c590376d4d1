"""WebP pictures, or their first frames, decoded straight into an array; Pillow's reader holds four copies of 4 bytes a
pixel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
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
    """Decode a WebP; of an animated one the first frame.

    Args:
        data: the encoded picture.
        width, height: its size in pixels, according to its header.
        mode: RGB or RGBA.

    Returns:
        uint8 (H, W, 3) or (H, W, 4), 0 where the first frame does not cover the picture; None for damaged pictures,
        which Pillow must judge.
    """
    decode = _decoder(f"WebPDecode{mode}Into")
    if decode is None:
        return None
    picture = np.zeros((height, width, len(mode)), np.uint8)
    left, top, wide, high, still = _first_frame(data) or (0, 0, width, height, data)
    if left + wide > width or top + high > height:
        return None
    target = picture[top:, left:]
    room = picture.nbytes - (top * width + left) * len(mode)
    return picture if decode(still, len(still), target.ctypes.data, room, len(mode) * width) else None


def _first_frame(data: bytes) -> tuple[int, int, int, int, bytes] | None:
    """Return (left, top, width, height, the frame as a still WebP) of an animation's first frame; else None.

    The container is that of https://developers.google.com/speed/webp/docs/riff_container.
    """
    if data[12:16] != b"VP8X":
        return None
    for name, begin, end in _chunks(data, 12, len(data)):
        if name == b"ANMF":
            number = [int.from_bytes(data[begin + at : begin + at + 3], "little") for at in (0, 3, 6, 9)]
            wide, high = number[2] + 1, number[3] + 1
            parts = {part: data[at:stop] for part, at, stop in _chunks(data, begin + 16, end)}
            sides = (wide - 1).to_bytes(3, "little") + (high - 1).to_bytes(3, "little")
            kept = {b"VP8X": b"\x10\0\0\0" + sides} if b"ALPH" in parts else {}
            kept |= {part: parts[part] for part in (b"ALPH", b"VP8 ", b"VP8L") if part in parts}
            pieces = [b"WEBP", *(_chunk(part, content) for part, content in kept.items())]
            return 2 * number[0], 2 * number[1], wide, high, _chunk(b"RIFF", b"".join(pieces))
    return None


def _chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, first byte, end byte) of the content of each chunk."""
    while at + 8 <= end:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], at + 8, min(at + 8 + size, end)
        at += 8 + size + size % 2


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
