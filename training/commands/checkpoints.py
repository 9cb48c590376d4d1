"""`cascade checkpoints run=DIR`: list, verify, compare and export checkpoints.

action=list                                        step, size, health, validation loss
action=verify  steps=[..]                          check all files against their checksums; exit code 2 if any is wrong
action=diff    steps=[100,200]                     how far the weights moved, and which settings changed
action=export  output=weights.safetensors          averaged weights in one file; average=-1: the raw weights;
                                                   sigma_rel=0.08: an average of that width (ema.profile=power)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage.folder import open_folder
from training.cascade.bundle import checkpoint_dir
from training.checkpoint.safetensors import Digest, chunks
from training.checkpoint.store import Checkpoint, CheckpointStore
from training.config.commands import CheckpointsCommand
from training.model.alignment import BESIDE
from training.optim.averages import posthoc_weights, state_name
from training.run.directory import differences

SHOWN = 10
"""Number of tensors that `diff` prints."""
MOST_LEFT = 0.1
"""Maximum residual (relative L2 norm) of a profile reconstructed from the stored averages."""
WIDTHS = [n / 200 for n in range(1, 58)]


def main(config: CheckpointsCommand) -> dict[str, Any]:
    """Run `config.action` on the checkpoints of `run.dir`; return its JSON result.

    Raises:
        DataError: no such run or checkpoint; `verify`: a checkpoint is damaged or unfinished.
    """
    store = CheckpointStore(checkpoint_dir(config.run.dir))
    if not store.steps():
        raise DataError(f"{store.folder}: no checkpoints; select the run with run=DIR")
    actions: dict[str, Callable[[CheckpointStore, CheckpointsCommand], dict[str, Any]]] = {
        "list": list_all,
        "verify": verify,
        "diff": diff,
        "export": export,
    }
    return actions[config.action](store, config)


def list_all(store: CheckpointStore, config: CheckpointsCommand) -> dict[str, Any]:
    """List all checkpoints, newest first, checking sizes but not checksums."""
    rows = []
    print(f"{store.folder}\n{'step':>10} {'GB':>8} {'files':>6} {'tensors':>8}  {'validation':>10}  state")
    for step in store.steps():
        row = describe_checkpoint(store, step)
        rows.append(row)
        loss = "" if row["validation"] is None else f"{row['validation']:.5f}"
        state = "; ".join(row["problems"]) or ("healthy" if row["healthy"] else "its last step was not applied")
        print(f"{step:>10} {row['bytes'] / 1e9:>8.3f} {row['files']:>6} {row['tensors']:>8}  {loss:>10}  {state}")
    return {"run": config.run.dir, "checkpoints": rows}


def describe_checkpoint(store: CheckpointStore, step: int, checksums: bool = False) -> dict[str, Any]:
    """Describe one checkpoint in JSON values; `problems` is empty if it is intact."""
    row: dict[str, Any] = {"step": step, "bytes": 0, "files": 0, "tensors": 0, "healthy": False, "validation": None}
    try:
        checkpoint = store.open(step)
    except DataError as error:
        return {**row, "problems": [str(error)]}
    return {
        **row,
        "bytes": checkpoint.bytes,
        "files": len(checkpoint.manifest["files"]),
        "tensors": len(checkpoint.names()),
        "healthy": checkpoint.meta.get("healthy", True),
        "validation": checkpoint.meta.get("validation"),
        "attempt": checkpoint.manifest["attempt"],
        "position": checkpoint.meta.get("position"),
        "problems": checkpoint.problems(checksums=checksums, thorough=True),
    }


def verify(store: CheckpointStore, config: CheckpointsCommand) -> dict[str, Any]:
    """Verify the chosen checkpoints (default: all) by SHA-256. Raises DataError if one is damaged or unfinished."""
    rows = [describe_checkpoint(store, step, checksums=True) for step in config.steps or store.steps()]
    for row in rows:
        print(f"step {row['step']}: {'; '.join(row['problems']) or 'intact'}")
    damaged = [row["step"] for row in rows if row["problems"]]
    if damaged:
        names = ", ".join(str(step) for step in damaged)
        raise DataError(f"{store.folder}: damaged or unfinished: step {names}; `cascade train` skips them")
    return {"run": config.run.dir, "checkpoints": rows}


def diff(store: CheckpointStore, config: CheckpointsCommand) -> dict[str, Any]:
    """Compare two checkpoints: how far each raw weight moved, relative to its norm, and which settings changed."""
    if len(config.steps) not in (0, 2):
        raise ConfigError(f"steps={config.steps}: action=diff compares exactly two checkpoints")
    sound = (step for step in store.steps() if not describe_checkpoint(store, step)["problems"])
    steps = sorted(config.steps or list(sound)[:2])
    if len(steps) < 2:
        raise ConfigError(f"steps: {store.folder} has only one checkpoint to compare")
    first, second = (_whole(store.open(step)) for step in steps)
    names = sorted({*first.names("param/")} & {*second.names("param/")})
    moved = {name.removeprefix("param/"): _distance(first.read(name), second.read(name)) for name in names}
    others = sorted({*first.names()} ^ {*second.names()})
    settings = differences(first.meta.get("config", {}), second.meta.get("config", {}))
    far = sorted(moved, key=moved.__getitem__, reverse=True)
    for name in far[:SHOWN]:
        print(f"{moved[name]:>10.4%}  {name}")
    for name in others[:SHOWN]:
        print(f"only in one: {name}")
    for key, old, new in settings:
        print(f"{key}: {old} -> {new}")
    return {
        "steps": steps,
        "moved": moved,
        "only_in_one": others,
        "settings": [{"key": key, "before": old, "after": new} for key, old, new in settings],
    }


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((b.double() - a.double()).norm() / a.double().norm().clamp(min=1e-12))


def export(store: CheckpointStore, config: CheckpointsCommand) -> dict[str, Any]:
    """Write one safetensors file of weights by parameter name; return its path, size and SHA-256."""
    checkpoint = store.open(config.steps[0]) if config.steps else store.newest()
    if checkpoint is None:
        raise DataError(f"{store.folder}: it has no finished checkpoint")
    if len(config.steps) > 1:
        raise ConfigError(f"steps={config.steps}: action=export writes one checkpoint; give one step")
    assert config.output is not None
    _whole(checkpoint)
    if config.sigma_rel is not None:
        tensors, what = posthoc(store, checkpoint, config.sigma_rel), f"average of relative width {config.sigma_rel}"
    else:
        kind = "param" if config.average < 0 else state_name(config.average)
        tensors, what = _weights(checkpoint, kind), "raw weights" if config.average < 0 else f"average {config.average}"
    if checkpoint.meta.get("lora"):
        what = f"adapters (lora), which `cascade bundle` merges into weights: {what}"
    folder, slash, name = config.output.rpartition("/")
    output, digest = config.output, Digest(chunks(tensors))
    open_folder((folder or slash) or ".").write(name, digest)
    print(f"{output}: {what} of step {checkpoint.step}, {len(tensors)} tensors, {digest.size / 1e6:.1f} MB")
    return {"output": output, "step": checkpoint.step, "bytes": digest.size, "sha256": digest.sha256, "what": what}


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint. Raises DataError if a file is missing or does not match its checksum."""
    problems = checkpoint.problems()
    if problems:
        raise DataError(f"{checkpoint.folder}: {'; '.join(problems)}")
    return checkpoint


def _weights(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    names = [name for name in checkpoint.names(f"{kind}/") if not name.startswith(f"{kind}/{BESIDE}")]
    if not names:
        decays = checkpoint.meta["config"]["ema"]["decays"]
        raise ConfigError(
            f"average: {checkpoint.folder} has the averages 0 to {len(decays) - 1}, of ema.decays {decays}"
        )
    return {name.removeprefix(f"{kind}/"): checkpoint.read(name) for name in names}


def posthoc(store: CheckpointStore, last: Checkpoint, sigma_rel: float) -> dict[str, torch.Tensor]:
    """Reconstruct the average of relative width `sigma_rel` that ends at `last`, from all power-profile averages stored
    up to then that started with the run. Returns fp32 weights by parameter name.

    Raises:
        ConfigError: the run has no such averages, or too few for this width.
    """
    stored: list[tuple[Checkpoint, str, float, float]] = []
    for step in (s for s in store.steps() if s <= last.step):
        try:
            checkpoint = _whole(store.open(step))
        except DataError as error:
            print(f"skipped: {error}")
            continue
        ema, updates = checkpoint.meta["config"]["ema"], float(checkpoint.meta["updates"])
        since = checkpoint.meta.get("ema_since") or [0 for _ in ema["decays"]]
        for index, width in enumerate(ema["decays"] if ema.get("profile") == "power" and updates else []):
            if not since[index]:
                stored.append((checkpoint, state_name(index), updates, width))
    if not stored:
        raise ConfigError("sigma_rel: the run was not trained with ema.profile=power from the start")
    profiles = [(t, width) for _, _, t, width in stored]
    weights, left = posthoc_weights(profiles, last.meta["updates"], sigma_rel)
    if left > MOST_LEFT:
        fits = [s for s in WIDTHS if posthoc_weights(profiles, last.meta["updates"], s)[1] <= MOST_LEFT]
        reach = f"{min(fits):g} to {max(fits):g}" if fits else "none"
        raise ConfigError(
            f"sigma_rel={sigma_rel}: the {len(stored)} averages stored up to step {last.step} cannot be combined into "
            f"it (possible: {reach}); keep more checkpoints (checkpoint.keep_every), or more ema.decays"
        )
    tensors = {}
    for name in (name.removeprefix("param/") for name in last.names("param/")):
        if name.startswith(BESIDE):
            continue
        total = torch.zeros(last.shape(f"param/{name}"), dtype=torch.float64)
        for (checkpoint, kind, _, _), weight in zip(stored, weights, strict=True):
            total += float(weight) * checkpoint.read(f"{kind}/{name}").double()
        tensors[name] = total.float()
    return tensors
