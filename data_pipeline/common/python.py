"""Starts Python subprocesses in which files of the working directory (a queue.py, a training/) shadow nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[__name__.count(".")])
"""The directory that holds the packages: a checkout, or site-packages."""


def module(name: str) -> list[str]:
    """Return the command line that runs one of our modules with the current interpreter."""
    return [sys.executable, "-P", "-m", name]


def environment() -> dict[str, str]:
    """Return environment variables for subprocesses and their own children.

    They keep Python from importing from the working directory, and let it find our packages in a checkout that is not
    installed.
    """
    variables = {"PYTHONSAFEPATH": "1"}
    if ROOT not in sys.path[1:]:
        before = os.environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([ROOT, before] if before and before != ROOT else [ROOT])
    return variables
