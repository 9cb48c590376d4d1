from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError
from training.evaluation.comparison import FORMAT, write_influences
from training.evaluation.metrics.figure import Figure
from training.evaluation.pareto import draw_curve, on_front


def test_the_front_contains_the_points_that_none_beats() -> None:
    assert on_front([(0.2, 5.0), (0.3, 4.0), (0.4, 8.0), (0.35, 9.0)]) == [1, 2]
    assert on_front([(1.0, 1.0)]) == [0]


def evaluated(folder: Path, guidance: float, score: float, distance: float, **protocol) -> str:
    values = np.roll(np.linspace(-1, 1, 20), int(guidance))
    figures = {"clip_score.clip": Figure(score, values * 0.01), "frechet.inception": Figure(distance, values)}
    write_influences(folder, figures, np.arange(20))
    result = {"format": FORMAT, "kind": "pictures", "n": {"samples": 20, "reference": 20}}
    result |= {name.split(".")[0]: {name.split(".")[1]: figure.as_dict()} for name, figure in figures.items()}
    stages = [{"name": "base", "sampler": {"guidance": guidance, "steps": 20}}]
    (folder / "result.json").write_text(json.dumps({**result, "protocol": {"stages": stages, **protocol}}))
    return str(folder)


def test_a_sweep_becomes_a_curve(tmp_path: Path, capsys) -> None:
    points = {1.0: (0.20, 9.0), 1.5: (0.24, 7.0), 4.0: (0.28, 7.1), 9.0: (0.27, 15.0)}
    paths = []
    for guidance, (score, distance) in points.items():
        (tmp_path / str(guidance)).mkdir()
        paths.append(evaluated(tmp_path / str(guidance), guidance, score, distance))
    found = draw_curve(paths, tmp_path / "out")
    assert found["axes"] == ("clip_score.clip", "frechet.inception")
    assert [found["points"][i]["settings"] for i in found["front"]] == [{"base.guidance": 1.5}, {"base.guidance": 4.0}]
    assert found["best"] == 1 and found["tied"] == [2], "0.1 above the best, and varying by more"
    picture = np.asarray(Image.open(tmp_path / "out" / "pareto.png"))
    assert (picture == (0x2E, 0x8B, 0x57)).all(axis=-1).sum() > 300
    printed = capsys.readouterr().out
    assert "2 of 4 settings are on the front" in printed
    assert (
        "smallest frechet.inception: {'base.guidance': 1.5}; cannot be told apart from it: {'base.guidance': 4.0}"
        in printed
    )
    (tmp_path / "other").mkdir()
    other = evaluated(tmp_path / "other", 1.0, 0.3, 1.0, seed=5)
    with pytest.raises(ConfigError, match=r"protocol\.seed is None in the first and 5"):
        draw_curve([paths[0], other], tmp_path / "out")
