"""`zero.stage=0`: plain PyTorch on one device in fp32, the reference that ZeRO is tested against. Does not import
DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError
from training.config.experiment import Experiment
from training.config.optimizers import optimizer_entry
from training.engine.base import (
    Judge,
    Snapshot,
    StepInfo,
    WeightKeeper,
    accept,
    saved_buffers,
    set_step,
    trained_parameters,
)
from training.engine.fixed_order import FixedOrder, mark_borders
from training.engine.snapshots import HostSnapshot
from training.optim.averages import state_name
from training.optim.pieces import Piece
from training.optim.registry import build_optimizer, learning_rate
from training.processes.ranks import Ranks


class PlainEngine(WeightKeeper):
    """An Engine (training/engine/base.py) for one process.

    Raises:
        ConfigError: several processes, or bf16.
    """

    def __init__(self, model: torch.nn.Module, config: Experiment, ranks: Ranks, accumulate: int = 1) -> None:
        if ranks.world_size > 1:
            raise ConfigError(
                f"zero.stage=0: it only works with one process, not {ranks.world_size}; use zero.stage=1, 2 or 3"
            )
        if config.precision.dtype != "fp32":
            raise ConfigError("precision.dtype=bf16: it needs zero.stage=1, 2 or 3 (fp32 master weights), not 0")
        super().__init__(config, ranks, model.to(ranks.device))
        if (
            config.precision.channels_last and optimizer_entry(config.optimizer.name).by_value
        ):  # others depend on the order of values in memory
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._trained = trained_parameters(model)
        self.optimizer = build_optimizer(self._trained.values(), config.optimizer, fused=ranks.device != "cpu")
        self._accumulate, self._micro_batches = accumulate, 0
        self._order: FixedOrder | None = None
        if config.train.deterministic_reduction:
            mark_borders(model)
            sizes = {name: p.numel() for name, p in self._trained.items()}
            layout = [[Piece(name, 0, size, i, 0) for i, (name, size) in enumerate(sizes.items())]]
            self._order = FixedOrder(accumulate, layout, 0, None, ranks.device)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layout = torch.channels_last if self.config.precision.channels_last else torch.preserve_format
        return self.module(x.to(memory_format=layout), *args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        if self._order is None:
            (loss / self._accumulate).backward()
            return
        loss.backward()
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        self._order.add(self._micro_batches, gradients, loss)
        self._micro_batches += 1

    def step(
        self, step: int, share: torch.Tensor | float = math.nan, votes: Sequence[float] = (), judge: Judge = accept
    ) -> StepInfo:
        """See Engine."""
        self._settle()
        lr = learning_rate(step, self.config.optimizer, self.config.train.steps)
        parameters = list(self._trained.values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self._order is not None:
            norm, loss = self._clip_exactly(self._order, parameters)
        else:
            clip = self.config.optimizer.clip_norm or float("inf")
            norm, loss = torch.stack(
                [torch.nn.utils.clip_grad_norm_(parameters, clip), torch.as_tensor(share).to(parameters[0])]
            ).tolist()
        problem = judge(loss, votes)
        skipped = bool(problem) or not math.isfinite(norm)
        if not skipped:
            set_step(self.optimizer, lr, self.config.ema, self.updates)
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(float("inf") if skipped else norm, skipped, lr, loss, votes, problem)

    def _clip_exactly(self, order: FixedOrder, parameters: list[torch.nn.Parameter]) -> tuple[float, float]:
        """Set the mean gradient, clipped with DeepSpeed's arithmetic; return its norm before clipping, and the loss."""
        parts = order.mean().split([p.numel() for p in parameters])
        loss = math.fsum(order.losses().tolist()) / order.leaves
        norm = order.norm(parts, lambda sums: [] if sums is None else sums.tolist())
        self._micro_batches = 0
        factor = torch.ones(())
        if self.config.optimizer.clip_norm:
            factor = torch.clamp((torch.tensor(norm) + 1e-6) / self.config.optimizer.clip_norm, min=1.0)
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p).mul_(1.0 / factor)
        return float(torch.tensor(norm)), loss

    def norm(self) -> float:
        """See Engine."""
        return math.sqrt(self.squared_norm())

    def set_timeout(self, seconds: float) -> None:
        """See Engine; one process has no groups."""

    def _weights(self) -> list[torch.Tensor]:
        return list(self._trained.values())

    def _average(self, index: int) -> list[torch.Tensor]:
        name = state_name(index)
        return [self.optimizer.state[p].get(name, p.detach()) for p in self._trained.values()]

    def _new_snapshot(self) -> Snapshot:
        live = {f"buffer/{name}": b for name, b in saved_buffers(self.module)}
        for name, p in self._trained.items():
            live[f"param/{name}"] = p.detach()
            live.update({f"{kind}/{name}": state for kind, state in self.optimizer.states(p).items()})
        return HostSnapshot(live, self._host)

    @torch.no_grad()
    def import_tensors(self, read: Callable[[str], torch.Tensor], kinds: dict[str, str], updates: int) -> None:
        """See Engine."""
        self._settle()
        for name, buffer in saved_buffers(self.module):
            buffer.copy_(read(f"buffer/{name}"))
        for name, p in self._trained.items():
            p.copy_(read(f"param/{name}"))
            if not updates:  # the checkpoint has no states yet
                self.optimizer.state.pop(p, None)
                continue
            self.optimizer.count(p, updates)
            for kind, source in kinds.items():
                try:
                    value = read(f"{source}/{name}").to(p.device, copy=True)
                except KeyError:
                    continue
                self.optimizer.set_sliced(p, kind, value)
        self.updates = updates
