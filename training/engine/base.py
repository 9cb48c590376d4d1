"""The interface that training uses of an engine, and what all engines have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from training.config.experiment import EmaConfig, Experiment, PrecisionConfig
from training.optim.averages import decays_at
from training.optim.base import TrainOptimizer
from training.processes.ranks import Ranks


@dataclass(frozen=True)
class StepInfo:
    """The result of one optimizer step."""

    grad_norm: float
    """Global norm of the gradient before clipping; inf if the step was skipped."""
    skipped: bool
    """The gradient was not finite, or the step was refused: weights, moments and averages are unchanged."""
    lr: float
    loss: float = math.nan
    """Mean loss of the global batch."""
    votes: Sequence[float] = ()
    """Sums of the votes over the ranks."""
    problem: str = ""
    """Why the step was refused; empty if it was not."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of the weights in forward and backward passes, by `precision.dtype`."""


def in_precision(
    precision: PrecisionConfig,
    x: torch.Tensor,
    log_snr: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor,
    low_res: torch.Tensor | None = None,
    *others: Any,
) -> tuple[Any, ...]:
    """Return the arguments of `UNet.forward` with pictures and text in the weights' dtype, and pictures in the memory
    layout of the config. Noise levels and sizes stay fp32: bf16 would round log-SNR 10.03 to 10."""
    dtype = DTYPES[precision.dtype]
    layout = torch.channels_last if precision.channels_last else torch.preserve_format
    low_res = None if low_res is None else low_res.to(dtype, memory_format=layout)
    return x.to(dtype, memory_format=layout), log_snr, text.to(dtype), mask, low_res, *others


Judge = Callable[[float, Sequence[float]], str]
"""Called with (loss of the global batch, sums of the votes); returns why the step must not be applied, or an empty
string."""


def accept(_loss: float, _votes: Sequence[float]) -> str:
    """Accept every step."""
    return ""


class Snapshot(Protocol):
    """The training state at one step, to be written to a checkpoint."""

    def copy(self) -> None:
        """Copy the state to host memory and return when done; only the first call copies. May run in any thread."""

    def assemble(self) -> dict[str, torch.Tensor]:
        """Return this rank's share of the full tensors by name (`param/NAME`, `exp_avg/NAME`, ...), fp32 on the CPU,
        valid until the next snapshot. With several ranks, collective over the background group."""
        ...


class Engine(Protocol):
    """One U-Net in training. All methods are collective unless documented otherwise.

    An engine is called like the module; the result is always fp32. Per optimizer step: for each micro-batch a call and
    `backward`, then `step`.
    """

    module: torch.nn.Module
    updates: int
    """Optimizer steps that were applied (not skipped)."""

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss; the step uses the mean over micro-batches and ranks."""

    def step(
        self, step: int, share: torch.Tensor | float = math.nan, votes: Sequence[float] = (), judge: Judge = accept
    ) -> StepInfo:
        """Apply the accumulated gradient as step number `step` (0 for the first), unless it is not finite or `judge`
        refuses it.

        Args:
            share: mean loss of this rank's samples; the loss of the global batch is the mean over the ranks.
            votes: other numbers to sum over the ranks in the same collective.
            judge: called on every rank with the same values.
        """
        ...

    def norm(self) -> float:
        """Return the global norm of the fp32 weights."""
        ...

    def squared_norm(self) -> float:
        """Return this rank's part of the squared norm of the weights. Not collective."""
        ...

    def set_timeout(self, seconds: float) -> None:
        """Set the time-out of every process group except the background one. Not collective."""

    def averaged(self, index: int = 0) -> AbstractContextManager[torch.nn.Module]:
        """Inside the context, the module has the averaged weights of average `index` and is in evaluation mode; all
        ranks must run it in lockstep."""
        ...

    def snapshot(self) -> Snapshot:
        """Return a snapshot of this rank's share of the state. Not collective."""
        ...

    def export_tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's share of the full tensors: `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/I/NAME`,
        ..., fp32 on the CPU."""
        ...

    def import_tensors(self, read: Callable[[str], torch.Tensor], kinds: dict[str, str], updates: int) -> None:
        """Set weights and optimizer states from whole tensors.

        Args:
            read: returns a tensor of a checkpoint by name; a rank only reads tensors of which it holds a piece.
            kinds: for each optimizer state, the kind to read it from (`{"ema/0": "ema/1"}` if averages were reordered).
            updates: number of applied optimizer steps; with 0, moments are set to zero instead of being read.
        """


class WeightKeeper:
    """The part of an engine that does not depend on how it steps: its weights, their averages and its snapshots.

    A subclass defines which fp32 tensors hold the weights (`_weights`) and an average (`_average`), and how to copy
    them to the module (`_publish`).
    """

    def __init__(self, config: Experiment, ranks: Ranks, module: torch.nn.Module) -> None:
        self.config, self.ranks, self.module = config, ranks, module
        self.updates = 0
        self._host: dict[str, torch.Tensor] = {}
        """Host memory that every snapshot reuses."""
        self._snapshot: Snapshot | None = None

    def _weights(self) -> list[torch.Tensor]:
        raise NotImplementedError

    def _average(self, index: int) -> list[torch.Tensor]:
        raise NotImplementedError

    def _publish(self) -> None:
        """Copy `_weights` to the module's parameters, if they are separate."""

    def squared_norm(self) -> float:
        """See Engine."""
        norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in self._weights()]
        return float(torch.stack(norms).square().sum())

    @contextmanager
    def averaged(self, index: int = 0) -> Iterator[torch.nn.Module]:
        """See Engine."""
        self._settle()
        raw = [weight.detach().clone() for weight in self._weights()]
        self._set_weights(self._average(index))
        self.module.eval()
        try:
            yield self.module
        finally:
            self.module.train()
            self._set_weights(raw)

    @torch.no_grad()
    def _set_weights(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self._weights(), values, strict=True):
            weight.copy_(value)
        self._publish()

    def _settle(self) -> None:
        """Finish copying the last snapshot; called before the state changes."""
        if self._snapshot is not None:
            self._snapshot.copy()
            self._snapshot = None

    def snapshot(self) -> Snapshot:
        """See Engine."""
        self._settle()
        self._snapshot = self._new_snapshot()
        return self._snapshot

    def _new_snapshot(self) -> Snapshot:
        raise NotImplementedError

    def export_tensors(self) -> dict[str, torch.Tensor]:
        """See Engine."""
        return self.snapshot().assemble()


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained and saved: all except frozen ones (training/model/lora.py)."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def saved_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the module's persistent buffers with their names."""
    persistent = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]


def set_step(optimizer: TrainOptimizer, lr: float, ema: EmaConfig, updates: int) -> None:
    """Set the learning rate and averaging decays for the next step; `updates`: optimizer steps applied so far."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.averaging = decays_at(ema, updates)
