"""Colour profiles: converts pictures in Adobe RGB, Display P3 and other spaces to sRGB, in which models are trained."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from data_pipeline.common.recent import Recent

_NEAR = 3
"""A profile whose colours differ from sRGB by at most this many of 255 steps counts as sRGB; pixels are kept as is."""
_KEPT = 16


class _Transforms(threading.local):
    """A cache of colour transforms by profile; one per thread, because transforms hold state."""

    def __init__(self) -> None:
        self.known: Recent[tuple[bytes, str], Any] = Recent(_KEPT)

    def get(self, profile: bytes, mode: str) -> Any:
        key = profile, mode
        found = self.known.get(key)
        return (found or self.known.put(key, (_transform(profile, mode),)))[0]


_transforms = _Transforms()


def convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image to RGB, and its colours from an ICC profile to sRGB.

    Profiles that are damaged, made for another pixel format or practically sRGB are ignored. Without a profile the
    colours are assumed to be sRGB.
    """
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    transform = _transforms.get(profile, image.mode) if profile else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    return ImageCms.applyTransform(image, transform) or image


def to_srgb(picture: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Like `convert_profile`, for uint8 (H, W, 3) in RGB; a picture with a grey profile has three equal channels."""
    if not profile:
        return picture
    transform = _transforms.get(profile, "RGB")
    if transform is not None:
        return np.asarray(ImageCms.applyTransform(Image.fromarray(picture), transform))
    transform = _transforms.get(profile, "L")
    if transform is not None:
        return np.asarray(ImageCms.applyTransform(Image.fromarray(picture[:, :, 0]), transform))
    return picture


def icc_of_jpeg(data: bytes) -> bytes | None:
    """Return the ICC profile in a JPEG's segments before the image data; None if it is missing or incomplete."""
    parts: dict[int, bytes] = {}
    total = 0
    for marker, begin, end in jpeg_segments(data):
        if marker == 0xE2 and data[begin : begin + 12] == b"ICC_PROFILE\0" and end - begin >= 14:
            total = data[begin + 13]
            parts[data[begin + 12]] = data[begin + 14 : end]
    if not parts or sorted(parts) != list(range(1, total + 1)):
        return None
    return b"".join(parts[number] for number in sorted(parts))


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, first byte, end byte) of the content of each segment before a JPEG's image data.

    The end byte of a truncated segment lies beyond the data.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xDA:
            return
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        at = end


def _transform(profile: bytes, mode: str) -> Any:
    """Build the transform of pixels of `mode` to sRGB; None if none is needed or the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != mode:
            return None
        made = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return made
        probe = _probe(mode)
        shown = np.asarray(ImageCms.applyTransform(probe, made), np.int16)
        return None if np.abs(shown - np.asarray(probe.convert("RGB"), np.int16)).max() <= _NEAR else made
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a damaged profile does not make the pixels bad


def _probe(mode: str) -> Image.Image:
    """Return an image of colours spread over the colour space."""
    if mode == "L":
        return Image.fromarray(np.arange(0, 256, 5, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(np.ascontiguousarray(grid))
