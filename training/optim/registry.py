"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils.checkpoint

from training.config.experiment import EmaConfig, OptimizerConfig
from training.optim.averages import AveragingAdafactor, AveragingAdamW, AveragingAdamW8bit, state_name

STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw8bit": ("exp_avg", "exp_avg_sq"),
    "adafactor": ("row_var", "col_var", "variance"),
}
"""Optimizer -> its states per parameter, besides `step`; a parameter need not have all of them."""


def states_to_load(
    meta: dict[str, Any], names: Callable[[str], list[str]], optimizer: str, ema: EmaConfig
) -> tuple[dict[str, str], list[int]]:
    """Which optimizer states to read from a checkpoint.

    Args:
        meta: the checkpoint's.
        names: its tensors that begin with a prefix.

    Returns:
        state -> the kind that it is read under (an average that the checkpoint lacks begins as its weights); and for
        each average the number of updates after which it began.
    """
    kinds, began = {kind: kind for kind in STATES[optimizer]}, []
    before, updates = meta["config"]["ema"], meta["updates"]
    saved = list(before["decays"]) if before.get("profile", "constant") == ema.profile else []
    since = meta.get("ema_since") or [0] * len(saved)
    for index, decay in enumerate(ema.decays):
        known = decay in saved and bool(names(f"{state_name(saved.index(decay))}/"))
        kinds[state_name(index)] = state_name(saved.index(decay)) if known else "param"
        began.append(since[saved.index(decay)] if known else updates)
    return kinds, began


def skip_compiler() -> None:
    """Spares a process that compiles nothing the import of torch's compiler (4 s).

    torch imports it at the first call of these functions, only to mark them as not to be compiled.
    """
    for function in (
        torch.optim.Optimizer.add_param_group,
        torch.optim.Optimizer.zero_grad,
        torch.optim.Optimizer.state_dict,
        torch.optim.Optimizer.load_state_dict,
        torch.utils.checkpoint.checkpoint,
    ):
        plain = getattr(function, "__wrapped__", None)
        if plain is not None:
            plain.__dynamo_disable = plain


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


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer with moving averages (training/optim/averages.py). `fused`: AdamW in one kernel (GPU)."""
    if config.name == "adafactor":
        return AveragingAdafactor(parameters, lr=config.lr, weight_decay=config.weight_decay)
    beta1, beta2 = config.betas
    if config.name == "adamw8bit":
        return AveragingAdamW8bit(
            parameters, lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay
        )
    return AveragingAdamW(
        parameters, lr=config.lr, betas=(beta1, beta2), eps=config.eps, weight_decay=config.weight_decay, fused=fused
    )
