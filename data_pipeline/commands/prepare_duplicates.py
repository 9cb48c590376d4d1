"""Finds duplicate pictures, by their bytes or by what they show. Pure functions, used by `prepare.py`.

What a picture shows is represented by a 128-bit difference hash (imagehash's horizontal and vertical ones: which
neighbour is brighter on an 8 x 8 grid) and a 4 x 4 colour thumbnail. Both survive resizing and recompression, but not
cropping.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.common.errors import ConfigError
from data_pipeline.content.images import decode

MAX_BITS = 10
"""Most bits of 128 in which the hashes of duplicates may differ."""
MAX_COLOUR = 24
"""Most steps of 255 by which any value of the thumbnails of duplicates may differ."""
_HASH_BITS = 128
_BANDS = MAX_BITS + 1  # hashes that differ in at most MAX_BITS bits agree in at least one of this many bands


@dataclass(frozen=True)
class Print:
    """The properties of a picture that are compared."""

    pixels: int
    exact: str
    """Hash of the encoded bytes."""
    shape: int = 0
    thumbnail: bytes = b""

    def to_json(self) -> list[Any]:
        """Return the print as plain values."""
        return [self.pixels, self.exact, f"{self.shape:x}", self.thumbnail.hex()]

    @staticmethod
    def from_json(values: Sequence[Any]) -> Print:
        """Return the print from the result of `to_json`."""
        return Print(int(values[0]), str(values[1]), int(values[2], 16), bytes.fromhex(values[3]))


@dataclass(frozen=True)
class Duplicate:
    """A duplicate: `of` is the number of the picture kept instead, `bits` how many bits of the hashes differ (None: the
    bytes are equal)."""

    of: int
    bits: int | None


def fingerprint(data: bytes, pixels: int, perceptual: bool, max_pixels: int) -> Print:
    """Return the print of an encoded picture.

    Args:
        data: the encoded picture.
        pixels: its width times height.
        perceptual: include the hash and the thumbnail, for which it is decoded.
        max_pixels: see `images.decode`.

    Raises:
        BadSample: it cannot be decoded (only if `perceptual`).
        ConfigError: imagehash is not installed (only if `perceptual`).
    """
    exact = hashlib.blake2b(data, digest_size=16).hexdigest()
    if not perceptual:
        return Print(pixels, exact)
    try:
        import imagehash
    except ImportError as error:
        raise ConfigError(
            "prepare.deduplicate=perceptual: the package imagehash is missing; install it with `pip install imagehash`"
        ) from error
    picture = Image.fromarray(decode(data, target=32, max_pixels=max_pixels))
    bits = np.concatenate([imagehash.dhash(picture).hash.ravel(), imagehash.dhash_vertical(picture).hash.ravel()])
    thumbnail = picture.resize((4, 4), Image.Resampling.BOX).tobytes()
    return Print(pixels, exact, int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail)


def find(prints: Sequence[Print | None], perceptual: bool) -> dict[int, Duplicate]:
    """Return the pictures to drop, by number. The largest of a group is kept, or the first of equally large ones.

    Args:
        prints: one per picture; None for those to ignore.
        perceptual: also drop pictures that show the same.
    """
    order = sorted((i for i, one in enumerate(prints) if one), key=lambda i: (-_known(prints[i]).pixels, i))
    same_bytes: dict[str, int] = {}
    alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    found: dict[int, Duplicate] = {}
    for number in order:
        one = _known(prints[number])
        first = same_bytes.setdefault(one.exact, number)
        if first != number:
            found[number] = found.get(first, Duplicate(first, None))
            continue
        if not perceptual:
            continue
        bands = list(_bands(one.shape))
        candidates = dict.fromkeys(other for band in bands for other in alike[band])
        near = _nearest(one, number, ((other, _known(prints[other])) for other in candidates))
        if near:
            found[number] = near
            continue
        for band in bands:
            alike[band].append(number)
    return found


def _known(one: Print | None) -> Print:
    assert one is not None
    return one


def _nearest(one: Print, number: int, others: Iterable[tuple[int, Print]]) -> Duplicate | None:
    best: Duplicate | None = None
    fewest = MAX_BITS + 1
    for other, candidate in others:
        bits = (one.shape ^ candidate.shape).bit_count()
        if bits < fewest and _same_colours(one, candidate):
            best, fewest = Duplicate(other, bits), bits
    return best


def _same_colours(a: Print, b: Print) -> bool:
    pairs = zip(a.thumbnail, b.thumbnail, strict=True)
    return max((abs(x - y) for x, y in pairs), default=0) <= MAX_COLOUR


def _bands(shape: int) -> Iterable[tuple[int, int]]:
    """Yield (number, bits) of each of `_BANDS` nearly equal parts of the hash."""
    edges = [_HASH_BITS * i // _BANDS for i in range(_BANDS + 1)]
    for band in range(_BANDS):
        width = edges[band + 1] - edges[band]
        yield band, (shape >> edges[band]) & ((1 << width) - 1)
