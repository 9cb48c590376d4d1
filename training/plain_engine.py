"""`zero.stage=0`: plain PyTorch on one device in fp32. The reference that ZeRO is tested against; no DeepSpeed is
imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.errors import ConfigError
from training.config import EmaConfig, Experiment
from training.distributed import Ranks
from training.ema import decays_at, state_name
from training.optimizers import build_optimizer, learning_rate


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did."""

    grad_norm: float
    """Global norm before clipping; inf when it was not finite."""
    skipped: bool
    """The gradient was not finite: weights, moments and averages are as before."""
    lr: float


class Snapshot:
    """The training state at one step, copied to host memory. `assemble` may run later, in another thread."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def assemble(self) -> dict[str, torch.Tensor]:
        """This rank's share of the full tensors by name (`param/NAME`, `exp_avg/NAME`, ...), fp32 on the CPU."""
        return self._tensors


class PlainEngine:
    """The interface of `training.engine.Engine` on one device."""

    def __init__(self, model: torch.nn.Module, config: Experiment, ranks: Ranks, accumulate: int = 1) -> None:
        if ranks.world_size > 1:
            raise ConfigError(f"zero.stage=0: it is for one process, not {ranks.world_size}; use zero.stage=1, 2 or 3")
        if config.precision.dtype != "fp32":
            raise ConfigError("precision.dtype=bf16: it needs zero.stage=1, 2 or 3 (fp32 master weights), not 0")
        self.config, self.ranks = config, ranks
        self.module = model.to(ranks.device)
        self._trained = trained_parameters(model)
        self.optimizer = build_optimizer(self._trained.values(), config.optimizer, fused=ranks.device != "cpu")
        self.accumulate = accumulate
        self.updates = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self, step: int, apply: bool = True) -> StepInfo:
        """Applies the accumulated gradient as step number `step` (0 for the first), unless it is not finite or not
        `apply`."""
        lr = learning_rate(step, self.config.optimizer, self.config.train.steps)
        parameters = list(self._trained.values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        clip = self.config.optimizer.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
        skipped = not (apply and math.isfinite(norm))
        if not skipped:
            set_step(self.optimizer, lr, self.config.ema, self.updates)
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(float("inf") if skipped else norm, skipped, lr)

    def norm(self) -> float:
        """Global norm of the weights."""
        return math.sqrt(sum(float(p.detach().double().square().sum()) for p in self._trained.values()))

    def set_timeout(self, seconds: float) -> None:
        """One process waits for nobody."""

    @contextmanager
    def averaged(self, index: int = 0) -> Iterator[torch.nn.Module]:
        """The module with the averaged weights in place of the raw ones, in evaluation mode."""
        states = [self.optimizer.state[p].get(state_name(index)) for p in self._trained.values()]
        raw = [p.detach().clone() for p in self._trained.values()]
        self._set_weights([s if s is not None else w for s, w in zip(states, raw, strict=True)])
        self.module.eval()
        try:
            yield self.module
        finally:
            self.module.train()
            self._set_weights(raw)

    @torch.no_grad()
    def _set_weights(self, values: list[torch.Tensor]) -> None:
        for p, value in zip(self._trained.values(), values, strict=True):
            p.copy_(value)

    def snapshot(self) -> Snapshot:
        """Weights and optimizer states, copied to host memory."""
        tensors = {f"buffer/{name}": b.detach().cpu().clone() for name, b in saved_buffers(self.module)}
        for name, p in self._trained.items():
            tensors[f"param/{name}"] = p.detach().cpu().clone()
            for kind, value in self.optimizer.state[p].items():
                if kind != "step":
                    tensors[f"{kind}/{name}"] = value.detach().cpu().clone()
        return Snapshot(tensors)

    def export_tensors(self) -> dict[str, torch.Tensor]:
        return self.snapshot().assemble()

    @torch.no_grad()
    def import_tensors(self, read: Callable[[str], torch.Tensor], kinds: dict[str, str], updates: int) -> None:
        """Sets weights and optimizer states; `kinds`: state -> the name it is read under, `updates`: steps done so
        far."""
        for name, buffer in saved_buffers(self.module):
            buffer.copy_(read(f"buffer/{name}"))
        for name, p in self._trained.items():
            p.copy_(read(f"param/{name}"))
            state = self.optimizer.state[p]
            state["step"] = torch.tensor(float(updates), device=p.device if p.device.type == "cuda" else "cpu")
            for kind, source in kinds.items():
                try:
                    state[kind] = read(f"{source}/{name}").to(p.device, copy=True)
                except KeyError:
                    continue
        self.updates = updates


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that the optimizer moves and a checkpoint holds: all but frozen ones (training/lora.py)."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def saved_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's persistent buffers by name."""
    persistent = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]


def set_step(optimizer: torch.optim.Optimizer, lr: float, ema: EmaConfig, updates: int) -> None:
    """Learning rate and averaging decays of the step that comes."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.averaging = decays_at(ema, updates)  # type: ignore[attr-defined]
