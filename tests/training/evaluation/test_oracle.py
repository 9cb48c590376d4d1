"""The oracle must read real drawings without error, and must not see shapes where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.content.synthetic import ShapeSpec, Thing, combinations, example, render
from training.evaluation.oracle import read_drawing, score

ONE = ShapeSpec("white", (Thing("red", "large", "circle"),))
TWO = ShapeSpec("grey", (Thing("red", "large", "circle"), Thing("blue", "small", "square")), "to the left of")


def share_right(objects: int, side: int, count: int, heldout: bool = True) -> float:
    right = 0
    for index in range(count):
        picture, spec = example(index, side, seed=7, heldout=heldout, objects=objects)
        right += score(read_drawing(picture, objects), spec)["all"]
    return right / count


@pytest.mark.parametrize("side", [32, 64])
def test_every_heldout_drawing_of_one_object_is_read_correctly(side: int) -> None:
    assert share_right(1, side, len(combinations(heldout=True))) == 1.0


def test_drawings_of_two_objects_are_read_correctly() -> None:
    assert share_right(2, 64, 80) == 1.0


def test_shapes_survive_small_pictures_and_a_shift() -> None:
    assert share_right(1, 16, 60, heldout=False) > 0.9
    moved = np.roll(render(ONE, 64), (5, -4), axis=(0, 1))
    assert score(read_drawing(moved), ONE)["all"]


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        (ShapeSpec("black", ONE.objects), {"background"}),
        (ShapeSpec("white", (Thing("green", "large", "circle"),)), {"colour"}),
        (ShapeSpec("white", (Thing("red", "small", "circle"),)), {"size"}),
        (ShapeSpec("white", (Thing("red", "large", "cross"),)), {"shape"}),
        (ShapeSpec("grey", (Thing("cyan", "small", "triangle"),)), {"background", "colour", "size", "shape"}),
    ],
)
def test_exactly_the_wrong_word_is_marked(drawn: ShapeSpec, wrong: set[str]) -> None:
    result = score(read_drawing(render(drawn, 64)), ONE)
    assert {word for word, right in result.items() if not right} == wrong | {"all"}


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        (ShapeSpec("grey", TWO.objects, "above"), {"relation"}),
        (ShapeSpec("grey", TWO.objects[::-1], "to the left of"), {"relation"}),
        (ShapeSpec("grey", (TWO.objects[0], Thing("blue", "large", "square")), "to the left of"), {"size"}),
        (
            ShapeSpec("grey", (Thing("blue", "large", "circle"), Thing("red", "small", "square")), "to the left of"),
            {"size", "shape", "relation"},
        ),
    ],
)
def test_binding_of_two_objects(drawn: ShapeSpec, wrong: set[str]) -> None:
    result = score(read_drawing(render(drawn, 64), 2), TWO)
    assert {word for word, right in result.items() if not right} == wrong | {"all"}


def test_the_same_scene_described_in_reverse_is_correct() -> None:
    told = ShapeSpec("grey", TWO.objects[::-1], "to the right of")
    assert score(read_drawing(render(TWO, 64), 2), told)["all"]


def test_a_blank_picture_shows_nothing() -> None:
    reading = read_drawing(np.full((64, 64, 3), 250, np.uint8))
    assert reading.objects == () and str(reading) == "nothing on white"
    result = score(reading, ONE)
    assert result["background"] and not any(result[word] for word in ("colour", "size", "shape", "all"))


def test_a_missing_second_object_is_wrong() -> None:
    assert not score(read_drawing(render(ONE, 64), 2), TWO)["colour"]


def test_noise_does_not_hide_a_shape() -> None:
    rng = np.random.default_rng(0)
    for index in range(20):
        picture, spec = example(index, 64, seed=7, heldout=True)
        grainy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
        assert score(read_drawing(grainy), spec)["all"], spec


def test_a_disc_of_the_same_area_is_not_taken_for_a_square() -> None:
    """Nor is a soft blob: its size is recognizable, its shape is not."""
    y, x = np.mgrid[:64, :64] - 31.5
    blob = np.exp(-((x**2 + 0.4 * x * y + 1.5 * y**2) / 2 / 13**2))[..., None]
    picture = np.rint(250 + blob * (np.array([220, 30, 40]) - 250)).astype(np.uint8)
    (seen,) = read_drawing(picture).objects
    assert seen.colour == "red" and seen.shape is None and seen.size is not None


def test_a_smear_has_a_colour_but_no_shape() -> None:
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[28:36, 2:62] = (220, 30, 40)
    (seen,) = read_drawing(picture).objects
    assert seen.colour == "red" and seen.shape is None and seen.size is None


def test_coloured_noise_has_no_shape() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert all(seen.shape is None for seen in read_drawing(noise, 2).objects)
