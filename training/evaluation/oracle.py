"""Reads captioned shapes from pictures, without any model: background, colour, size, shape, relation.

    background   the palette background nearest to the median colour of the picture's border
    colour       each pixel votes for its nearest palette colour (or background, or outline), weighted by its distance
    shape, size  those of the drawn template with the best overlap (intersection over union) anywhere in the picture, at
                 the picture's own size; with too little overlap a blob has no shape, and with still less no size
    relation     the main direction between the two templates' centres

Shapes: H = W pixels, pictures uint8 (H, W, 3).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.content.synthetic import (
    BACKGROUNDS,
    COLOURS,
    OUTLINE_SHADE,
    RELATIONS,
    SHAPES,
    SIZES,
    ShapeSpec,
    Thing,
    render,
)

LEAST_OVERLAP = {1: 0.8, 2: 0.75}
"""Intersection over union, by the number of objects, below which a blob has no shape; a disc in a square has 0.785."""
LEAST_SIZE_OVERLAP = 0.5
"""The same for having a size."""
LEAST_SHARE = 0.004
"""Fraction of the picture below which an object is ignored as a speck."""
SMOOTH_SIDE = 32
"""Minimum side of pictures whose masks are smoothed."""
CLEAR = 60.0
"""RGB distance from a palette colour at which a pixel's vote has fallen to 61 %."""
WINDOW_MARGIN = 0.04
"""With two objects, pixels further from a template than this fraction of the side are ignored for it."""
BACKGROUND_LABEL = 2 * len(COLOURS)


@dataclass(frozen=True)
class Seen:
    """One recognised object; `size` and `shape` are None if no template fits well enough."""

    colour: str
    size: str | None
    shape: str | None
    overlap: float
    centre: tuple[float, float]
    """x, y in pixels."""


@dataclass(frozen=True)
class Reading:
    """What the oracle recognised in a picture."""

    background: str
    objects: tuple[Seen, ...]
    """Objects by colour, the one with the most pixels first."""

    def __str__(self) -> str:
        things = [f"{o.size or '?'} {o.colour} {o.shape or '?'}" for o in self.objects] or ["nothing"]
        return f"{' and '.join(things)} on {self.background}"


def read_drawing(picture: np.ndarray, objects: int = 1) -> Reading:
    """Recognise at most `objects` (1 or 2) objects.

    Args:
        picture: uint8 (H, H, 3), H at least 16; shapes can be told apart from about 32.
    """
    background = _background(picture)
    labels, distances = _labels(picture, background)
    colours = _colours(labels, distances, objects)
    foreground = labels != BACKGROUND_LABEL
    masks = [_smooth(foreground)] if objects == 1 else _owned(labels, foreground, colours)
    seen = [_fit(mask, list(COLOURS)[c], background, objects) for c, mask in zip(colours, masks, strict=False)]
    return Reading(background, tuple(seen))


def _colours(labels: np.ndarray, distances: np.ndarray, objects: int) -> list[int]:
    """Return the colours of at most `objects` objects, the most frequent first; pure colours count more than blends."""
    weights = np.exp(-0.5 * np.square(distances / CLEAR))
    found: list[int] = []
    while len(found) < objects:
        votes = np.bincount(labels.ravel(), weights.ravel(), minlength=BACKGROUND_LABEL)[: len(COLOURS)]
        if votes.max() < LEAST_SHARE * labels.size:
            break
        found.append(int(votes.argmax()))
        weights[_widened(_mask_of(labels, found[-1]))] = 0  # an object's soft edge may look like another colour
    return found


def score(reading: Reading, spec: ShapeSpec) -> dict[str, bool]:
    """Return which parts of a caption are right: background, colour, size, shape, for two objects relation, and all."""
    pairs = _matched(reading.objects, spec.objects)
    complete = len(pairs) == len(spec.objects)
    result = {
        "background": reading.background == spec.background,
        "colour": complete and all(seen.colour == thing.colour for seen, thing in pairs),
        "size": complete and all(seen.size == thing.size for seen, thing in pairs),
        "shape": complete and all(seen.shape == thing.shape for seen, thing in pairs),
    }
    if spec.relation is not None:
        result["relation"] = complete and _relation(pairs[0][0], pairs[1][0]) == spec.relation
    result["all"] = all(result.values())
    return result


def _matched(seen: tuple[Seen, ...], things: tuple[Thing, ...]) -> list[tuple[Seen, Thing]]:
    """Pair recognised objects with the caption's, in its order, such that the most words are right (colours first)."""

    def agreement(order: tuple[Seen, ...]) -> tuple[int, int]:
        pairs = list(zip(order, things, strict=True))
        colours = sum(s.colour == t.colour for s, t in pairs)
        return colours, sum((s.size == t.size) + (s.shape == t.shape) for s, t in pairs)

    if len(seen) < len(things):
        return []
    best = max(itertools.permutations(seen, len(things)), key=agreement)
    return list(zip(best, things, strict=True))


def _relation(first: Seen, second: Seen) -> str:
    x, y = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    main = (np.sign(x), 0) if abs(x) > abs(y) else (0, np.sign(y))
    return next((word for word, direction in RELATIONS.items() if direction == main), "")


def _background(picture: np.ndarray) -> str:
    frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(np.float64)
    distances = np.linalg.norm(np.array(list(BACKGROUNDS.values())) - np.median(frame, axis=0), axis=1)
    return list(BACKGROUNDS)[int(distances.argmin())]


def _labels(picture: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the label of each pixel (0..5 a colour, 6..11 its outline, 12 the background), and its RGB distance from
    that colour."""
    colours = np.array(list(COLOURS.values()), dtype=np.float64)
    palette = np.concatenate([colours, colours * OUTLINE_SHADE, [BACKGROUNDS[background]]])
    distances = np.linalg.norm(picture[:, :, None, :].astype(np.float64) - palette, axis=-1)
    return distances.argmin(axis=-1), distances.min(axis=-1)


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """Return the sum of each 3 x 3 neighbourhood."""
    padded = np.pad(mask, 1).astype(np.int32)
    side = len(mask)
    return np.sum([padded[y : y + side, x : x + side] for y in range(3) for x in range(3)], axis=0)


def _widened(mask: np.ndarray) -> np.ndarray:
    """Return the mask and all pixels that touch it."""
    return _neighbours(mask) > 0


def _smooth(mask: np.ndarray) -> np.ndarray:
    """Remove noise by the majority of each 3 x 3 neighbourhood, unless the picture is so small that shapes are few
    pixels wide."""
    return _neighbours(mask) > 4 if len(mask) >= SMOOTH_SIDE else mask


def _owned(labels: np.ndarray, foreground: np.ndarray, colours: list[int]) -> list[np.ndarray]:
    """Return the part of the foreground that each colour reaches first when growing from its largest patch, so that
    blends at an edge belong to the object they surround, whatever palette colour they resemble."""
    owned = [_largest_patch(labels == colour) for colour in colours]
    free = foreground & ~np.any([np.zeros_like(foreground), *owned], axis=0)
    grown = True
    while grown:
        grown = False
        for i, mask in enumerate(owned):
            new = _widened(mask) & free
            owned[i] = mask | new
            free &= ~new
            grown |= bool(new.any())
    return owned


def _largest_patch(mask: np.ndarray) -> np.ndarray:
    """Return the connected part of the mask around its densest place."""
    density = mask.astype(np.int32)
    for _ in range(3):
        density = _neighbours(density)
    patch = np.zeros_like(mask)
    patch.flat[int((density * mask).argmax())] = True
    while True:
        wider = _widened(patch) & mask
        if (wider == patch).all():
            return patch
        patch = wider


def _mask_of(labels: np.ndarray, colour: int) -> np.ndarray:
    return (labels == colour) | (labels == colour + len(COLOURS))


def _fit(mask: np.ndarray, colour: str, background: str, objects: int) -> Seen:
    side, templates = len(mask), _templates(colour, background, objects, len(mask))
    spectrum = np.fft.rfft2(mask, s=(2 * side, 2 * side))

    def correlate(pattern_spectra: np.ndarray) -> np.ndarray:
        return np.fft.irfft2(spectrum * np.conj(pattern_spectra), s=(2 * side, 2 * side))

    inside, near = correlate(templates.spectra), correlate(templates.windows)
    overlaps = inside / (near + templates.areas[:, None, None] - inside)
    best, row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
    overlap = float(overlaps[best, row, column])
    size, shape = templates.names[best]
    shift = (np.array([column, row]) + side) % (2 * side) - side
    x, y = templates.centres[best] + shift
    has_shape, has_size = overlap >= LEAST_OVERLAP[objects], overlap >= LEAST_SIZE_OVERLAP
    return Seen(colour, size if has_size else None, shape if has_shape else None, overlap, (float(x), float(y)))


@dataclass(frozen=True)
class _Templates:
    """The masks of all (size, shape), as recognised in drawings, prepared for matching at any shift."""

    names: list[tuple[str, str]]
    areas: np.ndarray
    centres: np.ndarray
    """(K, 2): x, y in pixels."""
    spectra: np.ndarray
    windows: np.ndarray
    """Spectra of the regions to match: the whole picture or, with two objects, the template's surroundings."""


@lru_cache(maxsize=256)
def _templates(colour: str, background: str, objects: int, side: int) -> _Templates:
    names = list(itertools.product(SIZES, SHAPES))
    other = next(name for name in COLOURS if name != colour)
    masks, windows, centres = [], [], []
    for size, shape in names:
        things: tuple[Thing, ...] = (Thing(colour, size, shape),)
        if objects == 2:
            things = (*things, Thing(other, "small", "circle"))
        spec = ShapeSpec(background, things, "above" if objects == 2 else None)
        mask = _labels(render(spec, side), background)[0] != BACKGROUND_LABEL
        if objects == 2:
            mask[side // 2 :] = False
        rows, columns = np.nonzero(mask)
        window = np.ones((2 * side, 2 * side))
        if objects == 2:
            margin = round(WINDOW_MARGIN * side)
            window[:] = 0
            window[
                max(0, rows.min() - margin) : rows.max() + margin + 1,
                columns.min() - margin : columns.max() + margin + 1,
            ] = 1
        masks.append(_smooth(mask) if objects == 1 else mask)
        windows.append(window)
        centres.append([(columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2])
    stack = np.stack(masks).astype(np.float64)
    double = (2 * side, 2 * side)
    return _Templates(
        names,
        stack.sum(axis=(1, 2)),
        np.array(centres),
        np.fft.rfft2(stack, s=double),
        np.fft.rfft2(np.stack(windows), s=double),
    )
