"""Text from outside (keys, names, captions) as it may be shown: control characters become visible escapes."""

from __future__ import annotations

import logging
import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text without what a terminal would obey: escape sequences, carriage returns, changes of direction."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class VisibleFormatter(logging.Formatter):
    """A formatter whose lines are safe to show."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, control characters shown instead of sent."""
        return visible(super().format(record))


def guard_messages() -> None:
    """Makes the messages of a program without logging of its own safe to show."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
