"""The public modules for programs and notebooks: names that stay in place when folders change."""

from __future__ import annotations

import importlib

import pytest

from training.cli.compose import load_config
from training.config.commands import SampleCommand


@pytest.mark.parametrize(
    ("door", "room"),
    [
        ("data_pipeline.images", "data_pipeline.content.images"),
        ("data_pipeline.shard_index", "data_pipeline.shards.index"),
        ("training.commandline.compose", "training.cli.compose"),
    ],
)
def test_a_public_module_gives_the_names_of_its_folder(door: str, room: str) -> None:
    opened = importlib.import_module(door)
    assert opened.__all__
    inside = importlib.import_module(room)
    assert [name for name in opened.__all__ if getattr(opened, name) is not getattr(inside, name)] == []


@pytest.mark.parametrize(
    "text", ["a red circle, on a white background", "[a cat, on a mat]", "choice(a,b)", "1e3", "true", "price ${x}"]
)
def test_a_sentence_is_one_prompt(text: str) -> None:
    config = load_config("sample", [f"prompts={text}"])
    assert isinstance(config, SampleCommand) and config.prompts in (text, [text])
