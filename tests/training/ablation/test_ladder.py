"""The ladder of small tasks: two steps of each kind, resuming, and its table by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import ladder, scene_encoder
from data_pipeline.content.synthetic import SHAPES, ShapeSpec, Thing, render
from training.config.features import DinoConfig
from training.config.unet import resolve
from training.model.dinov2 import Dinov2

TINY = ["steps=2", "batch=4", "widths=32,32", "seeds=2"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "HELDOUT", 4)
    monkeypatch.setattr(ladder, "SAMPLES", 2)


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_the_ladder_continues_where_it_stopped(tmp_path: Path, capsys: Any) -> None:
    ladder.main([str(tmp_path), "ingredients=guidance_interval", *TINY])
    first = results(tmp_path)
    assert [(line["arm"], line["seed"]) for line in first] == [
        (arm, seed) for seed in (0, 1) for arm in ("none", "guidance_interval")
    ]
    assert first[0]["levels"] == first[1]["levels"] and first[0]["error"] == pytest.approx(sum(first[0]["levels"]) / 7)
    assert 0 <= first[0]["words"] <= 1
    ladder.main([str(tmp_path), "ingredients=guidance_interval,min_snr+muon", *TINY])
    assert results(tmp_path)[:4] == first and [line["arm"] for line in results(tmp_path)[4:]] == ["min_snr+muon"] * 2
    assert "min_snr+muon" in (tmp_path / "ladder.md").read_text()
    with pytest.raises(SystemExit, match=r"steps=3: .* was made with 2"):
        ladder.main([str(tmp_path), *TINY, "steps=3"])
    ladder.main([str(tmp_path / "again"), "ingredients=guidance_interval", *TINY])
    again = results(tmp_path / "again")
    assert [line["levels"] for line in again] == [line["levels"] for line in first], "the same seed is the same run"


def test_scenes_that_no_oracle_reads_and_photographs(tmp_path: Path) -> None:
    assert ladder.config_of("none", 1, ladder.settings_of({"stage": "base64"})).stage.diffusion.weighting == "min_snr"
    for scene in ("relations", "three", "counts"):
        ladder.main([str(tmp_path / scene), "ingredients=muon", f"scene={scene}", *TINY])
        assert (results(tmp_path / scene)[0]["words"] is None) == (scene != "relations")
    assert "words" not in (tmp_path / "three" / "ladder.md").read_text()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        Image.effect_noise((40, 30 + number), 60).convert("RGB").save(folder / f"{number}.jpg")
    ladder.main([str(tmp_path / "photos"), "ingredients=size_condition", f"pictures={folder}", *TINY])
    lines = results(tmp_path / "photos")
    assert [line["words"] for line in lines] == [None] * 4 and all(math.isfinite(line["error"]) for line in lines)


def test_super_resolution_starts_from_pictures_of_half_the_side(tmp_path: Path) -> None:
    settings = ladder.settings_of({"stage": "sr256", "widths": "32,32"})
    config = ladder.config_of("none", 0, settings)
    assert (settings["size"], settings["preset"]) == (32, "demo_sr") and ladder.settings_of({})["size"] == 16
    assert (config.stage.low_res_size, config.stage.diffusion.shift_from) == (16, 16)
    assert ladder.config_of("none", 0, ladder.settings_of({"stage": "sr1024"})).stage.crop_size == 0
    network = resolve(config.stage.model.preset, dict(config.stage.model.overrides))
    assert settings["network"] == "efficient" and network.efficient
    assert 2 * 3 * network.patch**2 <= network.widths[0], "the stem holds all values of a patch, as in sr256"
    of_demo = ladder.settings_of({"stage": "demo_sr"})
    assert (of_demo["network"], of_demo["preset"]) == ("preset", "demo_sr")
    arm = ladder.config_of("demo_sr:x_pred_v_loss+stage.diffusion.residual=false", 0, settings).stage
    assert (arm.diffusion.weighting, arm.diffusion.residual, arm.sampler.steps) == ("flow_v", False, 10)
    assert arm.model == config.stage.model, "all arms have the network of the ladder"
    assert ladder.config_of("x_pred_v_loss+unshifted", 0, settings).stage.diffusion.shift_from == 0
    data = ladder.pictures(range(2), config, settings, False)
    assert data.low is not None and data.low.shape == (2, 3, 16, 16)
    block = data.images[1, 2, :2, 6:8].float().mean()
    assert data.low[1, 2, 0, 3] == block.round()
    by_four = ladder.settings_of({"stage": "sr256", "widths": "32,32", "factor": "4"})
    config = ladder.config_of("none", 0, by_four)
    assert (config.stage.low_res_size, config.stage.diffusion.shift_from) == (8, 8)
    assert ladder.pictures(range(2), config, by_four, False).low_of(torch.arange(2), "cpu").shape[-1] == 8
    ladder.main([str(tmp_path), "ingredients=muon", "stage=demo_sr", *TINY])
    lines = results(tmp_path)
    assert [line["words"] for line in lines] == [None] * 4 and all(math.isfinite(line["error"]) for line in lines)
    assert all(4 < line["psnr"] < 40 for line in lines)
    plain, muon = (strip.size for strip in (Image.open(tmp_path / f"{arm}-1.png") for arm in ("none", "muon")))
    assert plain == muon == (2 * 32 * 4, 3 * 32 * 4), "true, interpolated and sampled pictures, two each"
    assert all(0 < line["clean_bicubic"] - line["bicubic"] < 1 for line in lines), "the noise of aug_level=0.02"
    assert all(line["detail"] > 0 and line["kept"] > line["psnr"] for line in lines)
    assert "| mean | psnr | bicubic | clean_bicubic | detail | kept |" in (tmp_path / "ladder.md").read_text()
    assert {line["clean_bicubic"] for line in lines if line["seed"] == 0} == {lines[0]["clean_bicubic"]}
    none = sum(line["psnr"] for line in lines if line["arm"] == "none") / 2
    assert f"| {none:.2f} dB | | 1 |" in (tmp_path / "ladder.md").read_text()


def test_detail_is_the_variance_within_low_res_pixels() -> None:
    made = np.zeros((1, 2, 4, 3), np.uint8)
    made[0, :, 1:3] = 10  # columns 0 10 | 10 0: both blocks have mean 5 and variance 25
    reduced, variance = ladder.within(made, 2)
    assert reduced.shape == (1, 1, 2, 3) and (reduced == 5).all() and variance == 25


def test_equal_time_gives_a_slow_arm_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ladder, "pace", lambda arm, *_: asked.append(arm) or {"muon": 2.0, "base64:": 0.8}[arm])
    words = [str(tmp_path), "ingredients=muon,base64:", *TINY, "steps=4", "equal_time=true"]
    ladder.main([*words, "seeds=2"])
    assert {line["arm"]: line["steps"] for line in results(tmp_path)} == {"none": 4, "muon": 2, "base64:": 5}
    ladder.main([*words, "seeds=3"])
    assert asked == ["muon", "base64:"], "once for all seeds"
    with pytest.raises(SystemExit, match=r"equal_time=false: .* was made with true"):
        ladder.main([str(tmp_path), *TINY, "steps=4"])


def test_pace_and_arms_of_another_stage() -> None:
    settings = ladder.settings_of({"widths": "32,32", "batch": "2"})
    assert 0 < ladder.pace("base64:muon", settings, "cpu") < math.inf
    config = ladder.config_of("base64:muon", 0, settings)
    assert (config.stage.diffusion.parametrization, config.optimizer.name) == ("v", "muon")
    assert config.stage.image_size == 16 and ladder.config_of("muon", 0, settings).stage.diffusion.max_weight == 4


def test_losses_on_features_of_an_encoder_trained_on_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From the encoder's training to the ladder's, in a directory with a blank; each loss changes the result."""
    monkeypatch.setattr(scene_encoder, "PICTURES", 8)
    monkeypatch.setattr(scene_encoder, "HELDOUT", 4)
    encoder = tmp_path / "an encoder"
    found = scene_encoder.main([str(encoder), "steps=2", "width=16", "layers=1", "patch=4"])
    assert found.keys() == {"background", "shape", "colour", "size"}
    features, grid = Dinov2(DinoConfig(path=str(encoder), side=16), torch.float32, "cpu")(torch.zeros(2, 3, 16, 16))
    assert (tuple(features.shape), grid) == ((2, 16, 16), (4, 4))
    words = ["ingredients=repa,perceptual", *TINY]
    with pytest.raises(SystemExit, match=r"ingredients=repa: .* set dino.path to the directory"):
        ladder.main([str(tmp_path / "out"), *words])
    ladder.main([str(tmp_path / "out"), *words, f"dino={encoder}", "dino_side=16"])
    lines = results(tmp_path / "out")
    assert [line["arm"] for line in lines] == ["none", "repa", "perceptual"] * 2
    assert len({tuple(line["levels"]) for line in lines}) == 6
    with pytest.raises(SystemExit, match=r"dino=: .* was made with .*an encoder"):
        ladder.main([str(tmp_path / "out"), *TINY])


def test_the_encoder_learns_which_object_covers_each_patch() -> None:
    """Two objects of which each patch belongs to one or none, by the colours of the picture itself."""
    spec = ShapeSpec("white", (Thing("red", "large", "square"), Thing("blue", "small", "circle")), "to the left of")
    right = scene_encoder.answers(spec, 5, 64, 4)
    assert set(right["background"]) == {0} and right["shape"].shape == (256,)
    patches = render(spec, 64, 5).reshape(16, 4, 16, 4, 3).mean((1, 3)).reshape(-1, 3)
    for colour, shape in (((220, 30, 40), "square"), ((40, 70, 225), "circle")):
        inside = np.abs(patches - colour).sum(-1) < 1
        assert inside.any() and (right["shape"][inside] == SHAPES.index(shape)).all()
    empty = np.abs(patches - 250).sum(-1) < 1
    assert empty.any() and all((right[name][empty] == len(words)).all() for name, words in scene_encoder.WORDS.items())
    with pytest.raises(SystemExit, match="side: not known"):
        scene_encoder.main(["out", "side=16"])


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    for word in ("objects=2", "scene=five", "model=huge", "seeds=1", "equal_time=yes", "factor=3", "network=large"):
        with pytest.raises(SystemExit, match=word.partition("=")[0]):
            ladder.main([str(tmp_path), word])


def test_the_table_by_hand() -> None:
    """Two seeds whose logarithms differ by -0.2 and -0.4 at every level, and whose words by 0.10 and 0.20."""
    lines = []
    for seed, (apart, words) in enumerate([(-0.2, 0.1), (-0.4, 0.2)]):
        for arm, shift, more in (("none", 0.0, 0.0), ("muon", apart, words)):
            line = {"arm": arm, "seed": seed, "error": -2 + shift, "levels": [-2 + shift] * 7, "words": 0.5 + more}
            lines.append({**line, "seconds": 10.0 if arm == "none" else 17.0})
    half = 12.7062 * 0.1
    low, high = (100 * math.expm1(-0.3 + sign * half) for sign in (-1, 1))
    detectable = 100 * (1 - math.exp(-(12.7062 + 1.37638) * 0.1))
    rows = ladder.table(lines).splitlines()
    assert rows[2] == f"| none | {math.exp(-2):.4f} | | 50.0 % | | 1 |"
    assert rows[3] == (
        f"| muon | {100 * math.expm1(-0.3):+.1f} % ({low:+.1f} to {high:+.1f}) | {detectable:.1f} % "
        f"| +15.0 ± 63.5 points | 70.4 | 1.70 |"
    )
    assert rows[-1] == "| muon" + " | -26 %" * 7 + " |"
    for line in lines:
        line["seconds"] = 0.0
    assert ladder.table(lines).splitlines()[3].endswith("| 70.4 | |"), "no time was taken"
    del lines[0]["seconds"]
    assert ladder.table(lines).splitlines()[3].endswith("| 70.4 | |")
