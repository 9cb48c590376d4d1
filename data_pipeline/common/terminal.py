"""Text from outside (keys, names, captions) as it may be shown: control characters become visible escapes."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text without what a terminal would obey: escape sequences, carriage returns, changes of direction."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class VisibleFormatter(logging.Formatter):
    """A formatter whose lines are safe to show."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, control characters shown instead of sent."""
        return visible(super().format(record))


def print_result(result: Mapping[str, Any]) -> None:
    """What a command has found: lines for people in a terminal, one line of JSON for programs."""
    print(in_lines(result) if sys.stdout.isatty() else json.dumps(result), flush=True)


def in_lines(result: Mapping[str, Any]) -> str:
    """`name: value` per line; counts by name stand behind each other."""
    width = max(map(len, result), default=0) + 1
    return "\n".join(f"{name + ':':<{width}} {_in_words(value)}" for name, value in result.items())


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(str(name))} {count:,}" for name, count in value.items()) or "none"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else visible(str(value))


def guard_messages() -> None:
    """Makes the messages of a program without logging of its own safe to show."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
