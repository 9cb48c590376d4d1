"""Looks up what to do about an error in docs/training.md, which explains every message of the engine."""

from __future__ import annotations

import re
from pathlib import Path

import training

PAGE = Path(training.__file__).parents[1] / "docs/training.md"
ENTRY = re.compile(r"^(\*\*`.*?)(?=^\*\*`|^#|\Z)", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"\*\*`(.+?)`\*\*", re.DOTALL)
LEADING = re.compile(r"^(?:(?:\*\*`.+?`\*\*|\(code [^)]*\)|[,;:]|the same with|or|\([^)]*\))\s*)+", re.DOTALL)
"""The messages that an entry starts with, and their code."""
PLACE = re.compile(r"\b[A-Z]+\b|\.\.\.| / |`")
"""Placeholders for numbers and names in a message."""
SHORTEST = 16
"""Characters of a fixed part that identify a message."""
CODE = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def remedy(sentence: str, code: int | None = None, page: Path = PAGE) -> str | None:
    """Return what the page says about a message or, if it does not know the message, about an exit code.

    None if neither is found, or there is no page (an installation without docs).
    """
    try:
        text = page.read_text()
    except OSError:
        return None
    said = " ".join(sentence.split())
    best, found, of_code = SHORTEST - 1, None, []
    for match in ENTRY.finditer(text):
        entry = match[1]
        quoted = [" ".join(one.split()) for one in QUOTED.findall(entry)]
        parts = [part.strip(" :;,.()") for one in quoted for part in PLACE.split(one)]
        longest = max((len(part) for part in parts if part in said), default=0)
        advice = " ".join(LEADING.sub("", entry).partition("**`")[0].split())
        if f"(code {code})" in entry and advice:
            of_code.append(advice)
        if longest > best and advice:
            best, found = longest, advice
    if len(of_code) == 1:
        found = found or of_code[0]
    return found or next((what for number, _, what in CODE.findall(text) if int(number) == code), None)
