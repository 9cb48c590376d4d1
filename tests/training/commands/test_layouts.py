"""Generated pictures in the layouts that other tools read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.tiny import tiny_cascade
from training.cascade.prompts import read_prompts
from training.commands import layouts, sample
from training.config.commands import SampleCommand
from training.config.experiment import BundleConfig, ClusterConfig

LINES: list[dict[str, Any]] = [
    {"tag": "colors", "item_id": "p1", "prompt": "a red/blue cat", "include": [1]},
    {"tag": "counting", "item_id": "p2", "prompt": "two dogs"},
]


@pytest.fixture
def command(tmp_path: Path):
    tiny_cascade().save(str(tmp_path / "bundle"))
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in LINES))

    def run(layout: str, num_images: int, **keys):
        values = {"prompts": str(tmp_path / "list.jsonl"), "output": str(tmp_path / "out")} | keys
        return sample.main(
            SampleCommand(
                bundle=BundleConfig(dir=str(tmp_path / "bundle")), cluster=ClusterConfig(gpus=False),
                layout=layout, num_images=num_images, **values,
            )
        )  # fmt: skip

    return run


def files(folder: str) -> set[str]:
    return {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}


def test_each_tool_finds_what_it_reads(command) -> None:
    found = command("geneval", 4)["layout"]
    expected = {f"{i:05d}/samples/{k:04d}.png" for i in range(2) for k in range(4)}
    assert files(found) == expected | {"00000/metadata.jsonl", "00001/metadata.jsonl"}
    assert json.loads((Path(found) / "00000/metadata.jsonl").read_text()) == LINES[0]
    found = command("dpg", 4)["layout"]
    assert files(found) == {"p1.png", "p2.png"}
    square = Image.open(Path(found) / "p2.png")
    assert square.size == (64, 64)
    last = Image.open(Path(found).parent / "00001-two_dogs-3.png").convert("RGB")
    assert square.crop((32, 32, 64, 64)).tobytes() == last.tobytes()
    wide = Image.open(Path(command("dpg", 4, size=[64, 32])["layout"]) / "p2.png")
    last = Image.open(Path(found).parent / "00001-two_dogs-3.png").convert("RGB")
    assert wide.size == (128, 64) and wide.crop((64, 32, 128, 64)).tobytes() == last.tobytes()
    found = command("geneval2", 1)["layout"]
    paths = json.loads((Path(found) / "image_paths.json").read_text())
    assert set(paths) == {line["prompt"] for line in LINES} and all(Path(p).is_file() for p in paths.values())
    found = command("t2i_compbench", 2)["layout"]
    assert files(found) == {f"samples/{n}.png" for n in (
        "a red blue cat_000000", "a red blue cat_000001", "two dogs_000002", "two dogs_000003")}  # fmt: skip
    assert files(command("flat", 1)["layout"]) == {"00000-0.png", "00001-0.png"}


def test_pictures_that_a_tool_could_not_read_are_refused_before_drawing(command, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout=nothing: it must be flat"):
        command("nothing", 1)
    with pytest.raises(ConfigError, match="it reads 4 pictures per prompt; set num_images=4"):
        command("geneval", 1)
    with pytest.raises(ConfigError, match=r"prompts=FILE\.jsonl, with a field item_id"):
        command("dpg", 4, prompts=["a cat"])
    with pytest.raises(ConfigError, match="some prompts are repeated"):
        layouts.check_layout("geneval2", ["a", "a"], 1, [])
    with pytest.raises(ConfigError, match="too long"):
        layouts.check_layout("t2i_compbench", ["a" * 250], 1, [])
    with pytest.raises(ConfigError, match=r"item_id '\.\./a' cannot name a file"):
        layouts.check_layout("dpg", ["a"], 4, [{"item_id": "../a"}])
    with pytest.raises(ConfigError, match="two prompts have the item_id 'a'"):
        layouts.check_layout("dpg", ["a", "b"], 4, [{"item_id": "a"}] * 2)
    assert not (tmp_path / "out" / "00000-a_cat-0.png").exists()


def test_lines_of_json_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": " a cat "}\n\n{"prompt": "b"}\n')
    assert read_prompts(str(file)) == ["a cat", "b"]
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="line 2 has no text in a field `prompt`"):
        read_prompts(str(file))
    file.write_text("{")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_prompts(str(file))


def test_tables_of_other_benchmarks(command, tmp_path: Path) -> None:
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text(
        'Prompt\tCategory\tChallenge\tNote\na "cat"\tFood & Beverage\tBasic\t\na dog\tAnimals\tQuantity\t\n'
    )
    found = Path(command("parti", 2, prompts=str(parti))["layout"])
    names = [f"{c}/{p}-{k}.png" for c, p in (("Food_Beverage", "00000"), ("Animals", "00001")) for k in range(2)]
    assert files(str(found)) == {*names, "index.csv"}
    read = list(csv.DictReader((found / "index.csv").open()))
    assert [row["file"] for row in read] == names and read[0]["prompt"] == 'a "cat"'
    assert read[2] == {"file": names[2], "prompt": "a dog", "category": "Animals", "challenge": "Quantity"}
    oneig = tmp_path / "OneIG-Bench.csv"
    oneig.write_text('category,id,prompt_en\nAnime_Stylization,000,"a cat, drawn"\nGeneral_Object,017,a dog\n')
    found = Path(command("oneig", 4, prompts=str(oneig))["layout"])
    assert files(str(found)) == {"anime/cascade/000.webp", "object/cascade/017.webp"}
    square = Image.open(found / "object/cascade/017.webp").convert("RGB")
    last = Image.open(found.parent / "00001-a_dog-3.png").convert("RGB")
    assert square.size == (64, 64) and square.crop((32, 32, 64, 64)).tobytes() == last.tobytes()
    oneig.write_text("category,id,prompt_en\nPoems,000,a cat\n")
    with pytest.raises(ConfigError, match="layout=oneig: 'Poems' is not one of its categories"):
        command("oneig", 4, prompts=str(oneig))
    with pytest.raises(ConfigError, match=r"layout=parti: it needs its own list.* a field category"):
        command("parti", 1)
