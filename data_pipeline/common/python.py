"""Starting Python again so that files of the working directory (a queue.py, a training/) shadow nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[__name__.count(".")])
"""The directory that holds the packages: a checkout, or site-packages."""


def module(name: str) -> list[str]:
    """The command line that runs a module of ours with the interpreter of this process."""
    return [sys.executable, "-P", "-m", name]


def environment() -> dict[str, str]:
    """Variables for processes that we start, and for those that they start: the working directory is not searched, and
    the packages are found also where they run from a checkout that is not installed."""
    variables = {"PYTHONSAFEPATH": "1"}
    if ROOT not in sys.path[1:]:
        before = os.environ.get("PYTHONPATH")
        variables["PYTHONPATH"] = os.pathsep.join([ROOT, before] if before and before != ROOT else [ROOT])
    return variables
