"""Makes system calls fail: preloads `failing_files.c` into a process that reads the same files in several ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage import retry

HERE = Path(__file__).parent


def outcomes(module: str, folder: Path, cases: list[list[Any]]) -> dict[str, list[str]]:
    """Return what `tried` finds in a separate process: `module`, given `folder` and the cases, prints it."""
    library = build(folder)
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), json.dumps(cases)], cwd=HERE.parents[2],
        env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build(folder: Path) -> Path:
    """Return the library to preload; its path must not contain a space."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    library = folder / "failing.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, HERE / "failing_files.c", "-ldl"], check=True)
    return library


def tried(ways: dict[str, Callable[[], Any]], place: str, cases: list[list[Any]]) -> dict[str, list[str]]:
    """Return what becomes of each case (way, call, errno, how often, after how many calls): "same" (as without faults),
    or the error.

    Args:
        place: part of the paths on which calls fail.
    """
    right = {name: read() for name, read in ways.items()}
    found = {}
    for case in cases:
        way, call, number, count, after = [*case, 0][:5]
        name = " ".join(map(str, case))
        given = {"CASE": name, "CALL": call, "ERRNO": number, "COUNT": count, "AFTER": after, "PATH": place}
        os.environ.update({f"FAULT_{key}": str(value) for key, value in given.items()})
        retry.FILE_S = 60.0 if count < 10 else 0.02
        try:
            found[name] = ["same" if ways[way]() == right[way] else "different"]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
        os.environ["FAULT_PATH"] = ""
    return found
