"""Starts Python subprocesses in which files of the working directory (a queue.py, a training/) shadow nothing; imports
large packages without garbage collection."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def importing() -> Iterator[None]:
    """Suspend garbage collection, and exclude what was imported from later collections.

    torch and DeepSpeed create a million objects that stay. To search them for garbage, again and again while they are
    created, takes an eighth of the start of a training.
    """
    if not gc.isenabled():  # inside of another one, or in a program that collects when it wants to
        yield
        return
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()
