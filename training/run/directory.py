"""The directory of a run: its files, its recorded configuration, and whether a changed configuration may resume it.

config.yaml   code.json   metrics.jsonl   samples/   logs/rank-#.log   checkpoints/   wandb/
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import CascadeError, ConfigError, DataError
from data_pipeline.storage.atomic import replacing
from data_pipeline.storage.retry import persist
from training.checkpoint.store import CheckpointStore
from training.cli.typed import typed_command
from training.config.diffusion import TAUGHT
from training.config.experiment import Experiment
from training.processes.flight import put_records_aside

log = logging.getLogger(__name__)

FIXED = {
    "seed": "all randomness depends on it",
    "stage.image_size": "the weights depend on it",
    "stage.low_res_size": "the weights depend on it",
    "stage.model": "the weights depend on it",
    "stage.diffusion": "the weights depend on it",
    "text.kind": "the weights depend on it",
    "text.sha": "the weights depend on the text encoder they were trained with (see text.path)",
    "text.dim": "the weights depend on it",
    "text.layer": "the weights depend on it",
    "text.prefix": "the weights depend on it",
    "text.also": "the weights depend on it",
    "lora": "the weights depend on it",
    "dino.side": "the weights were trained with it",
    "dino.sha": "the weights were trained with that encoder (see dino.path)",
    "repa": "the weights were trained with it",
    "perceptual": "the weights were trained with it",
    "optimizer.name": "its saved moments would be lost",
    "data.global_batch": "the position in the data is counted in it",
    "data.lanes": "the order of the data depends on it",
    "data.buckets": "the order of the data depends on it",
    "data.window": "the order of the data depends on it",
}
"""Keys (each including all keys below it) that must not change once a run has a checkpoint, and why."""
LESSON = (
    *(f"distill.{name}" for name in TAUGHT),
    *(f"stage.sampler.{name}" for name in ("spacing", "threshold", "threshold_percentile")),
)
"""Keys that must not change either if the run is a distillation; in other runs `distill` has no effect."""
STOP = "stop.json"
"""File in RUN_DIR by which another program asks the run to stop at its next step; in force until it is deleted."""
PROBE_BYTES = 1 << 14
VALIDATION = "validation"
"""Directory with the loss of every held-out sample, one file per validation."""
SAVED = "saved.json"
"""File with the last saved step and its place; in RUN_DIR, not with the checkpoints, which may get lost."""


def to_dict(config: Experiment) -> dict[str, Any]:
    """Return the resolved configuration as plain values."""
    return asdict(config)


OPEN = {"stage.model.overrides": ("checkpoint_blocks",)}
"""Mappings with arbitrary keys, which `flatten` treats as one value, so that adding or removing a key is a change; with
the keys to ignore, which do not affect results."""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict by dotted key; lists are values."""
    if prefix in OPEN and isinstance(tree, dict):
        return {prefix: {key: value for key, value in tree.items() if key not in OPEN[prefix]}}
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return leaves


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value before, value now) of the settings that differ; `distill` settings only if one of the
    two is a distillation."""
    old, new = flatten(before), flatten(now)
    keys = [key for key in sorted({*old, *new}) if _is_taught(before, now) or not key.startswith("distill.")]
    found = [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
    # an empty mapping that gets keys, or loses its last, is reported by those keys
    return [one for one in found if one[1:] not in ((None, {}), ({}, None))]


def changed_since(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the `differences` from settings that an earlier version may have written; a key that it did not have
    counts as its default."""
    known, defaults = flatten(before), flatten(to_dict(Experiment()))
    found = [(key, old if key in known else defaults.get(key), new) for key, old, new in differences(before, now)]
    return [(key, old, new) for key, old, new in found if old != new]


def _is_taught(*settings: dict[str, Any]) -> bool:
    return any((config.get("distill") or {}).get("steps") for config in settings)


def check_same_run(before: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """Return the changed settings as `key: old -> new`. Raises ConfigError if the run cannot resume with one of them.

    Args:
        where: the run or checkpoint to name in an error.
    """
    changes = []
    kept = dict(FIXED)
    if all(config.get("train", {}).get("deterministic_reduction") for config in (before, now)):
        kept["data.micro_batch"] = "train.deterministic_reduction sums gradients by micro-batch"
    if _is_taught(before, now):
        kept |= dict.fromkeys(LESSON, "the teacher's targets depend on it")
    has_old = {*flatten(before), *flatten(to_dict(Experiment()))}
    for key, old, new in changed_since(before, now):
        for fixed, reason in kept.items():
            if key in has_old and (key == fixed or key.startswith(f"{fixed}.")):
                raise ConfigError(
                    f"{key}={_yaml(new)}: {where} was made with {key}={_yaml(old)}, and {reason}; "
                    f"restore it, or start a new run with another run.dir"
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
        self._in_wandb = config.wandb.mode != "disabled"
        self.checkpoints = config.checkpoint.dir or str(self.path / "checkpoints")

    def log_file(self, rank: int) -> Path:
        """Return the log file of rank `rank`."""
        return self.path / "logs" / f"rank-{rank}.log"

    def sample_file(self, step: int) -> Path:
        """Return the file of the sample grid of `step`."""
        return self.path / "samples" / f"step-{step:08d}.png"

    def asked_to_stop(self) -> str:
        """Return the reason in RUN/stop.json for ending the run early; empty if there is no such file. A file without
        one, such as of `touch stop.json`, is a request as well."""
        try:
            if not (self.path / STOP).exists():
                return ""
        except OSError:  # its file system fails at the moment; the next step asks again
            return ""
        with suppress(OSError, ValueError, AttributeError):
            if reason := json.loads((self.path / STOP).read_text()).get("reason"):
                return str(reason)
        return f"{STOP} exists, without a reason"

    def ask_to_stop(self, reason: str) -> None:
        """Make the training of this run, wherever it is running, save and end at its next step, and not start again."""
        replace_file(self.path / STOP, json.dumps({"reason": reason, "time": time.time()}))

    def create(self) -> list[str]:
        """Create the directories, and check that there is space for small files.

        Returns:
            The directory of the run and its parents, innermost first, as far as they did not exist.

        Raises:
            DataError: the directory cannot be written to.
        """
        made = [str(path) for path in (self.path, *self.path.parents) if not path.exists()]
        store = Path(self.checkpoints)
        if store.is_symlink() and not store.exists():
            raise DataError(
                f"checkpoint.dir={store}: a link to {os.readlink(store)}, which does not exist; mount or create it, or "
                f"choose another checkpoint.dir"
            )
        try_to_write(self.path, "run.dir", ("logs", "samples"))
        put_records_aside(self.path / "logs")
        return made

    def discard(self, made: Sequence[str], rank: int) -> None:
        """Remove what a start that was refused has created: its log, and directories that are empty then.

        Args:
            made: as returned by `create`; empty for a directory that existed before, which stays as it is.
        """
        if not made or (self.path / "config.yaml").exists():  # another start has begun meanwhile
            return
        for file in (self.log_file(rank), self.path / "wandb_id"):
            with suppress(OSError):
                file.unlink()
        for folder in (*(self.path / name for name in ("logs", "samples", "checkpoints")), *map(Path, made)):
            with suppress(OSError):  # not empty: other ranks are not done yet
                folder.rmdir()

    def changes(self, config: Experiment, saved: dict[str, Any] | None = None) -> list[str]:
        """Return the settings that differ from those of the last start, as `key: old -> new`; empty if none are
        recorded.

        Args:
            saved: those in the newest checkpoint, for a run that has never started in this directory.

        Raises:
            ConfigError: the run cannot resume with a changed setting.
        """
        before = recorded_config(self.path) or saved or {}
        if not isinstance(before.get("text"), dict):
            return []
        known = {**before, "text": {**before["text"]}, "dino": {**before.get("dino", {})}}
        for name in ("text", "dino"):
            if getattr(config, name).sha is None:  # computed at the start
                known[name]["sha"] = None
        return check_same_run(known, to_dict(config), str(self.path))

    def check_own(self, recorded: dict[str, Any]) -> None:
        """Check that the checkpoints in a `checkpoint.dir` are not those of another run, which would continue here.

        Args:
            recorded: the settings in the newest checkpoint.

        Raises:
            ConfigError: this run has never started, and the one that wrote them still has its directory.
        """
        other = Path((recorded.get("run") or {}).get("dir") or self.path)
        if (self.path / "config.yaml").exists() or not (other / "config.yaml").exists():
            return  # it has started here before, or it was moved here
        if other.resolve() != self.path.resolve() and self.checkpoints != str(self.path / "checkpoints"):
            raise ConfigError(
                f"checkpoint.dir={self.checkpoints}: it holds the checkpoints of another run, {other}; choose another "
                f"checkpoint.dir (to start from its weights, set train.init_from), or continue it with run.dir={other}"
            )

    def check_nothing_lost(self) -> None:
        """For a start that found no checkpoint, check that the run has never had any.

        Raises:
            ConfigError: it has saved some, which are now elsewhere or gone.
        """
        place = self._last_place()
        step = -1 if place in ("", self.checkpoints) else CheckpointStore(place).newest_whole()
        if step >= 0:
            inside = place == str(self.path / "checkpoints")
            raise ConfigError(
                f"checkpoint.dir={self.checkpoints}: it has no checkpoint, but this run has some in {place} (step "
                f"{step}); copy them, set checkpoint.dir={'null' if inside else place}, or start a new run with "
                f"another run.dir"
            )
        step = self._last_saved()
        if step >= 0:
            raise ConfigError(
                f"checkpoint.dir={self.checkpoints}: it has no checkpoint, but this run has saved some, the last at "
                f"step {step}; mount or restore {place or self.checkpoints}. To deliberately start from step 0, choose "
                f"another run.dir, or move {self.path} away"
            )

    def _last_place(self) -> str:
        """Return where the previous start kept its checkpoints; empty if there was none."""
        before = recorded_config(self.path).get("checkpoint")
        if not isinstance(before, dict) or "dir" not in before:
            return ""
        return before["dir"] or str(self.path / "checkpoints")

    def _last_saved(self) -> int:
        """Return the last step that any start of this run has saved or resumed from; -1: none."""
        starts = read_json(self.path / "code.json").get("starts", [])
        steps = [start.get("step", 0) or -1 for start in starts if isinstance(start, dict)]
        return max([read_json(self.path / SAVED).get("step", -1), *steps])

    def record_saved(self, step: int) -> None:
        """Record a committed checkpoint, so that the run never silently starts over."""
        with suppress(OSError):  # disk full; the next checkpoint records it
            replace_file(self.path / SAVED, json.dumps({"step": step, "checkpoints": self.checkpoints}))

    def record_validation(self, step: int, losses: Sequence[float]) -> None:
        """Record the loss of each held-out sample (averaged weights), for `cascade compare`."""
        path = self.path / VALIDATION / f"step-{step:08d}.json"
        with suppress(OSError):  # the mean is in the metrics anyway
            path.parent.mkdir(exist_ok=True)
            replace_file(path, json.dumps({"step": step, "loss": [float(f"{loss:.7g}") for loss in losses]}))

    def wandb_id(self, saved: str | None = None, origin: str | None = None) -> str:
        """Return the W&B id of this run, chosen once, so that a start that died before its first checkpoint keeps it. A
        copy of a run that still exists gets a new one.

        Args:
            saved: the id in the checkpoint, for a run directory without one.
            origin: the run directory in the checkpoint, for one that has never been started.
        """
        path = self.path / "wandb_id"
        known = (read_text(path).strip() if path.exists() else "") or saved
        starts = read_json(self.path / "code.json").get("starts") or [{}]
        home = starts[-1].get("run_dir") or (origin and str(Path(origin).resolve()))
        if known and home and Path(home) != self.path.resolve():
            try:
                is_copy = (Path(home) / "wandb_id").read_text().strip() == known
            except OSError:
                is_copy = False
                if self._in_wandb:
                    log.info(
                        "%s was %s at its last start: it continues the same W&B run; if it is a copy whose original "
                        "goes on elsewhere, write another id into %s",
                        self.path,
                        home,
                        path,
                    )
            if is_copy:
                log.warning("%s is a copy of %s: it gets its own W&B run", self.path, home)
                known = None
        if not known:
            known = uuid.uuid4().hex[:8]
        if not path.exists() or read_text(path).strip() != known:
            replace_file(path, known)
        return known

    def write_config(self, config: Experiment) -> None:
        """Write the resolved configuration to config.yaml."""
        import yaml

        replace_file(self.path / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))

    def record_start(self, code: dict[str, Any], step: int, attempt: int, world_size: int) -> None:
        """Add this start to code.json: which code ran, when, where, and from which step."""
        path = self.path / "code.json"
        starts = read_json(path).get("starts", [])
        command = typed_command()
        here = {"host": socket.gethostname(), "time": time.time(), "command": command, "commit": code["commit"]}
        starts.append(
            {"attempt": attempt, "step": step, "world_size": world_size, "run_dir": str(self.path.resolve()), **here}
        )
        replace_file(path, json.dumps({**code, "starts": starts}, indent=1))


def try_to_write(folder: Path, key: str, inside: Sequence[str] = ()) -> None:
    """Create a directory (and some inside it) and write a small file to it, before work whose result will go there.

    Args:
        key: the setting to name in an error.
        inside: names of subdirectories to create.

    Raises:
        DataError: the directory cannot be written to.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        for path in (folder, *(folder / name for name in inside)):
            path.mkdir(parents=True, exist_ok=True)
        replace_file(probe, " " * PROBE_BYTES)
        probe.unlink()
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileExistsError):
            reason = "a link to a place that does not exist" if folder.is_symlink() else "there is a file of this name"
        raise DataError(f"{key}={folder}: cannot be written ({reason}); choose another {key}") from error


@contextmanager
def leaving_nothing_empty(folder: Path) -> Iterator[None]:
    """Remove the directories that a command has created for its results if it fails before writing any."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except CascadeError:
        for path in made:
            with suppress(OSError):  # not empty, or not created
                path.rmdir()
        raise


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """Return the settings of a run's newest start, from its config.yaml; empty if there is none or it cannot be
    read."""
    import yaml

    try:
        recorded = yaml.safe_load(read_text(run_dir / "config.yaml"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines; half-written lines are skipped, and a missing file is empty."""
    found = []
    try:
        lines = read_text(path).splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def replace_file(path: Path, text: str) -> None:
    """Write a small file atomically: readers see either the old or the new content."""
    with replacing(path, durable=False) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    """Read a small file, also if its file system fails for a while. Raises `OSError` or `StoreError`."""
    return persist(str(path), partial(path.read_text, errors="replace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object; empty if the file is missing. A damaged file does not stop the run: it is logged, and
    recreated later."""
    try:
        found = json.loads(read_text(path))
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        return {}
    except ValueError:
        pass
    log.warning("%s is damaged; it will be recreated", path)
    return {}
