"""`cascade sample`: files, metadata, resuming, sharing among processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.tiny import tiny_cascade
from training.cascade import Cascade
from training.cascade.requests import picture_seed
from training.commands import evaluate, sample
from training.config.commands import EvaluateCommand, SampleCommand
from training.config.experiment import BundleConfig, EvaluationConfig, SamplingConfig

PROMPTS = ["a red circle", "蓝天 ★ 白云"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bundle")
    tiny_cascade().save(str(path))
    return str(path)


def command(bundle: str, output: Path, **values) -> SampleCommand:
    return SampleCommand(**{"from_bundle": bundle, "output": str(output), "prompts": PROMPTS, "batch": 2} | values)


def mtimes(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.rglob("*.png") if p.name != "grid.png"}


def test_one_png_per_prompt_with_everything_in_its_metadata(bundle: str, tmp_path: Path, capsys) -> None:
    result = sample.main(command(bundle, tmp_path, seed=4, guidance=[3, 1], negative_prompts="blurry"))
    names = [image["file"] for image in result["images"]]
    assert names == ["00000-a_red_circle.png", "00001-蓝天_白云.png"]
    assert result["drawn"] == 2 and result["kept"] == 0 and result["grid"] == str(tmp_path / "sheet" / "grid.png")
    assert result["images"][0]["seed"] == picture_seed(4, "a red circle", 0)
    json.dumps(result)
    for name, prompt in zip(names, PROMPTS, strict=True):
        image = Image.open(tmp_path / name)
        assert image.size == (32, 32)
        assert image.info["prompt"] == prompt and image.info["negative_prompt"] == "blurry"
        assert image.info["seed"] == "4" and image.info["number"] == "0"
        settings = json.loads(image.info["settings"])
        assert [s["sampler"]["guidance"] for s in settings["stages"]] == [3.0, 1.0]
        assert settings["stages"][0]["sha256"] and settings["stages"][0]["step"] == 7
        assert "words" in settings["text"], "the encoder's identity, wherever it lies"
        assert Image.open(tmp_path / "base" / name).size == (16, 16)
    expected = Cascade.from_pretrained(bundle).generate(PROMPTS, "blurry", guidance=[3, 1], seed=4)
    assert np.array_equal(np.asarray(Image.open(tmp_path / names[1])), np.asarray(expected[1]))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{tmp_path}: 2 pictures",
        f"{tmp_path}/sheet/grid.png: 2 of 2 pictures",
    ]


def test_the_grid_shows_base_beside_final(bundle: str, tmp_path: Path) -> None:
    sample.main(command(bundle, tmp_path, sampling=SamplingConfig(columns=1)))
    grid = np.asarray(Image.open(tmp_path / "sheet" / "grid.png").convert("RGB"))
    base = np.asarray(Image.open(tmp_path / "base" / "00000-a_red_circle.png"))
    final = np.asarray(Image.open(tmp_path / "00000-a_red_circle.png"))
    shown = [np.kron(picture, np.ones((192 // len(picture),) * 2 + (1,), np.uint8)) for picture in (base, final)]
    beside = np.concatenate([shown[0], np.full((192, 16, 3), 255, np.uint8), shown[1]], axis=1)
    height, width = grid.shape[0] - beside.shape[0], grid.shape[1] - beside.shape[1]
    found = [(y, x) for y in range(height) for x in range(width) if np.array_equal(grid[y, x : x + 9], beside[0, :9])]
    assert any(np.array_equal(grid[y : y + 192, x : x + 400], beside) for y, x in found)


def test_the_same_command_again_draws_only_what_is_missing(bundle: str, tmp_path: Path) -> None:
    sample.main(command(bundle, tmp_path, num_images=2))
    before = mtimes(tmp_path)
    assert len(before) == 8
    (tmp_path / "00000-a_red_circle-1.png").unlink()
    damaged = tmp_path / "00001-蓝天_白云-0.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    result = sample.main(command(bundle, tmp_path, num_images=2))
    after = mtimes(tmp_path)
    assert result["drawn"] == 2 and result["kept"] == 2
    assert {name for name in before if before[name] != after[name]} == {
        f"{folder}{name}.png" for folder in ("", "base/") for name in ("00000-a_red_circle-1", "00001-蓝天_白云-0")
    }
    fresh = Cascade.from_pretrained(bundle).generate("a red circle", num_images=2)[1]
    difference = np.abs(np.asarray(fresh).astype(int) - np.asarray(Image.open(tmp_path / "00000-a_red_circle-1.png")))
    assert difference.max() <= 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"guidance": 5}, {"steps": 2}, {"negative_prompts": "dark"}])
def test_other_settings_are_drawn_again(bundle: str, tmp_path: Path, change: dict, capsys) -> None:
    sample.main(command(bundle, tmp_path, prompts="a red circle"))
    assert sample.main(command(bundle, tmp_path, prompts="a red circle"))["drawn"] == 0
    assert "other settings" not in capsys.readouterr().out
    assert sample.main(command(bundle, tmp_path, prompts="a red circle", **change))["drawn"] == 1
    name = {"seed": "seed", "negative_prompts": "negative_prompt"}.get(next(iter(change)), "stages")
    assert f"pictures in {tmp_path} with other settings ({name}), drawn again: 1" in capsys.readouterr().out


def test_other_weights_are_drawn_again(bundle: str, tmp_path: Path) -> None:
    sample.main(command(bundle, tmp_path, prompts="a red circle"))
    cascade = Cascade.from_pretrained(bundle)
    cascade.stages[1].unet.conv_out.bias.add_(0.1)
    cascade.save(str(tmp_path / "other"))
    assert sample.main(command(str(tmp_path / "other"), tmp_path, prompts="a red circle"))["drawn"] == 1


def test_prompts_from_a_file_or_the_experiment(bundle: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square \n", encoding="utf-8")
    from_file = sample.main(command(bundle, tmp_path / "a", prompts=str(file)))
    assert [image["prompt"] for image in from_file["images"]] == ["a red circle", "a blue square"]
    own = SamplingConfig(prompts=["a cat"], output=str(tmp_path / "b"))
    result = sample.main(SampleCommand(from_bundle=bundle, sampling=own))
    assert result["output"] == str(tmp_path / "b") and (tmp_path / "b" / "00000-a_cat.png").exists()


def test_results_do_not_go_into_the_bundle(bundle: str) -> None:
    before = sorted(Path(bundle).rglob("*"))
    with pytest.raises(ConfigError, match=f"output={bundle}: this is the bundle itself; choose another directory"):
        sample.main(command(bundle, Path(bundle)))
    for action in ("evaluate", "reference"):
        settings = EvaluationConfig(output=bundle)
        with pytest.raises(ConfigError, match=r"evaluation\.output=.*: this is the bundle itself"):
            evaluate.main(EvaluateCommand(action=action, evaluation=settings, bundle=BundleConfig(dir=bundle)))
    assert sorted(Path(bundle).rglob("*")) == before


def test_explain_writes_heat_maps_of_words_and_diversity_is_printed(bundle: str, tmp_path: Path, capsys) -> None:
    result = sample.main(command(bundle, tmp_path, prompts=["a red circle"], explain=True, num_images=2))
    assert (tmp_path / "words" / "00000-a_red_circle-1.png").exists()
    assert result["diversity"]["features"] == "colour_grid_4x4" and result["diversity"]["mean"] > 0
    assert list(result["diversity"]["prompts"]) == ["a red circle"]
    assert "diversity (colour_grid_4x4, mean pairwise distance)" in capsys.readouterr().out
    assert sample.main(command(bundle, tmp_path, prompts=["a red circle"], explain=True, num_images=2))["drawn"] == 0


def test_words_of_another_picture_are_drawn_again(bundle: str, tmp_path: Path) -> None:
    """Heat maps from a run with another seed are not kept beside pictures that have been drawn again."""
    for seed, explain, drawn in ((1, True, 1), (2, False, 1), (2, True, 1), (2, True, 0)):
        found = sample.main(command(bundle, tmp_path, prompts=["a red circle"], seed=seed, explain=explain))
        assert found["drawn"] == drawn
    fresh = sample.main(command(bundle, tmp_path / "fresh", prompts=["a red circle"], seed=2, explain=True))
    name = fresh["images"][0]["file"]
    assert (tmp_path / "words" / name).read_bytes() == (tmp_path / "fresh" / "words" / name).read_bytes()


def test_truncated_prompts_are_reported(bundle: str, tmp_path: Path, capsys) -> None:
    sample.main(command(bundle, tmp_path, prompts=["a red circle", "a very " * 30 + "red circle"]))
    assert "1 of 2 prompts are longer than the 10 tokens that the bundle's" in capsys.readouterr().out


def test_processes_share_the_prompts(bundle: str, tmp_path: Path, monkeypatch) -> None:
    prompts = [f"number {i}" for i in range(3)]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    results = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        results.append(sample.main(command(bundle, tmp_path, prompts=prompts)))
    assert [[image["prompt"] for image in r["images"]] for r in results] == [["number 0", "number 2"], ["number 1"]]
    assert "grid" not in results[0] and Path(results[1]["grid"]).exists()


def test_a_picture_to_start_from(bundle: str, tmp_path: Path) -> None:
    picture, mask = tmp_path / "red.png", tmp_path / "mask.png"
    Image.new("RGB", (32, 32), (250, 20, 20)).save(picture)
    half = Image.new("L", (32, 32), 0)
    half.paste(255, (0, 0, 16, 32))
    half.save(mask)
    values = {"image": str(picture), "mask": [str(mask)] * 2, "strength": 0.6}
    result = sample.main(command(bundle, tmp_path / "out", **values))
    drawn = Image.open(tmp_path / "out" / result["images"][0]["file"])
    assert np.abs(np.asarray(drawn)[:, 16:].astype(int) - (250, 20, 20)).max() <= 1
    settings = json.loads(drawn.info["settings"])
    assert settings["strength"] == 0.6 and settings["image"]["file"] == str(picture)
    assert sample.main(command(bundle, tmp_path / "out", **values))["drawn"] == 0
    Image.new("RGB", (32, 32), (20, 250, 20)).save(picture)  # another picture under the same name
    assert sample.main(command(bundle, tmp_path / "out", **values))["drawn"] == 2


def test_stages_samplers_and_low_res_pictures(bundle: str, tmp_path: Path) -> None:
    base = sample.main(command(bundle, tmp_path / "base", stages=1, sampler="ddim"))
    file = tmp_path / "base" / base["images"][0]["file"]
    assert Image.open(file).size == (16, 16) and not (tmp_path / "base" / "base").exists()
    stages = json.loads(Image.open(file).info["settings"])["stages"]
    assert [(s["name"], s["sampler"]["name"]) for s in stages] == [("base", "ddim")]
    result = sample.main(command(bundle, tmp_path / "sr", stages="sr", low_res=str(file), aug_level=0.3))
    drawn = Image.open(tmp_path / "sr" / result["images"][0]["file"])
    assert drawn.size == (32, 32)
    assert json.loads(drawn.info["settings"])["stages"][0]["sampler"]["aug_level"] == 0.3


def test_repeated_prompts_have_a_diversity(bundle: str, tmp_path: Path) -> None:
    result = sample.main(command(bundle, tmp_path, prompts=["a red circle", "a cat", "a red circle"]))
    assert list(result["diversity"]["prompts"]) == ["a red circle"], "one picture has no distance to itself"
    assert result["diversity"]["mean"] == result["diversity"]["prompts"]["a red circle"] > 0


def test_mistakes_are_reported_in_one_sentence(bundle: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompts: give a text file"):
        sample.main(command(bundle, tmp_path, prompts=None))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"prompts=.*empty\.txt: it contains no prompt; give a text file"):
        sample.main(command(bundle, tmp_path, prompts=str(tmp_path / "empty.txt")))
    with pytest.raises(DataError, match=r"output=.*empty\.txt: cannot be written .*choose another output"):
        sample.main(command(bundle, tmp_path / "empty.txt"))
    with pytest.raises(DataError, match=r"absent\.txt: no such file"):
        sample.main(command(bundle, tmp_path, prompts="absent.txt"))
    with pytest.raises(ConfigError, match="3 for 2 prompts"):
        sample.main(command(bundle, tmp_path, negative_prompts=["a", "b", "c"]))
    with pytest.raises(DataError, match=r"image=absent\.png: no such file"):
        sample.main(command(bundle, tmp_path, image="absent.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="not a readable picture"):
        sample.main(command(bundle, tmp_path, image=str(tmp_path / "text.png")))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(DataError, match="not a readable picture"):
        sample.main(command(bundle, tmp_path, image=str(tmp_path / "cut.png")))
    with pytest.raises(ConfigError, match="batch=0"):
        sample.main(command(bundle, tmp_path, batch=0))
    with pytest.raises(ConfigError, match=r"strength=0\.5: it needs `image`"):
        sample.main(command(bundle, tmp_path, strength=0.5))
    with pytest.raises(ConfigError, match="stages=sr9: no such stage"):
        sample.main(command(bundle, tmp_path, stages="sr9"))
    with pytest.raises(DataError, match="not a bundle"):
        sample.main(command(str(tmp_path / "absent"), tmp_path))


def test_pictures_of_other_prompts_are_set_aside(bundle: str, tmp_path: Path, capsys) -> None:
    sample.main(command(bundle, tmp_path, prompts=["a red circle", "a cat"]))
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")  # not drawn by this command: left alone
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")  # as an earlier version left it
    sample.main(command(bundle, tmp_path, prompts=["a red circle", "a dog"]))
    assert "1 pictures of other prompts were moved" in capsys.readouterr().out
    found = {file.name for file in tmp_path.glob("*.png")}
    assert found == {"00000-a_red_circle.png", "00001-a_dog.png", "mine.png"}
    assert {str(file.relative_to(tmp_path / "earlier")) for file in (tmp_path / "earlier").rglob("*.png")} == {
        "00001-a_cat.png",
        "base/00001-a_cat.png",
    }


def test_a_refused_command_leaves_no_empty_directory(tmp_path: Path) -> None:
    bundle, output = BundleConfig(dir=str(tmp_path / "none")), tmp_path / "runs" / "mine"
    with pytest.raises(DataError):
        sample.main(SampleCommand(prompts=["a"], from_bundle=bundle.dir, output=str(output / "samples")))
    evaluation = EvaluationConfig(output=str(output / "evaluation"))
    with pytest.raises(DataError):
        evaluate.main(EvaluateCommand(bundle=bundle, evaluation=evaluation))
    assert not list(tmp_path.iterdir())
