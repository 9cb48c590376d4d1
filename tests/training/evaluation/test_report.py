from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.content.synthetic import ShapeSpec, Thing, render
from tests.training.evaluation.example_result import RESULT
from training.cascade.requests import to_images
from training.evaluation.oracle import read_drawing, score
from training.evaluation.report import markdown, shares, shares_by_word, sheet_of_shapes, summary

SPECS = [
    ShapeSpec("white", (Thing("red", "large", "circle"),)),
    ShapeSpec("white", (Thing("blue", "small", "circle"),)),
    ShapeSpec("black", (Thing("blue", "small", "cross"),)),
]
SCORES = [
    dict.fromkeys(("background", "colour", "size", "shape", "all"), True),
    {"background": True, "colour": False, "size": True, "shape": False, "all": False},
    {"background": True, "colour": True, "size": True, "shape": True, "all": True},
]


def test_shares() -> None:
    found = {field: figure.value for field, figure in shares(SCORES).items()}
    assert found == pytest.approx({"background": 1, "colour": 2 / 3, "size": 1, "shape": 2 / 3, "all": 2 / 3})
    by_word = {
        field: {word: entry["value"] for word, entry in words.items()}
        for field, words in shares_by_word(SCORES, SPECS, np.arange(3)).items()
    }
    assert by_word["colour"] == {"red": 1.0, "blue": 0.5} and by_word["shape"] == {"circle": 0.5, "cross": 1.0}
    assert by_word["background"] == {"white": 1.0, "black": 1.0} and "relation" not in by_word


def test_the_sheet_frames_exactly_the_wrong_ones() -> None:
    pictures = [render(spec, 64) for spec in SPECS]
    images = [to_images_of(picture) for picture in pictures]
    readings = [read_drawing(picture) for picture in pictures]
    frame = (0xC6, 0x28, 0x28)
    right = [score(reading, spec) for reading, spec in zip(readings, SPECS, strict=True)]
    captions = ["x"] * 3
    assert not (np.asarray(sheet_of_shapes(images, captions, readings, right)) == frame).all(axis=-1).any()
    assert (np.asarray(sheet_of_shapes(images, captions, readings, SCORES)) == frame).all(axis=-1).sum() > 4 * 180


def test_the_sheet_shows_the_wrong_pictures_that_it_mentions() -> None:
    """Even those that come after the pictures that fit, and the reference next to each."""
    from PIL import Image

    from training.evaluation import report

    reading, scores = read_drawing(render(SPECS[0], 64)), [{"all": True}] * 60 + [{"colour": False, "all": False}] * 3
    images = [[Image.new("RGB", (16, 16), "white")]] * 63
    references = {i: Image.new("RGB", (16, 16), (0, 0, 200 + (i >= 60))) for i in range(63)}
    shown = np.asarray(sheet_of_shapes(images, ["x"] * 63, [reading] * 63, scores, references)).reshape(-1, 3)
    true = [int((shown == (0, 0, blue)).all(axis=-1).sum()) for blue in (200, 201)]
    assert true[0] > 44 * 180**2 and true[1] > 2.5 * 180**2, "the last three are there"
    pictures = np.asarray(report.sheet_of_pictures(images, ["x"] * 63, references)).reshape(-1, 3)
    assert (pictures == (0, 0, 200)).all(axis=-1).sum() > 47 * 180**2


def to_images_of(picture: np.ndarray):
    import torch

    return to_images(torch.from_numpy(picture).permute(2, 0, 1)[None])


def test_the_summary_says_which_way_is_better() -> None:
    assert "\nlower is better for Frechet distance, KID" in summary(RESULT)


def test_markdown_and_summary_state_every_figure() -> None:
    for text in (markdown(RESULT), summary(RESULT)):
        for figure in (
            "50.0%",
            "100.0%",
            "31.23",
            "29.88",
            "0.1234",
            "[0.0234, 0.223]",
            "1.3e-06",
            "-0.00012",
            "a remark",
        ):
            assert figure in text
    assert "step 9" in markdown(RESULT) and "circle 25% of 8" in markdown(RESULT) and "0.0456" in markdown(RESULT)
