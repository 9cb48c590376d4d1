"""Safe display of text from outside (keys, names, captions): control characters become visible escapes."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text with everything a terminal would act on escaped: control characters, changes of direction."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class VisibleFormatter(logging.Formatter):
    """A log formatter whose lines are safe to show in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record, with control characters escaped."""
        return visible(super().format(record))


def can_overwrite(out: TextIO) -> bool:
    """Return whether `out` is a terminal in which a line can be written over; those of some editors (TERM=dumb) show
    the codes instead."""
    return out.isatty() and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Return the width for running text, 60 to 120 columns: that of the terminal; 80 without one."""
    return min(120, max(60, shutil.get_terminal_size((80, 24)).columns))


def print_result(result: Mapping[str, Any]) -> None:
    """Print the result of a command: readable lines in a terminal, otherwise one line of JSON."""
    print(in_lines(result) if sys.stdout.isatty() else json.dumps(result), flush=True)


def in_lines(result: Mapping[str, Any]) -> str:
    """Return one `name: value` per line; a mapping or a list takes one line, those inside it are in parentheses."""
    longest = max(map(len, result), default=0) + 1
    return "\n".join(f"{name + ':':<{longest}} {_in_words(value) or 'none'}" for name, value in result.items())


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(str(name))} {_inside(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inside, value))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else visible(str(value))


def _inside(value: Any) -> str:
    words = _in_words(value) or "none"
    return f"({words})" if isinstance(value, (Mapping, list, tuple)) and value else words


def guard_messages() -> None:
    """Make log messages safe to show in a program that configures no logging of its own, and characters that the
    encoding of stdout lacks (PYTHONIOENCODING=ascii) visible as escapes instead of errors."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
