"""The doors for programs and notebooks: names that stay where they are while rooms move."""

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
def test_a_door_gives_what_the_room_holds(door: str, room: str) -> None:
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
