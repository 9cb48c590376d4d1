"""Optimizers and learning-rate schedules by name.

Importing this file imports no torch: an optimizer is imported when it is built, or asked for the size of its states.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import ConfigError
from training.config.experiment import EmaConfig, OptimizerConfig
from training.optim.averages import state_name

if TYPE_CHECKING:
    import torch

    from training.optim.base import TrainOptimizer


@dataclass(frozen=True)
class OptimizerEntry:
    """Where an optimizer is, and what must be known of it before torch is imported."""

    module: str
    """In `training.optim`."""
    name: str
    """Of its class, a TrainOptimizer."""
    by_value: bool = False
    """It treats each value by itself, so that any slice of the weights, in any memory layout, moves as the whole
    would."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Settings that only this one has, `optimizer.options.KEY`, and their defaults."""


OPTIMIZERS = {
    "adamw": OptimizerEntry("adamw", "AdamW", by_value=True),
    "adamw8bit": OptimizerEntry("adamw8bit", "AdamW8bit"),
    "adafactor": OptimizerEntry("adafactor", "Adafactor"),
    "muon": OptimizerEntry("muon", "Muon", options={"momentum": 0.95, "iterations": 5}),
}
"""`optimizer.name` -> its class. To add one: its file, a line here, and conf/optimizer/NAME.yaml."""


def optimizer_entry(name: str) -> OptimizerEntry:
    """The line of OPTIMIZERS for `optimizer.name`; ConfigError where there is none."""
    if name not in OPTIMIZERS:
        *most, last = OPTIMIZERS
        raise ConfigError(f"optimizer.name={name}: it must be {', '.join(most)} or {last}")
    return OPTIMIZERS[name]


def optimizer_class(name: str) -> type[TrainOptimizer]:
    """The class of an optimizer in OPTIMIZERS."""
    entry = optimizer_entry(name)
    return getattr(importlib.import_module(f"training.optim.{entry.module}"), entry.name)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises ConfigError for an optimizer that does not exist, and for options that it does not have."""
    known = optimizer_entry(config.name).options
    for key in config.options.keys() - known.keys():
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"optimizer.options.{key}: optimizer.name={config.name} has no such option; {has}")
    if config.name == "muon":
        momentum, iterations = (options_of(config)[key] for key in ("momentum", "iterations"))
        if not 0 <= momentum < 1:
            raise ConfigError(f"optimizer.options.momentum={momentum}: it must lie between 0 and 1, 1 not included")
        if iterations != int(iterations) or iterations < 1:
            raise ConfigError(f"optimizer.options.iterations={iterations}: it must be a whole number from 1 on")


def options_of(config: OptimizerConfig) -> dict[str, float]:
    """The optimizer's own settings, defaults included."""
    return {**optimizer_entry(config.name).options, **config.options}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, fused: bool) -> TrainOptimizer:
    """The optimizer that the configuration names. `fused`: one kernel may do all (GPU)."""
    check_optimizer(config)
    return optimizer_class(config.name).build(parameters, config, fused)


def states_to_load(
    meta: dict[str, Any], names: Callable[[str], list[str]], optimizer: str, ema: EmaConfig
) -> tuple[dict[str, str], list[int]]:
    """Which optimizer states to read from a checkpoint.

    Args:
        meta: the checkpoint's.
        names: its tensors that begin with a prefix.
        optimizer: its name.

    Returns:
        state -> the kind that it is read under (an average that the checkpoint lacks begins as its weights); and for
        each average the number of updates after which it began.
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
    """The rate of step `step` (0 for the first) out of `total`: linear warm-up, constant, then the decay to zero at
    `total`.

    A pure function of the step, so nothing of it has to be saved.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = config.decay_from * total
    if config.decay == "constant" or step < start:
        return config.lr * warmup
    progress = min(1.0, (step - start) / max(1.0, total - start))
    tail = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * warmup * tail
