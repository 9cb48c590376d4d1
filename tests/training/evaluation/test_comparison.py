"""What a comparison concludes, from results whose pictures are numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError
from training.evaluation.comparison import FORMAT, as_text, compare_results, holm, write_influences
from training.evaluation.metrics.figure import Figure

SPREAD = np.random.default_rng(0).normal(size=64)


def evaluated(folder: Path, figures: dict[str, Figure], psnr: int = 0, **protocol: Any) -> str:
    folder.mkdir()
    write_influences(folder, figures, np.arange(64))
    result: dict[str, Any] = {"format": FORMAT, "kind": "pictures", "n": {"samples": 64}, "protocol": protocol}
    result |= {"psnr": {"n": psnr}} if psnr else {}
    for name, figure in figures.items():
        metric, _, features = name.partition(".")
        result.setdefault(metric, {})[features] = figure.as_dict()
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def kid(value: float, noise: float = 1.0) -> Figure:
    return Figure(value, (SPREAD - SPREAD.mean()) * noise)


@pytest.mark.parametrize(
    ("baseline", "other", "sentence"),
    [
        (kid(1.0), kid(0.5, 1.1), "b is better than A in kid.x by 0.5 (0.477 to 0.523)."),
        (kid(0.5), kid(1.0, 1.1), "b is worse than A in kid.x by 0.5 (0.477 to 0.523)."),
        (
            kid(1.0),
            kid(0.99, 1.5),
            "b and A cannot be told apart: the clearest difference is 0.01 in kid.x; if it is as large as that, about "
            "17,000 pictures would show it, instead of 64.",
        ),
        (kid(1.0), kid(1.0), "b and A cannot be told apart: all figures are equal."),
    ],
)
def test_the_last_line_decides_or_says_what_would(
    tmp_path: Path, baseline: Figure, other: Figure, sentence: str
) -> None:
    paths = [evaluated(tmp_path / name, {"kid.x": figure}) for name, figure in (("a", baseline), ("b", other))]
    text = as_text(compare_results(paths)).replace(f"{tmp_path}/a", "A").replace(f"{tmp_path}/", "")
    assert sentence in text.splitlines(), text


def test_many_comparisons_find_nothing_between_equals(tmp_path: Path) -> None:
    """Forty figures of equal distributions: some are better or worse at 5 % each, and none is certain."""
    rng = np.random.default_rng(3)
    names = [f"clip_score.{number}" for number in range(40)]
    results = [{name: Figure.mean(rng.normal(size=64)) for name in names} for _ in "ab"]
    paths = [evaluated(tmp_path / name, figures) for name, figures in zip("ab", results, strict=True)]
    comparison = compare_results(paths)
    figures = comparison["others"][0]["figures"].values()
    seeming = [entry for entry in figures if entry["verdict"] != "undecided"]
    assert seeming and all(entry["chance"] < 0.05 for entry in seeming) and not any(e["certain"] for e in figures)
    assert comparison["others"][0]["conclusion"].endswith("about 210 pictures would show it, instead of 64")
    assert as_text(comparison).count("(perhaps by chance)") == len(seeming)


def test_holms_steps() -> None:
    assert holm([0.04, 0.001, 0.02, 0.013]) == [True] * 4
    assert holm([0.04, 0.001, 0.03, 0.013]) == [False, True, False, True]
    assert holm([]) == []


def test_figures_with_a_protocol_of_their_own_are_left_out_where_it_differs(tmp_path: Path) -> None:
    share, db = Figure.mean(np.arange(64) < 3, is_share=True), Figure.mean(SPREAD[:16])
    old, new = Figure(0.5, SPREAD), Figure(0.5, SPREAD, halves=np.full((32, 2), 0.5))
    every = {"kid.x": kid(1), "copies.x": share, "psnr.sr": db, "recall.x": old}
    one, two = ([{"name": "base", "step": 5, "sampler": {"guidance": scale, "steps": 4}}] for scale in (1, 2))
    a = evaluated(tmp_path / "a", every, 16, training={"searched": 500}, stages=one)
    fewer = {"recall.x": new, "kid.x": kid(1), "copies.x": share, "psnr.sr": Figure.mean(SPREAD[:8])}
    b = evaluated(
        tmp_path / "b", fewer, 8, training={"searched": 100}, versions={"torch": "2"}, text_sha="1", stages=two
    )
    comparison = compare_results([a, b])
    assert list(comparison["others"][0]["figures"]) == ["kid.x"]
    text = as_text(comparison)
    assert "note: protocol.training.searched differs: 500 and 100; copies is not compared" in text
    assert "64 samples, 0 reference pictures, 32 divisions; recall.x is not compared" in text, (
        "written by an earlier version"
    )
    assert "note: psnr.n differs: 16 and 8; psnr is not compared" in text
    assert "note: stages.base.guidance differs: 1 and 2" in text and text.count("stages.base") == 1
    assert "note: protocol.versions differs" in text and "note: protocol.text_sha differs: None and 1" in text
    with pytest.raises(ConfigError, match=r"protocol\.size is None in the first and 64 in the second"):
        compare_results([a, evaluated(tmp_path / "c", {"kid.x": kid(1)}, size=64)])


def test_halves_are_subtracted_one_by_one(tmp_path: Path) -> None:
    """What both results have in common in each half does not widen the interval of their difference."""
    apart = np.random.default_rng(1).normal(size=(32, 2))
    first, second = (replace(kid(0.5), halves=apart + one * np.linspace(-1, 1, 64).reshape(32, 2)) for one in (0, 0.01))
    paths = [evaluated(tmp_path / name, {"density.x": f}) for name, f in (("a", first), ("b", second))]
    low, high = compare_results(paths)["others"][0]["figures"]["density.x"]["interval"]
    assert (low, high) == second.minus(first).interval() and high - low < 0.002 < 1 < np.ptp(first.interval())


def test_a_share_stays_a_share_and_old_influences_are_read(tmp_path: Path) -> None:
    """Two pictures right instead of wrong do not decide, as they would by the variance of their differences, 0."""
    right, wrong = (Figure.mean(np.full(2, value), of="reference", is_share=True) for value in (1.0, 0.0))
    paths = [evaluated(tmp_path / n, {"recall.x": f}) for n, f in (("a", wrong), ("b", right))]
    entry = compare_results(paths)["others"][0]["figures"]["recall.x"]
    assert entry["verdict"] == "undecided" and entry["value"] == 1 and entry["n"] == 2
    for path in paths:
        with np.load(f"{path}/influences.npz") as stored:
            kept = {name: stored[name] for name in stored if "/of_" not in name}
        np.savez(f"{path}/influences.npz", **kept)
    assert compare_results(paths)["others"][0]["figures"]["recall.x"]["n"] == 2
