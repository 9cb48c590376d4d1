"""Exponential moving averages of the weights, kept as states of the optimizer.

An average that is an optimizer state is sharded by ZeRO exactly like Adam's moments: fp32, no gathering, `4 /
world_size` bytes per weight. A step that DeepSpeed skips (non-finite gradient) never reaches the optimizer, so it does
not move the average either.
"""

from __future__ import annotations

from typing import Any

import torch


def decay_at(decay: float, updates: int) -> float:
    """The decay of update number `updates` (0 for the first): ramped up as (1 + n) / (10 + n), so that early averages
    forget the random start."""
    return min(decay, (1 + updates) / (10 + updates))


def state_name(index: int) -> str:
    """The optimizer state that holds average `index`; also the first part of its tensors' names in a checkpoint."""
    return f"ema/{index}"


class Averaging(torch.optim.Optimizer):
    """Mix-in, left of an optimizer class: `step` also moves `state[p]["ema/I"]` towards the new weights.

    Set `averaging` (one decay per average) before each step; the engine derives it from the number of updates so far,
    because ZeRO 3 calls `step` once per group of parameters. An average begins as the weights before its first step.
    """

    averaging: tuple[float, ...] = ()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        names = [state_name(index) for index in range(len(self.averaging))]
        fresh = {p: p.detach().clone() for p in parameters if any(name not in self.state[p] for name in names)}
        base = super().step
        # torch's wrapper around it (gradients off, as they are here) imports the compiler: 5 s at the first step
        plain = getattr(base, "__wrapped__", None)
        result = base(closure) if plain is None else plain(self, closure)
        for name, decay in zip(names, self.averaging, strict=True):
            for p in fresh:
                self.state[p].setdefault(name, fresh[p].clone())
            averages = [self.state[p][name] for p in parameters]
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        return result


class AveragingAdamW(Averaging, torch.optim.AdamW):
    """AdamW with moving averages."""


class AveragingAdafactor(Averaging, torch.optim.Adafactor):
    """Adafactor with moving averages; it factors matrices, so it must see whole parameters."""
