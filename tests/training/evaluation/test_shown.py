"""Which pictures an evaluation keeps to be looked at, and the page over all checkpoints made from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.evaluation.page import series_html
from training.evaluation.shown import CELLS, Shown, best_and_worst, choose_places


def test_pictures_are_taken_evenly_from_each_category() -> None:
    assert choose_places([], 100) == list(range(CELLS)) and choose_places([], 3) == [0, 1, 2]
    found = choose_places(["a"] * 100 + ["b"] * 100, 200)
    assert found == [*range(24), *range(100, 124)]
    assert len(choose_places([str(place) for place in range(80)], 80)) == CELLS, "more categories than pictures"
    assert best_and_worst(np.array([0.1, 0.9, 0.5, 0.2])) == ([1, 2], [0, 3])


def drawn(seed: int, score: float = np.nan, prompts: tuple[str, ...] = ("a", "<b>", "c")) -> Shown:
    pictures = np.random.default_rng(seed).integers(0, 256, (len(prompts), 8, 8, 3), dtype=np.uint8)
    scores = score + np.arange(len(prompts))
    return Shown(pictures, np.array(prompts), np.array(["X", "Y", "X"]), np.ones(3, dtype=bool), scores)


def test_checkpoints_are_shown_side_by_side(tmp_path: Path) -> None:
    figures = {"kid.x": {"value": 1.0, "interval": [0.5, 1.5], "n": 3}}
    steps = list(range(10, 130, 10))
    series = {"figure": "kid.x", "best": {"step": 30, **figures["kid.x"]}, "steps": dict.fromkeys(steps, figures)}
    series |= {"tied": [20, 40], "left_out": {5: "n.samples <differs>"}}
    page = series_html("RUN", series, {step: drawn(step) for step in steps})
    assert (
        "cannot be told apart from it: steps 20, 40. Bands" in page and "Left out: n.samples &lt;differs&gt;." in page
    )
    assert "kid.x<br><small>squared discrepancy, lower is better</small>" in page
    assert page.count("<h2>Category: X</h2>") == 1 and "&lt;b&gt;" in page and "best scores" not in page
    head = page[page.index("<h2>Category") : page.index("</tr>", page.index("<h2>Category"))]
    assert head.count("<th>step") == 7 and all(f"step {step}<" in head for step in (10, 30, 120)), "best, first, newest"
    scored = series_html("RUN", series, {step: drawn(step, 0.5) for step in (10, 20)})
    assert "best scores" in scored and "<small>2.5</small>" in scored
    others = {10: drawn(1), 20: drawn(2, prompts=("other", "prompts", "here"))}
    assert "Category" not in series_html("RUN", series, others), "other prompts do not stand side by side"
    assert "Category" not in series_html("RUN", series, {})
    (tmp_path / "shown.npz").write_bytes(b"damaged")
    assert Shown.read(tmp_path) is None and Shown.read(tmp_path / "nowhere") is None


def test_places_are_chosen_quickly_however_many_are_requested() -> None:
    assert choose_places([], 1 << 60) == list(range(48)) and choose_places([], 3) == [0, 1, 2]
    assert choose_places(["a", "b", "a"], 1 << 60) == [0, 1, 2]
