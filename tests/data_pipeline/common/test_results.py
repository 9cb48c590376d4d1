"""What commands print for people and for programs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from data_pipeline.common.terminal import in_lines, print_result

RESULT = {"output": "a\x1b[2J", "samples": 12345, "dropped": {"too_small": 3}, "problems": {}, "report": None}


def test_programs_get_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(RESULT)
    assert json.loads(capsys.readouterr().out) == RESULT


def test_people_get_lines() -> None:
    assert in_lines(RESULT).splitlines() == [
        "output:   a\\x1b[2J",
        "samples:  12,345",
        "dropped:  too_small 3",
        "problems: none",
        "report:   none",
    ]


def test_nested_values_are_in_parentheses() -> None:
    sets = {"a": {"shards": 1, "samples": 2000}, "b\x1b": {"shards": 0, "samples": 0}}
    pairs = [{"datasets": ["a", "b"], "example": None}, {"datasets": [], "example": "k"}]
    assert in_lines({"datasets": sets, "copies": pairs, "others": []}).splitlines() == [
        "datasets: a (shards 1, samples 2,000), b\\x1b (shards 0, samples 0)",
        "copies:   (datasets (a, b), example none), (datasets none, example k)",
        "others:   none",
    ]


def test_a_terminal_is_for_people() -> None:
    ours, theirs = pty.openpty()
    program = "from data_pipeline.common.terminal import print_result; print_result({'samples': 3})"
    subprocess.run([sys.executable, "-c", program], stdout=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 100) == b"samples: 3\r\n"
    os.close(ours)
