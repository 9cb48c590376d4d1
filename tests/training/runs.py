"""Small real runs for the tests: their settings, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.training import forks
from training.checkpoint.store import Checkpoint, CheckpointStore
from training.config.experiment import Experiment

STEPS = 10
ONE_LEVEL = {"widths": [16], "blocks": [1], "self_attention": [True], "cross_attention": [False]}
"""Overrides of the tiny presets with half the layers: ZeRO 3 takes time for each layer."""


def experiment(directory: Path, shards: str, **changes: Any) -> Experiment:
    """A run of seconds; `changes` by dotted key with __ for the dot. Its data is decoded in its own process unless it
    says data__own_process=True: starting another one takes longer than the rest of such a run."""
    config = Experiment()
    settings = {
        "run__dir": str(directory / "run"),
        "stage__model__preset": "tiny_base",
        "text__dim": 32,
        "text__max_tokens": 12,
        "data__shards": shards,
        "data__global_batch": 8,
        "data__own_process": False,
        "train__steps": STEPS,
        "train__log_every": 1,
        "train__sample_every": 0,
        "checkpoint__every": 3,
        "wandb__mode": "disabled",
        "optimizer__warmup_steps": 2,
        "ema__decays": [0.9],
        **changes,
    }
    for key, value in settings.items():
        *path, name = key.split("__")
        section: Any = config
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
    return config


def metrics(config: Experiment) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(config: Experiment) -> list[tuple[Any, ...]]:
    """What must repeat exactly."""
    return [tuple(line[key] for key in ("step", "position", "loss", "grad_norm", "lr")) for line in metrics(config)]


def store(config: Experiment) -> CheckpointStore:
    return CheckpointStore(f"{config.run.dir}/checkpoints")


def newest(config: Experiment) -> Checkpoint:
    found = store(config).newest()
    assert found is not None
    return found


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    assert sorted(a.names()) == sorted(b.names())
    return all(torch.equal(a.read(name), b.read(name)) for name in a.names())


def chaos(config: Experiment, ranks: int, *events: dict[str, Any], **variables: str) -> forks.Running:
    return forks.start(config, ranks, "tests.training.chaos", CASCADE_CHAOS=json.dumps(events), **variables)
