"""docs/training.md explains every warning, and every error that ends a run, that the engine can print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "train",
    "checkpoint/attempts",
    "checkpoint/store",
    "checkpoint/writer",
    "engine/plain",
    "processes/devices",
    "processes/endings",
    "processes/meeting",
    "plan/fits",
    "run/directory",
    "run/preflight",
    "run/saving",
    "run/session",
    "run/starting_weights",
    "run/training_data",
    "run/reporting/report",
    "run/reporting/trackers",
    "run/reporting/tracking",
    "run/validation",
    "run/watchdog",
    "commands/checkpoints",
    "plan/doctor",
)
ENDING = {
    *(
        "CheckpointError",
        "Superseded",
        "NotFinite",
        "RankLost",
        "DeviceLost",
        "SlowNode",
        "DataError",
        "ConfigError",
        "UserError",
    ),
    "kind",
}
PLACE = re.compile(r"%[-\d.]*[sdgrf]|%\(\w+\)s")


def fragments(node: ast.expr) -> list[str]:
    """The fixed parts of a message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PLACE.split(node.value)
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return []


def messages(path: Path) -> Iterator[str]:
    """The longest fixed part of each warning, logged error and raised error."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("warning", "error", "require") or name in ENDING:
            message = node.args[name == "require"]
            longest = max(fragments(message), key=len, default="").strip(" :;,.()=")
            if len(longest) > 3:
                yield longest


@pytest.mark.parametrize("name", FILES)
def test_every_message_is_explained(name: str) -> None:
    page = " ".join((ROOT / "docs" / "training.md").read_text().split())
    missing = [message for message in messages(ROOT / "training" / f"{name}.py") if message not in page]
    assert not missing, missing
