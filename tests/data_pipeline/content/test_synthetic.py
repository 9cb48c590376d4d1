"""The captioned shapes: vocabulary, splits, drawings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_pipeline.content import synthetic
from data_pipeline.content.synthetic import (
    ShapeSpec,
    Thing,
    caption,
    combinations,
    crowd_at,
    example,
    parse,
    render,
    spec_at,
)

HELDOUT_BEGINS = [
    "a large blue circle on a black background",
    "a large cyan square on a white background",
    "a large cyan triangle on a black background",
]
RED_CIRCLE = ShapeSpec("white", (Thing("red", "large", "circle"),))
PAIR = ShapeSpec("white", (Thing("red", "large", "circle"), Thing("blue", "small", "square")), "to the left of")


def test_captions_read_like_sentences() -> None:
    assert caption(RED_CIRCLE) == "a large red circle on a white background"
    assert caption(PAIR) == "a large red circle to the left of a small blue square on a white background"


@pytest.mark.parametrize("objects", [1, 2])
def test_parse_reads_every_caption_back(objects: int) -> None:
    for spec in combinations(False, objects)[::7] + combinations(True, objects)[::7]:
        assert parse(caption(spec).capitalize() + " ") == spec


@pytest.mark.parametrize(
    "text", ["", "a red circle", caption(RED_CIRCLE) + " and a hat", "a huge red circle on a sofa"]
)
def test_parse_refuses_other_texts(text: str) -> None:
    assert parse(text) is None


def test_splits_are_disjoint_complete_and_share_every_word() -> None:
    train, heldout = combinations(False), combinations(True)
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 3 * 6 * 2 * 4
    assert 0.08 < len(heldout) / (len(train) + len(heldout)) < 0.12
    words = [set(" ".join(map(caption, split)).split()) for split in (train, heldout)]
    assert words[0] == words[1]


def test_the_heldout_set_never_moves() -> None:
    """Results are compared over releases, so the held-out captions are part of the interface."""
    assert sorted(map(caption, combinations(True)))[:3] == HELDOUT_BEGINS


def test_pairs_of_the_training_split_hold_no_heldout_object() -> None:
    unseen = {(spec.background, spec.objects[0]) for spec in combinations(True)}
    for spec in combinations(False, 2):
        assert not any((spec.background, thing) in unseen for thing in spec.objects)


def test_each_combination_occurs_once_per_cycle() -> None:
    count = len(combinations(False))
    first = [spec_at(i, seed=3) for i in range(count)]
    second = [spec_at(count + i, seed=3) for i in range(count)]
    assert set(first) == set(second) == set(combinations(False))
    assert first != second
    assert first != [spec_at(i, seed=4) for i in range(count)]


def test_pictures_depend_on_seed_and_index_alone() -> None:
    picture, spec = example(17, 32, seed=5)
    again, same_spec = example(17, 32, seed=5)
    assert spec == same_spec and np.array_equal(picture, again)
    assert not np.array_equal(render(spec, 32, 1), render(spec, 32, 2))


def test_a_small_drawing_is_the_box_average_of_the_large_one() -> None:
    large, small = render(RED_CIRCLE, 64, seed=9), render(RED_CIRCLE, 16, seed=9)
    assert small.shape == (16, 16, 3) and small.dtype == np.uint8
    averaged = large.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).max() <= 1.0


@pytest.mark.parametrize("spec", combinations(False)[::11], ids=caption)
def test_colours_and_width_are_those_of_the_caption(spec: ShapeSpec) -> None:
    picture = render(spec, 64, seed=2).astype(int)
    thing = spec.objects[0]
    assert np.abs(picture[0, 0] - synthetic.BACKGROUNDS[spec.background]).max() == 0
    inside = np.abs(picture - synthetic.COLOURS[thing.colour]).max(axis=2) <= 1
    assert inside.sum() > 30
    width = np.abs(picture - picture[0, 0]).max(axis=2).any(axis=0).sum() / 64
    assert abs(width - 2 * synthetic.SIZES[thing.size] * (1.1 if thing.shape == "triangle" else 1)) < 0.06


def test_relations_put_the_first_object_where_they_say() -> None:
    def centre(picture: np.ndarray, colour: str) -> tuple[float, float]:
        rows, columns = np.nonzero(np.abs(picture.astype(int) - synthetic.COLOURS[colour]).max(axis=2) <= 1)
        return columns.mean(), rows.mean()

    for relation, (x, y) in synthetic.RELATIONS.items():
        picture = render(ShapeSpec("white", PAIR.objects, relation), 64, seed=1)
        red, blue = centre(picture, "red"), centre(picture, "blue")
        assert np.sign(red[0] - blue[0]) == x or x == 0
        assert np.sign(red[1] - blue[1]) == y or y == 0


def test_every_colour_is_far_from_every_other_and_from_the_backgrounds() -> None:
    palette = list((synthetic.COLOURS | synthetic.BACKGROUNDS).values())
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(palette, 2)) > 100


def test_a_spec_needs_a_relation_exactly_for_two_objects() -> None:
    for objects in (PAIR.objects, (*PAIR.objects, PAIR.objects[0])):
        with pytest.raises(ValueError, match="one object, or two and their relation, or three or four of different"):
            ShapeSpec("white", objects)
    with pytest.raises(ValueError, match="two to four equal ones"):
        ShapeSpec("white", RED_CIRCLE.objects * 5)


@pytest.mark.parametrize(("objects", "equal"), [(3, False), (4, False), (4, True)])
def test_several_objects_have_captions_of_their_own(objects: int, equal: bool) -> None:
    specs = [crowd_at(i, 0, objects, equal, heldout) for heldout in (False, True) for i in range(60)]
    assert len(set(specs)) > 80 and all(parse(caption(spec)) == spec for spec in specs)
    assert [synthetic.is_heldout(spec) for spec in specs] == [False] * 60 + [True] * 60
    assert {len(spec.objects) for spec in specs} == ({2, 3, 4} if equal else {objects})
    assert all(spec.is_count == equal for spec in specs)
    assert specs[:60] == [crowd_at(i, 0, objects, equal) for i in range(60)]


def test_several_objects_are_named_in_plain_words() -> None:
    crosses = ShapeSpec("grey", (Thing("cyan", "small", "cross"),) * 3)
    assert caption(crosses) == "three small cyan crosses on a grey background"
    trio = ShapeSpec("white", (*PAIR.objects, Thing("cyan", "small", "cross")))
    assert caption(trio) == "a large red circle, a small blue square and a small cyan cross on a white background"
    assert parse("three small cyan crosss on a grey background") is None
    assert parse(caption(trio).replace("cyan", "red")) is None, "colours tell them apart"


def test_several_objects_do_not_touch() -> None:
    """Each lies completely in its own quarter."""
    for seed in range(20):
        spec = ShapeSpec("white", tuple(Thing(colour, "large", "triangle") for colour in list(synthetic.COLOURS)[:4]))
        picture = render(spec, 64, seed).astype(int)
        shown = np.abs(picture - synthetic.BACKGROUNDS["white"]).max(axis=2) > 4
        assert not shown[:, [0, 31, 32, 63]].any() and not shown[[0, 31, 32, 63]].any()
        for rows, columns in itertools.product((slice(0, 32), slice(32, 64)), repeat=2):
            assert shown[rows, columns].sum() > 100
