"""What commands say to people."""

from __future__ import annotations

from data_pipeline.common.terminal import in_lines

RESULT = {"output": "a\x1b[2J", "samples": 12345, "dropped": {"too_small": 3}, "problems": {}, "report": None}


def test_people_get_lines() -> None:
    assert in_lines(RESULT).splitlines() == [
        "output:   a\\x1b[2J",
        "samples:  12,345",
        "dropped:  too_small 3",
        "problems: none",
        "report:   none",
    ]
