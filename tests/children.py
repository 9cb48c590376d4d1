"""Processes started by others."""

from __future__ import annotations

from pathlib import Path


def gone(pid: int) -> bool:
    """Whether it has ended, even if nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
