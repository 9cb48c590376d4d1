"""Renders captioned shapes, the data of the demo and the tests. Pure functions of their arguments, no files.

A picture shows one shape ("a large red circle on a white background"), two and their relation
("a large red circle to the left of a small blue square on a white background"), three or four of different colours
("a large red circle, a small blue square and a small cyan cross on a white background"), or two to four equal ones
("three small red circles on a white background"). Colours and backgrounds are far apart in RGB, so that a program can
recognise them. Each shape has crisp edges and a thin dark outline that is visible at 64 pixels but not at 16, so that
a super-resolution stage has something to add.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.order.chance import hash_bits, hash_uniform

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
    "black": (10, 10, 10),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 205, 30),
    "purple": (170, 45, 190),
    "cyan": (40, 205, 220),
}
SIZES: dict[str, float] = {"large": 0.34, "small": 0.19}
"""Half the width of a single shape, as a fraction of the picture's side."""
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
RELATIONS: dict[str, tuple[int, int]] = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Relation of the first object to the second -> direction from the second to the first (x to the right, y down)."""

OUTLINE_WIDTH = 0.025
OUTLINE_SHADE = 0.45
PAIR_SCALE = 0.62
"""Scale of each of two objects relative to a single one, so that both fit."""
PAIR_DISTANCE = 0.23
"""Distance of each of two objects from the centre."""
CELL_SCALE, CELL_DISTANCE = 0.55, 0.25
"""The same for several objects in the quarters of the picture; the distance is per axis."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
"""Possible numbers of equal objects, in words."""
JITTER = {1: 0.05, 2: 0.02}
"""Largest random shift per axis, by number of objects; objects in quarters use that of two."""
HELDOUT_SHARE = 0.1
_HELDOUT_SALT = 279
"""Chosen such that the few held-out combinations contain every word several times."""
_REFERENCE_SIDE = 64


@dataclass(frozen=True)
class Thing:
    """One object, described by words of `COLOURS`, `SIZES` and `SHAPES`."""

    colour: str
    size: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class ShapeSpec:
    """What a picture shows on its background: one object; two and the relation of the first to the second; or, in its
    quarters, three or four objects of different colours or two to four equal ones.

    Raises:
        ValueError: any other combination.
    """

    background: str
    objects: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        count, colours = len(self.objects), len({thing.colour for thing in self.objects})
        allowed = self.relation is not None if count == 2 and not self.is_count else self.relation is None
        if not allowed or not (count == 1 or self.is_count or count == 2 or (count in (3, 4) and colours == count)):
            raise ValueError(
                "a picture shows one object, or two and their relation, or three or four of different colours, or two "
                "to four equal ones"
            )

    @property
    def is_count(self) -> bool:
        """Whether the picture shows two to four equal objects."""
        return self.relation is None and len(self.objects) in NUMBERS and len({*self.objects}) == 1

    def to_json(self) -> dict[str, object]:
        """Return the spec as plain values, for the .json member of a shard."""
        things = [{"colour": o.colour, "size": o.size, "shape": o.shape} for o in self.objects]
        return {"background": self.background, "objects": things, "relation": self.relation}


def caption(spec: ShapeSpec) -> str:
    """Return the caption that describes the spec exactly; `parse` is the inverse."""
    first, named = spec.objects[0], [str(thing) for thing in spec.objects]
    if spec.is_count:
        things = f"{NUMBERS[len(named)]} {first.size} {first.colour} {first.shape}{_plural(first.shape)}"
    elif len(named) > 2:
        things = f"{', '.join(named[:-1])} and {named[-1]}"
    else:
        things = f" {spec.relation} ".join(named)
    return f"{things} on a {spec.background} background"


def _plural(shape: str) -> str:
    return "es" if shape.endswith("s") else "s"


def _thing_pattern(number: int) -> str:
    return f"an? {_words_pattern(number)}"


def _words_pattern(number: int) -> str:
    return " ".join(f"(?P<{name}{number}>{'|'.join(options)})" for name, options in _THING_WORDS.items())


_THING_WORDS = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}
_GROUND = f" on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
_CAPTIONS = (
    re.compile(f"{_thing_pattern(0)}(?: (?P<relation>{'|'.join(RELATIONS)}) {_thing_pattern(1)})?{_GROUND}"),
    re.compile(f"{_thing_pattern(0)}, {_thing_pattern(1)}(?:, {_thing_pattern(2)})? and {_thing_pattern(3)}{_GROUND}"),
    re.compile(f"(?P<number>{'|'.join(NUMBERS.values())}) {_words_pattern(0)}e?s{_GROUND}"),
)


def parse(text: str) -> ShapeSpec | None:
    """Return the spec with this caption, ignoring white space and case; None for any other text."""
    plain = " ".join(text.lower().split())
    for pattern in _CAPTIONS:
        if match := pattern.fullmatch(plain):
            word = match.groupdict()
            things = [
                Thing(*(word[f"{name}{i}"] for name in ("colour", "size", "shape")))
                for i in range(len(NUMBERS) + 1)
                if word.get(f"shape{i}")
            ]
            if number := word.get("number"):
                things *= next(count for count, name in NUMBERS.items() if name == number)
            try:
                spec = ShapeSpec(word["background"], tuple(things), word.get("relation"))
            except ValueError:  # two objects have the same colour
                return None
            return spec if caption(spec) == plain else None
    return None


@lru_cache(maxsize=1)
def _heldout_singles() -> frozenset[tuple[str, Thing]]:
    """Return the (background, object) pairs that no training picture shows: a fixed set, those with lowest hashes."""
    singles = [(background, thing) for background in BACKGROUNDS for thing in _things()]
    order = sorted(singles, key=lambda single: hash_bits(_HELDOUT_SALT, 0, f"heldout {single[1]} on {single[0]}"))
    return frozenset(order[: round(HELDOUT_SHARE * len(singles))])


def _things() -> list[Thing]:
    return [Thing(*words) for words in itertools.product(COLOURS, SIZES, SHAPES)]


def is_heldout(spec: ShapeSpec) -> bool:
    """Return whether the picture shows an object that training never sees on this background.

    Training does see every word.
    """
    return any((spec.background, thing) in _heldout_singles() for thing in spec.objects)


@lru_cache(maxsize=4)
def combinations(heldout: bool, objects: int = 1) -> tuple[ShapeSpec, ...]:
    """Return all specs of a split with 1 or 2 objects; two objects always differ in colour.

    Raises:
        ValueError: any other number of objects.
    """
    if objects == 1:
        every = (ShapeSpec(background, (thing,)) for background in BACKGROUNDS for thing in _things())
    elif objects == 2:
        every = (
            ShapeSpec(background, (first, second), relation)
            for background, relation in itertools.product(BACKGROUNDS, RELATIONS)
            for first, second in itertools.product(_things(), repeat=2)
            if first.colour != second.colour
        )
    else:
        raise ValueError(f"objects={objects}: a picture shows 1 or 2")
    return tuple(spec for spec in every if is_heldout(spec) == heldout)


def spec_at(index: int, seed: int, heldout: bool = False, objects: int = 1) -> ShapeSpec:
    """Return the spec of picture `index`: each combination once in random order, then all again in another order."""
    specs = combinations(heldout, objects)
    return specs[_permutation(len(specs), seed, index // len(specs))[index % len(specs)]]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, cycle: int) -> tuple[int, ...]:
    return tuple(sorted(range(count), key=lambda i: hash_bits(seed, cycle * count + i, "synthetic order")))


def crowd_at(index: int, seed: int, objects: int, equal: bool = False, heldout: bool = False) -> ShapeSpec:
    """Return the spec of picture `index` with several objects: `objects` (3 or 4) of different colours or, with
    `equal`, 2 to `objects` equal ones.

    Drawn at random: there are too many combinations to enumerate.
    """
    things, attempt = _things(), 0
    while True:

        def draw(what: str, among: int, attempt: int = attempt) -> int:
            return hash_bits(seed, index, f"synthetic crowd {attempt} {heldout} {objects} {what}") % among

        background = list(BACKGROUNDS)[draw("background", len(BACKGROUNDS))]
        if equal:
            picked = [things[draw("thing", len(things))]] * (2 + draw("number", objects - 1))
        else:
            colours = list(COLOURS)
            picked = []
            for number in range(objects):
                colour = colours.pop(draw(f"colour {number}", len(colours)))
                own = [thing for thing in things if thing.colour == colour]
                picked.append(own[draw(f"thing {number}", len(own))])
        spec = ShapeSpec(background, tuple(picked))
        if is_heldout(spec) == heldout:
            return spec
        attempt += 1


def example(index: int, size: int, seed: int, heldout: bool = False, objects: int = 1) -> tuple[np.ndarray, ShapeSpec]:
    """Return picture `index` of a split, uint8 (size, size, 3), and its spec."""
    spec = spec_at(index, seed, heldout, objects)
    return render(spec, size, hash_bits(seed, index, f"synthetic place {heldout} {objects}")), spec


def render(spec: ShapeSpec, size: int, seed: int = 0) -> np.ndarray:
    """Render a picture; the same spec and seed give the same scene at every size.

    Sizes below 64 are box averages of the picture at the smallest multiple of the size that is at least 64.

    Returns:
        uint8 (size, size, 3).
    """
    factor = max(1, -(-_REFERENCE_SIDE // size))
    fine = size * factor
    axis = (np.arange(fine, dtype=np.float64) + 0.5) / fine
    x, y = axis[None, :], axis[:, None]
    canvas = np.empty((fine, fine, 3))
    canvas[:] = BACKGROUNDS[spec.background]
    for thing, (centre_x, centre_y), radius in _places(spec, seed):
        distance = _DISTANCES[thing.shape](x - centre_x, y - centre_y, radius)
        colour = np.array(COLOURS[thing.colour], dtype=np.float64)
        _paint(canvas, distance, colour * OUTLINE_SHADE)
        _paint(canvas, distance + OUTLINE_WIDTH, colour)
    averaged = canvas.reshape(size, factor, size, factor, 3).mean(axis=(1, 3))
    return np.rint(averaged).astype(np.uint8)


def _places(spec: ShapeSpec, seed: int) -> list[tuple[Thing, tuple[float, float], float]]:
    """Return each object with its centre (x, y) and radius, in units of the side."""
    if spec.is_count or len(spec.objects) > 2:
        return _quarters(spec, seed)
    alone = len(spec.objects) == 1
    direction = (0, 0) if spec.relation is None else RELATIONS[spec.relation]
    reach = JITTER[len(spec.objects)]
    places = []
    for number, thing in enumerate(spec.objects):
        sign = 1 - 2 * number
        centre = [
            0.5
            + sign * direction[axis] * PAIR_DISTANCE
            + reach * (2 * hash_uniform(seed, number, f"synthetic jitter {axis}") - 1)
            for axis in (0, 1)
        ]
        places.append((thing, (centre[0], centre[1]), SIZES[thing.size] * (1.0 if alone else PAIR_SCALE)))
    return places


def _quarters(spec: ShapeSpec, seed: int) -> list[tuple[Thing, tuple[float, float], float]]:
    """Like `_places`, for several objects, each in its own quarter of the picture."""
    quarters = sorted(itertools.product((-1, 1), repeat=2), key=lambda q: hash_bits(seed, 0, f"synthetic quarter {q}"))
    places = []
    for number, (thing, quarter) in enumerate(zip(spec.objects, quarters, strict=False)):
        x, y = (
            0.5
            + CELL_DISTANCE * quarter[axis]
            + JITTER[2] * (2 * hash_uniform(seed, number, f"synthetic jitter {axis}") - 1)
            for axis in (0, 1)
        )
        places.append((thing, (x, y), SIZES[thing.size] * CELL_SCALE))
    return places


def _paint(canvas: np.ndarray, distance: np.ndarray, colour: np.ndarray) -> None:
    """Paint `colour` where the signed distance is negative, with edges antialiased over one rendered pixel."""
    coverage = np.clip(0.5 - distance * canvas.shape[0], 0, 1)[..., None]
    canvas += coverage * (colour - canvas)


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return _box(x, y, radius, radius)


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Nearly equilateral, pointing up: corners (0, -1), (-1.1, 0.85), (1.1, 0.85) times the radius."""
    slope = np.hypot(1.85, 1.1)
    side = (1.85 * np.abs(x) - 1.1 * (y + radius)) / slope
    return np.maximum(side, y - 0.85 * radius)


def _cross(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.minimum(_box(x, y, radius, 0.34 * radius), _box(x, y, 0.34 * radius, radius))


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
"""Signed distance to each shape's edge, negative inside, in units of the side (exact except at outer corners)."""
