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

    They keep Python from importing from the working directory, and let it find our packages in a checkout, whether or
    not it is installed, before others of the same name on PYTHONPATH.
    """
    variables = {"PYTHONSAFEPATH": "1"}
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != ROOT]
    is_checkout = __name__.startswith("data_pipeline")  # in a wheel our packages have names of their own
    if ROOT not in sys.path[1:] or (is_checkout and before):
        variables["PYTHONPATH"] = os.pathsep.join([ROOT, *before])
    return variables
