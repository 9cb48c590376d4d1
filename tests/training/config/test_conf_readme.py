"""conf/README.md lists each group of settings with all its options."""

from __future__ import annotations

import re
from pathlib import Path

CONF = Path(__file__).resolve().parents[3] / "conf"
BY_TWO_NAMES = {"recipe"}
"""Groups that nobody selects: found by the names of the experiment and the stage."""


def test_every_group_and_option_is_listed() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([\w ]+)` \|$", (CONF / "README.md").read_text(), re.MULTILINE)
    listed = {group: set(options.split()) for group, options in rows}
    there = {group.name: {path.stem for path in group.glob("*.yaml")} for group in CONF.iterdir() if group.is_dir()}
    assert listed == {group: options for group, options in there.items() if group not in BY_TWO_NAMES}
