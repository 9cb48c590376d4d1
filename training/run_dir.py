"""The directory of a run: where its files lie, which configuration it was made with, and whether another one may go on
in it.

config.yaml   code.json   metrics.jsonl   samples/   logs/rank-#.log   checkpoints/   wandb/
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, DataError
from training.config import Experiment

FIXED = {
    "seed": "all randomness follows from it",
    "stage.image_size": "the weights belong to it",
    "stage.low_res_size": "the weights belong to it",
    "stage.model": "the weights belong to it",
    "stage.diffusion": "the weights belong to it",
    "text.kind": "the weights belong to it",
    "text.sha": "the weights belong to the text encoder that they were trained with (see text.path)",
    "text.dim": "the weights belong to it",
    "lora": "the weights belong to it",
    "optimizer.name": "its saved moments would be lost",
    "data.global_batch": "the position in the data counts in it",
    "data.lanes": "the order of the data follows from it",
    "data.window": "the order of the data follows from it",
}
"""Keys (and all below them) with which a run that has a checkpoint cannot go on once they differ, and why."""
PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "transformers", "webdataset", "wandb", "hydra-core")


def to_dict(config: Experiment) -> dict[str, Any]:
    """The resolved configuration as plain values."""
    return asdict(config)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return leaves


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of the settings that differ."""
    old, new = flatten(before), flatten(now)
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def check_same_run(before: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """Raises ConfigError for a change with which the run cannot go on; returns the other changes as `key: old ->
    new`."""
    changes = []
    known = flatten(before)  # a key that the code did not have yet was at its default
    for key, old, new in differences(before, now):
        for fixed, reason in FIXED.items():
            if key in known and (key == fixed or key.startswith(f"{fixed}.")):
                raise ConfigError(
                    f"{key}={_yaml(new)}: {where} was made with {key}={_yaml(old)}, and {reason}; "
                    f"set it back, or start a new run with another run.dir"
                )
        changes.append(f"{key}: {_yaml(old)} -> {_yaml(new)}")
    return changes


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class RunDir:
    """Paths and small files of one run."""

    def __init__(self, config: Experiment) -> None:
        self.path = Path(config.run.dir)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = config.checkpoint.dir or str(self.path / "checkpoints")

    def log_file(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank}.log"

    def sample_file(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:08d}.png"

    def create(self) -> None:
        """Makes the directories.

        Raises:
            DataError: it cannot be written.
        """
        try:
            for name in ("logs", "samples"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"run.dir={self.path}: cannot be written ({error.strerror}); choose another run.dir"
            ) from error

    def wandb_id(self) -> str:
        """The W&B id of this run, chosen once: also a start that died before its first checkpoint belongs to it."""
        path = self.path / "wandb_id"
        if not path.exists():
            replace_file(path, uuid.uuid4().hex[:8])
        return path.read_text().strip()

    def write_config(self, config: Experiment) -> None:
        import yaml

        replace_file(self.path / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))

    def record_start(self, code: dict[str, Any], step: int, attempt: int, world_size: int) -> None:
        """Adds this start to code.json: which code ran when, where, and from which step."""
        path = self.path / "code.json"
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
        here = {"host": socket.gethostname(), "time": time.time(), "command": sys.argv, "commit": code["commit"]}
        starts.append({"attempt": attempt, "step": step, "world_size": world_size, **here})
        replace_file(path, json.dumps({**code, "starts": starts}, indent=1))


def replace_file(path: Path, text: str) -> None:
    """Writes a small file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def code_version() -> dict[str, Any]:
    """The commit of this code (None outside a git checkout), whether it had changes on top, and package versions."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed), "versions": versions}
