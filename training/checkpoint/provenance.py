"""The version of the code that wrote a checkpoint, a run or a bundle: its commit and the versions of packages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "transformers", "webdataset", "wandb", "hydra-core")
FROZEN = "frozen.json"
"""File next to code that was copied out of its git checkout: {commit, dirty} of that checkout."""


def code_version() -> dict[str, Any]:
    """Return the commit of this code (None outside a git checkout), whether it has uncommitted changes (`dirty`), and
    package versions."""
    root = Path(__file__).resolve().parents[__name__.count(".")]

    def git(*words: str) -> str | None:
        try:
            command = ["git", "--no-optional-locks", "-C", str(root), *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if (root / FROZEN).is_file():
        return {**json.loads((root / FROZEN).read_text()), "versions": versions}
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed), "versions": versions}
