"""Builds the optimizers of training/config/optimizers.py, and the learning-rate schedule.

This module does not import torch: an optimizer is imported when it is built, or when the size of its states is needed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from training.config.experiment import EmaConfig, OptimizerConfig
from training.config.optimizers import check_optimizer, optimizer_entry
from training.optim.averages import state_name

if TYPE_CHECKING:
    import torch

    from training.optim.base import TrainOptimizer


def optimizer_class(name: str) -> type[TrainOptimizer]:
    """Import and return the class of an optimizer in OPTIMIZERS."""
    entry = optimizer_entry(name)
    return getattr(importlib.import_module(f"training.optim.{entry.module}"), entry.name)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, fused: bool) -> TrainOptimizer:
    """Return the optimizer that the config names. `fused`: allow a fused kernel (parameters on a GPU).

    Raises:
        ConfigError: there is no such optimizer, or it has no such options.
    """
    check_optimizer(config)
    return optimizer_class(config.name).build(parameters, config, fused)


def states_to_load(
    meta: dict[str, Any], names: Callable[[str], list[str]], optimizer: str, ema: EmaConfig
) -> tuple[dict[str, str], list[int]]:
    """Return the optimizer states to read from a checkpoint.

    Args:
        meta: metadata of the checkpoint.
        names: returns the names of its tensors that start with a prefix.
        optimizer: name of the run's optimizer.
        ema: the run's averages.

    Returns:
        For each state, the kind to read it from (an average that the checkpoint lacks starts as its weights); and for
        each average, the number of updates after which it started.
    """
    kind_of = optimizer_class(optimizer)
    kinds, began = {kind: kind for kind in (*kind_of.SLICED, *kind_of.WHOLE)}, []
    before, updates = meta["config"]["ema"], meta["updates"]
    saved = list(before["decays"]) if before.get("profile", "constant") == ema.profile else []
    since = meta.get("ema_since") or [0] * len(saved)
    for index, decay in enumerate(ema.decays):
        known = decay in saved and bool(names(f"{state_name(saved.index(decay))}/"))
        kinds[state_name(index)] = state_name(saved.index(decay)) if known else "param"
        began.append(since[saved.index(decay)] if known else updates)
    return kinds, began


def learning_rate(step: int, config: OptimizerConfig, total: int) -> float:
    """Return the learning rate of step `step` (0 for the first) out of `total`: linear warm-up, constant, then the
    decay to zero at `total`.

    It is a pure function of the step, so no scheduler state needs saving.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = config.decay_from * total
    if config.decay == "constant" or step < start:
        return config.lr * warmup
    progress = min(1.0, (step - start) / max(1.0, total - start))
    tail = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * warmup * tail
