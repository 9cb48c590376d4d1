"""`cascade evaluate` end to end on tiny stages, and on a cascade that draws perfectly, whose figures are known."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.config import DataConfig
from data_pipeline.content.images import box_average
from data_pipeline.content.resize import resize_square
from data_pipeline.content.synthetic import caption, example, parse, render
from data_pipeline.shards.writer import ShardWriter
from tests.training.evaluation.extractors import tiny_weights
from tests.training.saved_runs import make_run
from tests.training.tiny import stage_config, tiny_cascade
from tests.training.wandb_files import read_wandb
from training.cascade import Cascade
from training.cascade import bundle as bundled
from training.cascade.requests import number_drawings
from training.commands import evaluate, measuring
from training.commands.shapes import ShapesEvaluation
from training.config.commands import EvaluateCommand
from training.config.experiment import BundleConfig, ClusterConfig, EvaluationConfig, Experiment, RunConfig
from training.evaluation import compare
from training.evaluation import evaluate as evaluate_bundle
from training.evaluation.extractors.base import open_extractors
from training.evaluation.measure import flattened
from training.evaluation.parts import Parts
from training.evaluation.references import ReferenceFile, References
from training.evaluation.shown import Shown
from training.run.directory import RunDir


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


def command(bundle: str, output: Path, keys: dict[str, Any] | None = None, **settings) -> EvaluateCommand:
    return EvaluateCommand(
        bundle=BundleConfig(dir=bundle),
        cluster=ClusterConfig(gpus=False),
        evaluation=EvaluationConfig(**{"samples": 8, "psnr_samples": 3, "batch": 4, "output": str(output)} | settings),
        **(keys or {}),
    )


def values(group: dict[str, Any]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in group.items()}


def test_shapes_end_to_end(bundle: str, heldout: str, tmp_path: Path, capsys) -> None:
    config = command(bundle, tmp_path / "out", reference=heldout)
    result = evaluate.main(config)
    assert set(result["samples"]) == set(result["real"]) == {"background", "colour", "size", "shape", "all"}
    assert result["real"]["all"]["value"] == 1.0 and result["real"]["all"]["interval"][0] < 0.7
    assert result["samples"]["all"]["value"] == 0.0  # random weights
    assert result["n"] == {"samples": 8, "reference": 8, "prompts": 8, "broken": 0}
    assert set(result["psnr"]) == {"sr", "sr_noised", "bicubic", "n", "stages"} and result["psnr"]["n"] == 3
    for entry in result["frechet"].values():
        assert 0 < entry["floor"] < entry["value"]
    for name, entry in flattened(result):
        assert entry["interval"][0] <= entry["value"] <= entry["interval"][1] and entry["n"] > 0, name
    assert {"frechet", "kid", "precision", "recall", "density", "coverage"} < set(result)
    assert result["protocol"]["stages"][1]["name"] == "sr" and result["protocol"]["stages"][1]["sha256"]
    assert result["protocol"]["precision"] == "float32" and result["protocol"]["text_sha"]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["real"] == result["real"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| real held-out drawings | 100.0%" in text and "bicubic" in text and "colour_grid_4x4" in text
    assert Image.open(tmp_path / "out" / "samples.png").width > 800
    printed = capsys.readouterr().out
    assert "held-out drawings read right: background 100.0%" in printed and "compare only figures of equal N" in printed


def test_an_evaluation_is_repeatable(bundle: str, heldout: str, tmp_path: Path) -> None:
    first, second = (evaluate.main(command(bundle, tmp_path / n, reference=heldout, psnr_samples=0)) for n in "ab")
    assert first["frechet"] == second["frechet"] and first["samples"] == second["samples"] and first["psnr"] == {}


def test_without_shards_heldout_drawings_are_made(bundle: str, tmp_path: Path) -> None:
    config = command(bundle, tmp_path, psnr_samples=0)
    config.prepare.draw.objects = 2
    result = evaluate.main(config)
    assert "relation" in result["real"] and result["n"]["samples"] == 8


class Perfect(Cascade):
    """Draws what the caption says, but for every fourth prompt what another caption says; restores with the true
    picture."""

    truth: list[Any]

    def draw(self, prompts, *arguments, stages=None, low_res=None, **options):  # type: ignore[no-untyped-def]
        drawings = number_drawings(list(prompts), [], options.get("seed", 0), 1)
        for index, drawing in enumerate(drawings):
            words = "a small blue square on a black background" if index % 4 == 3 else drawing.prompt
            picture = render(parse(words), 64, seed=index) if low_res is None else self.truth[index]
            drawing.stages = {"base": Image.fromarray(box_average(picture, 4)), "sr": Image.fromarray(picture)}
        return drawings


@pytest.fixture
def evaluation(tmp_path: Path) -> ShapesEvaluation:
    small = tiny_cascade(16, 4)
    perfect = Perfect(small.stages, small.encoder, small.text)
    return ShapesEvaluation(
        command("unused", tmp_path, samples=16, psnr_samples=4), perfect, ["cpu"], open_extractors({})
    )


def test_a_perfect_cascade_scores_as_it_should(evaluation: ShapesEvaluation) -> None:
    real = next(evaluation.source.chunks(16, 16))
    noise = np.random.default_rng(0).integers(-2, 3, real.pictures.shape)
    evaluation.cascade.truth = np.clip(real.pictures + noise, 0, 255).astype(np.uint8)  # type: ignore[attr-defined]
    evaluation.draw()
    result = evaluation.result()
    shares, base = values(result["samples"]), values(result["base"])
    assert shares["all"] == 12 / 16 and shares["shape"] >= 12 / 16
    assert base["background"] == shares["background"]
    assert 40 < result["psnr"]["sr"]["value"] < 50 and 20 < result["psnr"]["bicubic"]["value"] < 35
    assert sum(len(words) for words in result["by_word"].values()) > 8
    shapes = values(result["by_word"]["shape"])
    assert min(shapes.values()) >= 0 and max(shapes.values()) == 1.0


class Twins(Perfect):
    """Draws each prompt's second picture like its first."""

    def draw(self, prompts, *arguments, **options):  # type: ignore[no-untyped-def]
        return [drawing for drawing in super().draw(prompts[::2], *arguments, **options) for _ in range(2)]


def test_two_equal_pictures_of_a_prompt_narrow_no_interval(evaluation: ShapesEvaluation, tmp_path: Path) -> None:
    single = evaluation.cascade
    twins = Twins(single.stages, single.encoder, single.text)
    found = []
    for cascade, several in ((single, 1), (twins, 2)):
        config = command("unused", tmp_path / str(several), samples=16, psnr_samples=0, images_per_prompt=several)
        one = ShapesEvaluation(config, cascade, ["cpu"], evaluation.extractors)
        one.draw()
        found.append(one.result())
    for group in ("samples", "base"):
        once, again = (result[group]["all"] for result in found)
        assert (once["n"], again["n"]) == (16, 32) and again["value"] == once["value"]
        assert again["interval"] == pytest.approx(once["interval"])
    word, once = next((word, entry) for word, entry in found[0]["by_word"]["shape"].items() if 0 < entry["value"] < 1)
    assert found[1]["by_word"]["shape"][word]["interval"] == pytest.approx(once["interval"])


def test_bicubic_is_pillows_on_the_true_low_res_picture(evaluation: ShapesEvaluation) -> None:
    real = evaluation._real(())[0]
    evaluation.cascade.truth = real.pictures  # type: ignore[attr-defined]
    four = real.pictures[:4]
    low = [Image.fromarray(box_average(p, 4)).resize((64, 64), Image.Resampling.BICUBIC) for p in four]
    errors = [np.square(np.asarray(a).astype(float) - b).mean() for a, b in zip(low, four, strict=True)]
    expected = np.mean([10 * np.log10(255**2 / error) for error in errors])
    measured = evaluation._psnr(real)["sr"]
    assert measured["bicubic"].value == pytest.approx(expected) and measured["sr"].value == 100


def test_pictures_are_restored_with_the_original_side_that_was_given(tmp_path: Path) -> None:
    cascade, found = tiny_cascade(size_condition=True), []
    for side in (None, 64):
        config = command("unused", tmp_path, {"original_side": side}, samples=2, psnr_samples=2)
        one = ShapesEvaluation(config, cascade, ["cpu"], open_extractors({}))
        found.append(one._psnr(one._real(())[0])["sr"])
    assert found[0]["sr"].value != found[1]["sr"].value and found[0]["bicubic"].value == found[1]["bicubic"].value


def photographs(folder: Path, count: int, captions: str = "a street in the rain", broken: int = 0) -> str:
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "0.tar")) as writer:
        for index in range(count):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(data, "PNG")
            png = b"no picture" if index < broken else data.getvalue()
            writer.write(str(index), {"png": png, "txt": captions.format(index % 3).encode()})
    return str(folder)


def test_evaluating_pictures_alone_needs_no_captions_for_an_oracle(bundle: str, tmp_path: Path, monkeypatch) -> None:
    folder = photographs(tmp_path / "shards", 12)
    monkeypatch.setattr(measuring, "PART", 5)
    config = command(bundle, tmp_path / "out", kind="pictures", reference=folder, samples=6, reference_samples=12)
    result = evaluate.main(config)
    assert result["n"] == {"samples": 6, "reference": 12, "prompts": 6, "broken": 0} and "samples" not in result
    assert all(entry["value"] > 0 and entry["floor"] is None for entry in result["frechet"].values())
    assert "| colour_grid_4x4 | 48 |" in (tmp_path / "out" / "report.md").read_text()
    whole = evaluate.main(command(bundle, tmp_path / "o2", kind="pictures", reference=folder, samples=12))
    assert whole["n"]["samples"] == whole["n"]["reference"] == 12
    with pytest.raises(ConfigError, match=r"street in the rain.* use evaluation=pictures"):
        evaluate.main(command(bundle, tmp_path / "out", reference=folder))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_pictures_and_figures(
    ranks: int, bundle: str, tmp_path_factory, monkeypatch, capsys
) -> None:
    """Repeated captions are numbered across the whole evaluation: no two samples are the same."""
    folder = tmp_path_factory.mktemp("shared")
    monkeypatch.setattr(measuring, "PART", 3)
    reference = photographs(folder / "shards", 14, "caption {}")
    config = command(bundle, folder / "out", kind="pictures", reference=reference, samples=11, reference_samples=14)
    results = []
    for rank in range(ranks):
        for name, value in {
            "RANK": rank,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "x",
            "MASTER_PORT": 1,
        }.items():
            monkeypatch.setenv(name, str(value))
        results.append(evaluate.main(config))
    assert all("waits" in result for result in results[:-1])
    assert capsys.readouterr().out.count("of 5 parts are done; the process that finishes last") == ranks - 1
    result = results[-1]
    parts = Parts(Path(config.evaluation.output), {}, 0)
    pictures = [
        np.load(file)["shown/sr"] for file in sorted(parts.root.glob("*/0*.npz")) if "shown/sr" in np.load(file)
    ]
    drawn = np.concatenate(pictures)
    assert len({picture.tobytes() for picture in drawn}) == len(drawn) == 11
    seen = {name: entry["value"] for name, entry in flattened(result)}
    assert (
        KNOWN.setdefault("figures", seen) == seen and KNOWN.setdefault("pictures", drawn.tobytes()) == drawn.tobytes()
    )


KNOWN: dict[str, Any] = {}


def test_a_preempted_evaluation_draws_only_what_is_missing(
    bundle: str, heldout: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(measuring, "PART", 3)
    config = command(bundle, tmp_path, kind="pictures", reference=heldout)
    whole = evaluate.main(config)
    drawn = []
    real_draw = Cascade.draw
    monkeypatch.setattr(
        Cascade, "draw", lambda self, prompts, **o: drawn.extend(prompts) or real_draw(self, prompts, **o)
    )
    next(iter((tmp_path / "parts").glob("*/00001.npz"))).unlink()
    again = evaluate.main(config)
    assert len(drawn) == 3 and again["frechet"] == whole["frechet"]
    other = evaluate.main(command(bundle, tmp_path, keys={"guidance": 5}, kind="pictures", reference=heldout))
    assert len(drawn) == 11 and other["frechet"] != whole["frechet"]
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_the_keys_of_sample_change_the_figures_and_are_in_the_protocol(
    bundle: str, heldout: str, tmp_path: Path
) -> None:
    settings = {"kind": "pictures", "reference": heldout, "samples": 4}
    own = evaluate.main(command(bundle, tmp_path / "own", **settings))
    keys = {
        "guidance": [9, 1],
        "steps": 2,
        "sampler": "ddim",
        "aug_level": 0.5,
        "spacing": "karras",
        "threshold": "static",
    }
    changed = evaluate.main(command(bundle, tmp_path / "changed", keys, **settings))
    assert changed["frechet"] != own["frechet"]
    base, sr = (stage["sampler"] for stage in changed["protocol"]["stages"])
    assert (base["guidance"], sr["guidance"], sr["aug_level"]) == (9, 1, 0.5)
    assert (base["steps"], base["name"], base["spacing"], base["threshold"]) == (2, "ddim", "karras", "static")
    with pytest.raises(ConfigError, match="guidance"):
        evaluate.main(command(bundle, tmp_path, {"guidance": [1, 2, 3]}, **settings))


def test_a_stage_is_scored_on_true_low_res_pictures(bundle: str, heldout: str, tmp_path: Path, capsys) -> None:
    settings = {"kind": "pictures", "reference": heldout, "samples": 8, "images_per_prompt": 2}
    evaluate.main(command(bundle, tmp_path / "whole", {"aug_level": 0.0}, **settings))
    alone = evaluate.main(command(bundle, tmp_path / "sr", {"aug_level": 0.0}, from_stage="sr", **settings))
    assert [stage["name"] for stage in alone["protocol"]["stages"]] == ["sr"]
    drawn = np.load(next((tmp_path / "sr" / "parts").glob("*/*.npz")))
    real = next(References(heldout, DataConfig(), 32, 0).chunks(8, 8))
    cascade = Cascade.from_pretrained(bundle)
    low = box_average(real.pictures[3], 2)
    expected = cascade.draw(real.captions[3], stages="sr", low_res=low, aug_level=0.0, numbers=[0])[0].image
    assert np.abs(drawn["shown/sr"][6].astype(int) - np.asarray(expected)).max() <= 1
    compare([str(tmp_path / "whole"), str(tmp_path / "sr")])
    with pytest.raises(ConfigError, match="from_stage=base: it must be a super-resolution stage"):
        evaluate.main(command(bundle, tmp_path / "x", from_stage="base", **settings))
    with pytest.raises(ConfigError, match="from_stage=sr: it starts from reference pictures"):
        evaluate.main(command(bundle, tmp_path / "x", from_stage="sr", kind="pictures", prompts=["a", "b"]))


def test_broken_reference_pictures_are_left_out_and_reported(bundle: str, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "shards", 8, broken=4)
    result = evaluate.main(command(bundle, tmp_path / "out", kind="pictures", reference=folder))
    assert result["n"] == {"samples": 4, "reference": 4, "prompts": 4, "broken": 4}
    assert any("4 reference pictures could not be read" in remark for remark in result["remarks"])
    with pytest.raises(
        DataError, match=r"evaluation\.reference=.*which leaves fewer than 2|evaluation\.reference|substitutes"
    ):
        evaluate.main(
            command(bundle, tmp_path / "o", kind="pictures", reference=photographs(tmp_path / "b", 4, broken=3))
        )


def test_unusable_references_are_refused_by_their_key(bundle: str, tmp_path: Path) -> None:
    for name in ("broken", "page", "pictures"):
        (tmp_path / name).mkdir()
    photographs(tmp_path / "broken", 6, broken=6)
    (tmp_path / "page" / "0.tar").write_bytes(b"<?xml version='1.0'?>")
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    cases = {
        "broken": r"evaluation\.reference: .*0\.tar: sample .* and all 64 substitutes for it are bad",
        "page": r"evaluation\.reference: .*0\.tar: this is not a tar archive",
        "pictures": r"evaluation\.reference=.*contains, for example, 'a\.png'; `cascade prepare` makes shards",
    }
    for name, said in cases.items():
        settings: dict[str, Any] = {"kind": "pictures", "reference": str(tmp_path / name)}
        for keys in ({}, {"action": "reference"}):
            with pytest.raises(DataError, match=said):
                evaluate.main(command(bundle, tmp_path / "out", keys=keys, **settings))
    good = photographs(tmp_path, 4)
    settings = {"kind": "pictures", "reference": good, "training": str(tmp_path / "broken")}
    with pytest.raises(DataError, match=r"evaluation\.training: .* all 64 substitutes"):
        evaluate.main(command(bundle, tmp_path / "out", **settings))
    assert not list((tmp_path / "out").rglob("*.npz")), "nothing has been drawn"


def test_constant_grey_and_16_bit_references_have_finite_figures(bundle: str, tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "shards" / "0.tar")) as writer:
        for index, picture in enumerate(
            [
                Image.new("L", (40, 40), 128),
                Image.new("I;16", (40, 40), 30000),
                *[Image.new("RGB", (40, 40), "red")] * 6,
            ]
        ):
            data = io.BytesIO()
            picture.save(data, "PNG")
            writer.write(str(index), {"png": data.getvalue(), "txt": b"a wall"})
    result = evaluate.main(command(bundle, tmp_path / "out", kind="pictures", reference=str(tmp_path / "shards")))
    assert result["n"]["reference"] == 8 and result["n"]["broken"] == 0
    for name, entry in flattened(result):
        assert np.isfinite([entry["value"], *entry["interval"], entry["detectable"]]).all(), name


def test_more_samples_than_captions_is_reported(bundle: str, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "shards", 2)
    result = evaluate.main(command(bundle, tmp_path / "out", kind="pictures", reference=folder, samples=100_000_000))
    said = " ".join(result["remarks"])
    assert f"evaluation.samples=100000000 asks for more captions than the 2 in {folder}: all 2 were used" in said
    assert "covariance is singular" in said
    assert "precision" not in result


def test_references_are_decoded_at_full_scale(tmp_path: Path) -> None:
    """The stated rule, applied by hand to the JPEG's full decode, to the bit."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    data = io.BytesIO()
    noise.save(data, "JPEG", quality=90)
    with ShardWriter(str(tmp_path / "0.tar")) as writer:
        for key in "ab":
            writer.write(key, {"jpg": data.getvalue(), "txt": b"x"})
    real = next(References(str(tmp_path), DataConfig(), 32, 0).chunks(8, 8))
    import simplejpeg

    whole = simplejpeg.decode_jpeg(data.getvalue())
    assert (real.pictures[0] == resize_square(whole, 80, 0, 480, 32)).all()


def test_reference_statistics_are_computed_once(bundle: str, heldout: str, tmp_path: Path) -> None:
    direct = evaluate.main(
        command(bundle, tmp_path / "direct", kind="pictures", reference=heldout, reference_samples=20)
    )
    made = evaluate.main(
        command(bundle, tmp_path / "stats", {"action": "reference"}, kind="pictures", reference=heldout)
    )
    assert made["n"] == 20 and made["broken"] == 0
    again = evaluate.main(command(bundle, tmp_path / "again", kind="pictures", reference=made["reference"]))
    assert again["frechet"] == direct["frechet"] and again["n"] == direct["n"]
    with pytest.raises(ConfigError, match="the oracle needs reference pictures"):
        evaluate.main(command(bundle, tmp_path / "x", reference=made["reference"]))
    stored = ReferenceFile.read(made["reference"])
    stored.facts["rule"] = "another"
    stored.write(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="its rule is another, but this evaluation's is middle square"):
        evaluate.main(command(bundle, tmp_path / "x", kind="pictures", reference=str(tmp_path / "other.safetensors")))
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not reference statistics"):
        evaluate.main(command(bundle, tmp_path / "x", kind="pictures", reference=str(tmp_path / "no.safetensors")))


def test_prompts_need_no_reference_and_several_pictures_have_a_diversity(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    clip = tiny_weights.clip_folder(tmp_path / "clip")
    settings = {
        "kind": "pictures",
        "prompts": ["a cat", "a dog", "a cat"],
        "images_per_prompt": 2,
        "extractors": {"clip": clip},
    }
    result = evaluate.main(command(bundle, tmp_path / "out", **settings))
    assert result["n"] == {"samples": 6, "reference": 0, "prompts": 3, "broken": 0}
    assert -1 <= result["clip_score"]["clip"]["value"] <= 1 and set(result["diversity"]) > {"clip"}
    assert "frechet" not in result and result["protocol"]["reference"] is None
    dino = tiny_weights.dinov2_folder(tmp_path / "dino")
    reference = photographs(tmp_path / "shards", 6)
    found = evaluate.main(
        command(bundle, tmp_path / "both", **settings | {"reference": reference, "extractors": {"c": clip, "d": dino}})
    )
    assert set(found["cmmd"]) == {"c"} and set(found["dino_mmd"]) == {"d"} and found["dino_mmd"]["d"]["value"] > 0
    with pytest.raises(ConfigError, match=r"evaluation\.prompts=.*it has 1 prompt; give at least two"):
        evaluate.main(command(bundle, tmp_path / "x", kind="pictures", prompts=["one"]))


def test_two_evaluations_are_compared_and_incomparable_ones_refused(
    bundle: str, heldout: str, tmp_path: Path, capsys
) -> None:
    settings = {"kind": "pictures", "reference": heldout, "samples": 16}
    for name, guidance in (("a", 2), ("b", 30)):
        evaluate.main(command(bundle, tmp_path / name, {"guidance": guidance}, **settings))
    question = {"action": "compare", "results": [str(tmp_path / "a"), str(tmp_path / "b" / "result.json")]}
    found = evaluate.main(command(bundle, tmp_path, question))
    figures = found["others"][0]["figures"]
    entry = figures["frechet.colour_grid_4x4"]
    assert entry["value"] == pytest.approx(entry["other"] - entry["baseline"])
    assert {entry["verdict"] for entry in figures.values()} <= {"better", "worse", "undecided"}
    same = evaluate.main(command(bundle, tmp_path, {"action": "compare", "results": [str(tmp_path / "a")] * 2}))
    assert all(e["value"] == 0 and e["verdict"] == "undecided" for e in same["others"][0]["figures"].values())
    assert "paired, 95 % intervals" in capsys.readouterr().out
    for name, change, field in (
        ("n", {"samples": 12}, r"n\.samples is 16 in the first and 12"),
        ("ref", {"reference_samples": 18}, r"n\.reference is 16 in the first and 18"),
    ):
        evaluate.main(command(bundle, tmp_path / name, **(settings | change)))
        with pytest.raises(ConfigError, match=f"cannot be compared: {field}"):
            compare(results=[str(tmp_path / "a"), str(tmp_path / name)])
    stored = json.loads((tmp_path / "b" / "result.json").read_text())
    stored["protocol"]["extractors"]["colour_grid_4x4"]["rule"] = "another"
    (tmp_path / "b" / "result.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"protocol\.extractors\.colour_grid_4x4"):
        compare(results=question["results"])
    with pytest.raises(DataError, match=r"there is no result\.json"):
        compare(results=[str(tmp_path / "a"), str(tmp_path / "absent")])


def test_from_python_in_five_lines(bundle: str, heldout: str, tmp_path: Path) -> None:
    settings = {"reference": Path(heldout), "samples": np.int64(6), "gpus": False}
    a = evaluate_bundle(bundle, output=str(tmp_path / "a"), **settings)
    evaluate_bundle(bundle, output=str(tmp_path / "b"), guidance=9, **settings)
    figures = compare([str(tmp_path / "a"), str(tmp_path / "b")])["others"][0]["figures"]
    assert figures["kid.colour_grid_4x4"]["baseline"] == a["kid"]["colour_grid_4x4"]["value"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples": "many"}, r"evaluation\.samples: Value 'many' of type 'str' could not be converted to Integer"),
        ({"seed": 1.5}, r"seed: Value '1\.5' of type 'float' could not be converted to Integer"),
        ({"extractors": {"a": {"kind": "nope"}}}, r"evaluation\.extractors: kind=nope: it must be"),
        ({"extractors": {"a": {"weights": "x"}}}, r"evaluation\.extractors\.a\.weights: Key 'weights' not in"),
    ],
)
def test_settings_in_python_are_checked_as_those_of_the_command_line(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        evaluate_bundle("nowhere", output="nothing", **settings)


def test_mistakes_are_reported_in_one_sentence(bundle: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.reference: set it to held-out shards"):
        evaluate.main(command(bundle, tmp_path, kind="pictures"))
    with pytest.raises(DataError, match="not a bundle"):
        evaluate.main(command(str(tmp_path / "absent"), tmp_path))
    with pytest.raises(ConfigError, match=r"evaluation\.samples=1"):
        EvaluationConfig(samples=1)
    with pytest.raises(ConfigError, match=r"evaluation\.psnr_samples=1: an interval needs at least 2 pictures"):
        EvaluationConfig(psnr_samples=1)
    with pytest.raises(ConfigError, match="action=guess: it must be evaluate"):
        EvaluateCommand(action="guess")
    with pytest.raises(ConfigError, match="action=compare needs at least two"):
        EvaluateCommand(action="compare", results=["a"])
    with pytest.raises(ConfigError, match="only action=compare and action=pareto use it, not evaluate"):
        EvaluateCommand(results=["a"])
    with pytest.raises(DataError, match=r"evaluation\.reference"):
        evaluate.main(command(bundle, tmp_path, kind="pictures", reference=str(tmp_path / "absent")))


class Copying(Cascade):
    """Draws pictures of its own, or, for one prompt, a training picture with a little noise."""

    planted: np.ndarray

    def draw(self, prompts, *arguments, **options):  # type: ignore[no-untyped-def]
        drawings = number_drawings(list(prompts), [], options.get("seed", 0), 1)
        for index, drawing in enumerate(drawings):
            picture = example(5000 + index, 32, seed=9)[0]
            if drawing.prompt == "copy":
                noise = np.random.default_rng(index).integers(-2, 3, self.planted.shape)
                picture = np.clip(self.planted + noise, 0, 255).astype(np.uint8)
            drawing.stages = {"base": Image.fromarray(picture), "sr": Image.fromarray(picture)}
        return drawings


def test_a_planted_copy_of_a_training_picture_is_found(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "train" / "00000.tar")) as writer:
        for index in range(60):
            data = io.BytesIO()
            Image.fromarray(example(index, 32, seed=1)[0]).save(data, "PNG")
            writer.write(f"{index:05d}", {"png": data.getvalue(), "txt": b"a drawing"})
    planted = example(37, 32, seed=1)[0]
    small = tiny_cascade()
    cascade = Copying(small.stages, small.encoder, small.text)
    cascade.planted = planted.astype(int)
    table = tmp_path / "list.tsv"
    pages = {}
    for name, first in (("with", "copy"), ("without", "no copy")):
        table.write_text(f"Prompt\tCategory\n{first}\tA\nan owl\tB\na fox\tB\n")
        keys = {"kind": "pictures", "prompts": str(table), "samples": 3, "training": str(tmp_path / "train")}
        result = evaluate.evaluate_cascade(command("unused", tmp_path / name, **keys), (cascade, ["cpu"]))
        pages[name] = (tmp_path / name / "report.html").read_text()
        copies = result["copies"]["colour_grid_4x4"]
        assert (copies["value"], copies["n"]) == ((1 / 3, 3) if first == "copy" else (0.0, 3))
        assert result["protocol"]["training"]["searched"] == 60
    assert pages["with"].count('class="copy"') == 1 and 'class="copy"' not in pages["without"]
    assert ": a copy" in pages["with"] and "nearest training picture" in pages["with"]
    assert "Samples: A" in pages["with"] and "Samples: B" in pages["with"], "pictures by category"
    kept = Shown.read(tmp_path / "with")
    assert kept is not None and list(kept.category) == ["A", "B", "B"] and kept.prompt[0] == "copy"


def test_training_pictures_as_the_reference_are_noticed(bundle: str, tmp_path: Path) -> None:
    """Also if only their features are read."""
    folder = photographs(tmp_path / "shards", 12)
    keys: dict[str, Any] = {"kind": "pictures", "samples": 3, "reference": folder}
    file = evaluate.main(command(bundle, tmp_path / "file", {"action": "reference"}, **keys))["reference"]
    cascade = tiny_cascade()
    cascade.stages[1].origin["data"] = References(folder, DataConfig(), 32, 0).fingerprint
    for name, reference in (("shards", folder), ("file", file)):
        config = command("unused", tmp_path / f"{name}-out", **keys | {"reference": reference})
        remarks = evaluate.evaluate_cascade(config, (cascade, ["cpu"]))["remarks"]
        assert f"evaluation.reference={reference} is what sr learnt from: such figures" in " ".join(remarks)
    config = command(bundle, tmp_path / "out", **keys)
    assert "learnt from" not in " ".join(evaluate.main(config)["remarks"])


def test_the_best_setting_of_a_sweep_goes_into_the_bundle(tmp_path: Path, capsys) -> None:
    bundle, table = tmp_path / "bundle", tmp_path / "list.txt"
    tiny_cascade().save(str(bundle))
    heldout = photographs(tmp_path / "heldout", 12)
    table.write_text("a\nb\nc\nd\ne\nf\n")
    keys: dict[str, Any] = {"kind": "pictures", "prompts": str(table), "reference": heldout, "samples": 6}
    results = [
        evaluate.main(command(str(bundle), tmp_path / str(g), keys={"guidance": g, "steps": 2}, **keys)) for g in (1, 6)
    ]
    paths = [str(tmp_path / str(g)) for g in (1, 6)]
    config = command(str(bundle), tmp_path / "out", keys={"action": "pareto", "record": True, "results": paths})
    curve = evaluate.main(config)
    axis = curve["axes"][1].partition(".")
    best = min(results, key=lambda result: result[axis[0]][axis[2]]["value"])
    content = json.loads((bundle / "bundle.json").read_text())
    assert [s["config"]["sampler"] for s in content["stages"]] == [s["sampler"] for s in best["protocol"]["stages"]]
    assert content["figures"]["values"]["kid.colour_grid_4x4"]["value"] == best["kid"]["colour_grid_4x4"]["value"]
    card = (bundle / "README.md").read_text()
    assert "6 samples of 6 prompts against 6 reference pictures." in card and "| kid.colour_grid_4x4 |" in card
    assert f"{bundle}: its sampler settings are now " in capsys.readouterr().out
    opened = Cascade.from_pretrained(str(bundle))
    opened.save(str(tmp_path / "copy"))
    assert json.loads((tmp_path / "copy" / "bundle.json").read_text())["figures"] == content["figures"]
    assert "| kid.colour_grid_4x4 |" in (tmp_path / "copy" / "README.md").read_text()
    opened.to(torch.bfloat16).save(str(tmp_path / "rounded"))
    assert "| kid." not in (tmp_path / "rounded" / "README.md").read_text(), "these weights were not evaluated"
    again = evaluate.main(command(str(bundle), tmp_path / "own", keys={"record": True}, **keys))
    assert again["kid"] == best["kid"], "the bundle's own settings now"
    other = tmp_path / "other"
    cascade = tiny_cascade()
    with torch.no_grad():
        next(cascade.stages[1].unet.parameters()).add_(1)
    cascade.save(str(other))
    config.bundle.dir = str(other)
    with pytest.raises(ConfigError, match=r"its sr is \w+, but the evaluation used \w+; use the bundle that was"):
        evaluate.main(config)


def test_the_curve_of_a_sweep_goes_to_the_wandb_run_of_the_last_stage(tmp_path: Path, capsys) -> None:
    runs = [
        make_run(tmp_path / "base", stage_config("base", 16)),
        make_run(tmp_path / "sr", stage_config("sr", 32, 16), wandb="offline"),
    ]
    bundled.write(str(tmp_path / "bundle"), bundled.collect(runs))
    heldout = photographs(tmp_path / "heldout", 8)
    keys: dict[str, Any] = {"kind": "pictures", "reference": heldout, "samples": 8}
    paths = [str(tmp_path / str(guidance)) for guidance in (1, 6)]
    for path, guidance in zip(paths, (1, 6), strict=True):
        evaluate.main(command(str(tmp_path / "bundle"), Path(path), keys={"guidance": guidance, "steps": 2}, **keys))
    evaluate.main(command("unused", tmp_path / "out", keys={"action": "pareto", "results": paths}))
    assert f"{tmp_path / 'sr'}: the curve was logged to W&B as `pareto`" in capsys.readouterr().out
    run = RunDir(Experiment(run=RunConfig(dir=runs[1])))
    (logged,) = [values["pareto.path"] for _, values in read_wandb(run) if "pareto.path" in values]
    (file,) = Path(runs[1]).glob(f"wandb/offline-run-*/files/{logged}")
    assert file.read_bytes() == (tmp_path / "out" / "pareto.png").read_bytes()
    assert not list(Path(runs[0]).glob("wandb/*"))
