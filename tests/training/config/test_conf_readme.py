"""conf/README.md describes each group of settings; its options are the files of its folder, which --help lists."""

from __future__ import annotations

import re
from pathlib import Path

from training.cli.overrides import groups

CONF = Path(__file__).resolve().parents[3] / "conf"
BY_TWO_NAMES = {"recipe"}
"""Groups that users do not select: found by the names of the experiment and the stage."""


def test_every_group_is_described_and_every_option_is_offered() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", (CONF / "README.md").read_text(), re.MULTILINE))
    there = {
        group.name: {path.stem for path in group.glob("*.yaml")}
        for group in CONF.iterdir()
        if group.is_dir() and group.name != "__pycache__"
    }
    assert described == there.keys() - BY_TWO_NAMES
    assert {group: set(options) for group, options in groups().items()} == {group: there[group] for group in described}
