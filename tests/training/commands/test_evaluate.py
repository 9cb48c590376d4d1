"""`cascade evaluate` end to end on tiny stages, and on a cascade that draws perfectly, whose figures are known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.images import box_average
from data_pipeline.content.synthetic import caption, draw, example, parse
from data_pipeline.shards.writer import ShardWriter
from tests.training.tiny import tiny_cascade
from training.cascade import Cascade
from training.cascade.requests import number_drawings
from training.commands import evaluate
from training.commands.evaluate import Evaluator
from training.config.experiment import BundleConfig, ClusterConfig, EvaluationConfig, Experiment


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bundle")
    tiny_cascade().save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("heldout")
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for index in range(20):
            picture, spec = example(index, 64, seed=1, heldout=True)
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "PNG")
            writer.write(f"{index:05d}", {"png": data.getvalue(), "txt": caption(spec).encode()})
    return str(folder)


def command(bundle: str, output: Path, **settings) -> Experiment:
    return Experiment(
        bundle=BundleConfig(dir=bundle),
        cluster=ClusterConfig(gpus=False),
        evaluation=EvaluationConfig(**{"samples": 8, "psnr_samples": 3, "batch": 4, "output": str(output)} | settings),
    )


def test_shapes_end_to_end(bundle: str, heldout: str, tmp_path: Path, capsys) -> None:
    config = command(bundle, tmp_path / "out", reference=heldout)
    result = evaluate.main(config)
    assert set(result["samples"]) == set(result["real"]) == {"background", "colour", "size", "shape", "all"}
    assert result["real"]["all"] == 1.0
    assert result["samples"]["all"] == 0.0  # random weights
    assert result["n"] == {"samples": 8, "reference": 8}
    assert set(result["psnr"]) == {"sr", "sr_noised", "bicubic", "n", "stages"} and result["psnr"]["n"] == 3
    for entry in result["frechet"].values():
        assert 0 < entry["floor"] < entry["value"]
    assert result["protocol"]["stages"][1]["name"] == "sr" and result["protocol"]["stages"][1]["sha256"]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["real"] == result["real"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| real held-out drawings | 100.0%" in text and "bicubic" in text and "colour_grid_4x4" in text
    assert Image.open(tmp_path / "out" / "samples.png").width > 800
    assert "held-out drawings read right: background 100.0%" in capsys.readouterr().out


def test_an_evaluation_is_repeatable(bundle: str, heldout: str, tmp_path: Path) -> None:
    first, second = (evaluate.main(command(bundle, tmp_path / n, reference=heldout, psnr_samples=0)) for n in "ab")
    assert first["frechet"] == second["frechet"] and first["samples"] == second["samples"] and first["psnr"] == {}


def test_without_shards_heldout_drawings_are_made(bundle: str, tmp_path: Path) -> None:
    config = command(bundle, tmp_path, psnr_samples=0)
    config.prepare.draw.objects = 2
    result = evaluate.main(config)
    assert "relation" in result["real"] and result["n"]["samples"] == 8


class Perfect(Cascade):
    """Draws what the caption says, or what another caption says for every fourth prompt; restores by the truth."""

    truth: list[Any]

    def draw(self, prompts, *arguments, stages=None, low_res=None, **options):  # type: ignore[no-untyped-def]
        drawings = number_drawings(list(prompts), [], options.get("seed", 0), 1)
        for index, drawing in enumerate(drawings):
            words = "a small blue square on a black background" if index % 4 == 3 else drawing.prompt
            picture = draw(parse(words), 64, seed=index) if low_res is None else self.truth[index]
            drawing.stages = {"base": Image.fromarray(box_average(picture, 4)), "sr": Image.fromarray(picture)}
        return drawings


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    small = tiny_cascade(16, 4)
    perfect = Perfect(small.stages, small.encoder, small.text)
    return Evaluator(command("unused", tmp_path, samples=16, psnr_samples=4), perfect, ["cpu"])


def test_a_perfect_cascade_scores_as_it_should(evaluator: Evaluator) -> None:
    real = evaluator._drawn(32)
    noise = np.random.default_rng(0).integers(-2, 3, real.pictures.shape)
    evaluator.cascade.truth = np.clip(real.pictures + noise, 0, 255).astype(np.uint8)  # type: ignore[attr-defined]
    result = evaluator.shapes()
    assert result["samples"]["all"] == 12 / 16 and result["samples"]["shape"] >= 12 / 16
    assert result["base"]["background"] == result["samples"]["background"]
    assert 40 < result["psnr"]["sr"] < 50 and 20 < result["psnr"]["bicubic"] < 35
    assert sum(len(words) for words in result["by_word"].values()) > 8
    shapes = result["by_word"]["shape"]
    assert min(shapes.values()) >= 0 and max(shapes.values()) == 1.0


def test_bicubic_is_pillows_on_the_true_low_res_picture(evaluator: Evaluator) -> None:
    real = evaluator._drawn(4)
    evaluator.cascade.truth = real.pictures  # type: ignore[attr-defined]
    low = [Image.fromarray(box_average(p, 4)).resize((64, 64), Image.Resampling.BICUBIC) for p in real.pictures]
    errors = [np.square(np.asarray(a).astype(float) - b).mean() for a, b in zip(low, real.pictures, strict=True)]
    expected = np.mean([10 * np.log10(255**2 / error) for error in errors])
    measured = evaluator._psnr(real)
    assert measured["bicubic"] == pytest.approx(expected) and measured["sr"] == 100


def test_pictures_only_needs_no_captions_that_an_oracle_reads(bundle: str, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "shards"
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "0.tar")) as writer:
        for index in range(12):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(data, "PNG")
            writer.write(str(index), {"png": data.getvalue(), "txt": b"a street in the rain"})
    monkeypatch.setattr(evaluate, "CHUNK", 5)
    config = command(bundle, tmp_path / "out", kind="pictures", reference=str(folder), samples=6, reference_samples=12)
    result = evaluate.main(config)
    assert result["n"] == {"samples": 6, "reference": 12} and "samples" not in result
    assert all(entry["value"] > 0 and entry["floor"] is None for entry in result["frechet"].values())
    assert "| colour_grid_4x4 | 48 |" in (tmp_path / "out" / "report.md").read_text()
    whole = evaluate.main(command(bundle, tmp_path / "o2", kind="pictures", reference=str(folder), samples=12))
    assert whole["n"] == {"samples": 12, "reference": 12}
    with pytest.raises(ConfigError, match=r"street in the rain.* needs evaluation=pictures"):
        evaluate.main(command(bundle, tmp_path / "out", reference=str(folder)))


def test_chunks_give_the_same_moments(bundle: str, heldout: str, tmp_path: Path, monkeypatch) -> None:
    settings = {"kind": "pictures", "reference": heldout, "samples": 4, "reference_samples": 20}
    whole = evaluate.main(command(bundle, tmp_path / "a", **settings))
    monkeypatch.setattr(evaluate, "CHUNK", 3)
    parts = evaluate.main(command(bundle, tmp_path / "b", **settings))
    for name, entry in whole["frechet"].items():
        assert parts["frechet"][name]["value"] == pytest.approx(entry["value"], rel=1e-2)


def test_other_processes_leave_it_to_the_first(bundle: str, tmp_path: Path, monkeypatch) -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert evaluate.main(command(bundle, tmp_path))["rank"] == 1
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(bundle: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.reference: name held-out shards"):
        evaluate.main(command(bundle, tmp_path, kind="pictures"))
    with pytest.raises(DataError, match="no bundle there"):
        evaluate.main(command(str(tmp_path / "absent"), tmp_path))
    with pytest.raises(ConfigError, match=r"evaluation\.samples=1"):
        EvaluationConfig(samples=1)
