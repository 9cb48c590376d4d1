"""The memory that two training steps actually take on a CPU: peak resident memory above what the process had before the
network existed, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from training.config.experiment import Experiment
from training.config.unet import for_stage
from training.engine.start import build_engine
from training.model.lora import add_adapters
from training.model.unet import UNet
from training.processes.ranks import Ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def resident(key: str = "VmRSS") -> int:
    """Bytes; `VmHWM` is the peak since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """From now on; else what is freed stays with the process, and the next case takes it from there."""
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(M_MMAP_THRESHOLD, 1 << 16) and mallopt(M_TRIM_THRESHOLD, 1 << 16)


def steps(config: Experiment, ranks: Ranks, count: int) -> None:
    """A network, its engine and a few optimizer steps on random pictures of one micro-batch."""
    torch.manual_seed(0)
    unet, size = for_stage(config.stage, config.text.dim), config.stage.train_size
    model = UNet(unet)
    if config.lora.rank:
        add_adapters(model, config.lora)
    engine: Any = build_engine(model, config, ranks, 1)
    n = config.data.micro_batch
    x, level = torch.randn(n, 3, size, size), torch.randn(n)
    text = torch.randn(n, config.text.max_tokens, config.text.dim)
    mask = torch.ones(n, config.text.max_tokens, dtype=torch.bool)
    low_res = (x.clone(), level.clone()) if unet.low_res else (None, None)
    for step in range(count):
        engine.backward(engine(x, level, text, mask, *low_res).float().square().mean())
        engine.step(step)


Case = tuple[str, dict[str, Any], int, int, int, int]
"""Preset, overrides, picture size, micro-batch, ZeRO stage, rank of adapters."""


def peaks(ranks: Ranks, cases: list[Case]) -> list[int]:
    """Peak bytes above the baseline, for each case."""
    return_freed_memory()
    adapters = 2 if any(rank for *_, rank in cases) else 0  # their package takes seconds to import
    steps(experiment("tiny_base", {}, 8, 2, 1, adapters, ranks.world_size), ranks, 2)  # what every process loads once
    found = []
    for case in cases:
        gc.collect()
        before = resident()
        reset_peak()
        steps(experiment(*case, ranks.world_size), ranks, 2)
        found.append(resident("VmHWM") - before)
    return found


def experiment(
    preset: str, overrides: dict[str, Any], size: int, micro_batch: int, stage: int, rank: int, world_size: int
) -> Experiment:
    """The experiment that is measured, and about which `training.plan.memory` is asked."""
    config = Experiment()
    config.stage.model.preset, config.stage.model.overrides = preset, overrides
    config.stage.image_size = size
    if "sr" in preset:
        config.stage.low_res_size = size // 4
    config.text.dim, config.text.max_tokens = 32, 12
    config.data.micro_batch, config.data.global_batch = micro_batch, micro_batch * world_size
    config.zero.stage, config.lora.rank = stage, rank
    return config
