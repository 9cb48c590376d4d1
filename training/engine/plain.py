"""`zero.stage=0`: plain PyTorch on one device in fp32. The reference that ZeRO is tested against; no DeepSpeed is
imported."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError
from training.config.experiment import EmaConfig, Experiment
from training.engine.fixed_order import FixedOrder, exact_squares, mark_borders, norm_of, peak_of
from training.optim.averages import decays_at, state_name
from training.optim.base import TrainOptimizer
from training.optim.pieces import Piece
from training.optim.registry import build_optimizer, learning_rate, optimizer_entry
from training.processes.ranks import Ranks


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did."""

    grad_norm: float
    """Global norm before clipping; inf when it was not finite."""
    skipped: bool
    """The gradient was not finite, or the step was refused: weights, moments and averages are as before."""
    lr: float
    loss: float = math.nan
    """Of the global batch."""
    votes: Sequence[float] = ()
    """Sums over the ranks."""
    problem: str = ""
    """Why the step was refused; empty where it was not."""


Judge = Callable[[float, Sequence[float]], str]
"""(loss of the global batch, sums of the votes) -> why the step must not be applied; empty when it may be."""


def accept(_loss: float, _votes: Sequence[float]) -> str:
    """Every step may be applied."""
    return ""


class Snapshot:
    """The training state at one step. It is copied to host memory by `copy`: in the thread that writes it, while the
    next forward and backward passes go on, but before the next optimizer step changes it (the engine sees to that).

    Args:
        live: tensors by name.
        host: memory of earlier snapshots, used again.
    """

    def __init__(self, live: dict[str, torch.Tensor], host: dict[str, torch.Tensor] | None = None) -> None:
        self._live: dict[str, torch.Tensor] | None = live
        self._host = {} if host is None else host
        self._names = list(live)
        self._lock = threading.Lock()
        self._device = next((tensor.device for tensor in live.values() if tensor.is_cuda), None)
        if self._device is not None:
            self._ready = torch.cuda.current_stream(self._device).record_event()

    def copy(self) -> None:
        """Returns when all is in host memory; only the first call has anything to do. Any thread."""
        with self._lock, torch.no_grad():
            if self._live is None:
                return
            for name, tensor in self._live.items():
                if name not in self._host:
                    self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).detach()
            if self._device is None:
                self._move(self._live)
            else:
                stream = torch.cuda.Stream(self._device)
                stream.wait_event(self._ready)
                with torch.cuda.stream(stream):
                    self._move(self._live)
                stream.synchronize()
            self._live = None

    def _move(self, live: dict[str, torch.Tensor]) -> None:
        for name, tensor in live.items():
            self._host[name].copy_(tensor, non_blocking=tensor.is_cuda)

    def assemble(self) -> dict[str, torch.Tensor]:
        """This rank's share of the full tensors by name (`param/NAME`, `exp_avg/NAME`, ...), fp32 on the CPU, valid
        until the next snapshot."""
        self.copy()
        return {name: self._host[name] for name in self._names}


class PlainEngine:
    """The interface of `training.engine.deepspeed.Engine` on one device."""

    def __init__(self, model: torch.nn.Module, config: Experiment, ranks: Ranks, accumulate: int = 1) -> None:
        if ranks.world_size > 1:
            raise ConfigError(f"zero.stage=0: it is for one process, not {ranks.world_size}; use zero.stage=1, 2 or 3")
        if config.precision.dtype != "fp32":
            raise ConfigError("precision.dtype=bf16: it needs zero.stage=1, 2 or 3 (fp32 master weights), not 0")
        self.config, self.ranks = config, ranks
        self.module = model.to(ranks.device)
        if (
            config.precision.channels_last and optimizer_entry(config.optimizer.name).by_value
        ):  # others cut weights as they lie
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._trained = trained_parameters(model)
        self.optimizer = build_optimizer(self._trained.values(), config.optimizer, fused=ranks.device != "cpu")
        self.accumulate = accumulate
        self._order: FixedOrder | None = None
        if config.train.deterministic_reduction:
            mark_borders(model)
            sizes = {name: p.numel() for name, p in self._trained.items()}
            layout = [[Piece(name, 0, size, i, 0) for i, (name, size) in enumerate(sizes.items())]]
            self._order, self._weights = FixedOrder(accumulate, layout, 0, None, ranks.device), sum(sizes.values())
        self._micro_batches = 0
        self.updates = 0
        self._host: dict[str, torch.Tensor] = {}
        self._snapshot: Snapshot | None = None

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layout = torch.channels_last if self.config.precision.channels_last else torch.preserve_format
        return self.module(x.to(memory_format=layout), *args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss` (a scalar: the mean over a micro-batch), divided by the number of
        micro-batches."""
        if self._order is None:
            (loss / self.accumulate).backward()
            return
        loss.backward()
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        self._order.add(self._micro_batches, gradients, loss)
        self._micro_batches += 1

    def step(
        self, step: int, share: torch.Tensor | float = math.nan, votes: Sequence[float] = (), judge: Judge = accept
    ) -> StepInfo:
        """Applies the accumulated gradient as step number `step` (0 for the first), unless it is not finite or `judge`
        refuses it. `share` is the loss of this rank's samples, `votes` what else the ranks add up."""
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
        """Sets the mean gradient, clipped with DeepSpeed's arithmetic; its norm before, and the loss."""
        parts = order.mean().split([p.numel() for p in parameters])
        loss = math.fsum(order.losses().tolist()) / order.leaves
        order.begin()
        self._micro_batches, peak = 0, float(peak_of(parts, self.ranks.device))
        norm = math.inf
        if math.isfinite(peak):
            sums = exact_squares(parts, peak, self._weights, self.ranks.device)
            norm = norm_of(sums.tolist(), peak, self._weights)
        factor = torch.ones(())
        if self.config.optimizer.clip_norm:
            factor = torch.clamp((torch.tensor(norm) + 1e-6) / self.config.optimizer.clip_norm, min=1.0)
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p).mul_(1.0 / factor)
        return float(torch.tensor(norm)), loss

    def norm(self) -> float:
        """Global norm of the weights."""
        return math.sqrt(self.squared_norm())

    def squared_norm(self) -> float:
        """Its square."""
        return squared_norm(list(self._trained.values()))

    def set_timeout(self, seconds: float) -> None:
        """One process waits for nobody."""

    @contextmanager
    def averaged(self, index: int = 0) -> Iterator[torch.nn.Module]:
        """The module with the averaged weights in place of the raw ones, in evaluation mode."""
        self._settle()
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
        """Weights and optimizer states."""
        self._settle()
        live = {f"buffer/{name}": b for name, b in saved_buffers(self.module)}
        for name, p in self._trained.items():
            live[f"param/{name}"] = p.detach()
            live.update({f"{kind}/{name}": state for kind, state in self.optimizer.states(p).items()})
        self._snapshot = Snapshot(live, self._host)
        return self._snapshot

    def _settle(self) -> None:
        """The state may change from here on: a snapshot of it must have been copied."""
        if self._snapshot is not None:
            self._snapshot.copy()
            self._snapshot = None

    def export_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's share of weights, moments and averages as fp32 CPU tensors by name."""
        return self.snapshot().assemble()

    @torch.no_grad()
    def import_tensors(self, read: Callable[[str], torch.Tensor], kinds: dict[str, str], updates: int) -> None:
        """Sets weights and optimizer states; `kinds`: state -> the name it is read under, `updates`: steps done so
        far."""
        self._settle()
        for name, buffer in saved_buffers(self.module):
            buffer.copy_(read(f"buffer/{name}"))
        for name, p in self._trained.items():
            p.copy_(read(f"param/{name}"))
            if not updates:  # it has no states yet
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


def squared_norm(tensors: Sequence[torch.Tensor]) -> float:
    """The sum of all squares, in float64."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).square().sum())


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that the optimizer moves and a checkpoint holds: all but frozen ones (training/model/lora.py)."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def saved_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's persistent buffers by name."""
    persistent = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]


def set_step(optimizer: TrainOptimizer, lr: float, ema: EmaConfig, updates: int) -> None:
    """Learning rate and averaging decays of the step that comes."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.averaging = decays_at(ema, updates)
