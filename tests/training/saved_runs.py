"""Run directories with checkpoints of random tiny stages, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.training.tiny import random_unet
from training.checkpoint.store import CheckpointStore
from training.config.experiment import Experiment, RunConfig, StageConfig, TextConfig
from training.processes.ranks import Ranks
from training.run.directory import RunDir, to_dict


def make_run(
    path: Path,
    stage: StageConfig,
    *,
    steps: tuple[int, ...] = (5,),
    checkpoints: Path | None = None,
    wandb: str = "disabled",
    data: dict[str, Any] | None = None,
) -> str:
    """A run directory with checkpoints whose averages are the weights of `random_unet(seed=step)`; `data` is the
    loader's state in them."""
    config = Experiment(run=RunConfig(dir=str(path)), stage=stage, text=TextConfig(dim=32, max_tokens=10))
    config.ema.decays = [0.99, 0.9]
    config.wandb.mode = wandb
    config.checkpoint.dir = str(checkpoints) if checkpoints else None
    path.mkdir(parents=True)
    RunDir(config).write_config(config)
    store = CheckpointStore(RunDir(config).checkpoints)
    store.claim(Ranks())
    for step in steps:
        weights = random_unet(stage, seed=step).state_dict()
        tensors = {f"ema/0/{name}": tensor for name, tensor in weights.items()}
        tensors |= {
            f"{kind}/{name}": torch.zeros_like(tensor)
            for kind in ("param", "ema/1")
            for name, tensor in weights.items()
        }
        meta = {"step": step, "position": 64 * step, "config": to_dict(config), "code": {"commit": "abc"}}
        meta |= {"data": data} if data else {}
        store.save(step, tensors, meta, Ranks())
    return str(path)
