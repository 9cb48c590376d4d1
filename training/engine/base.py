"""What training asks of an engine, whichever it is, and what all engines have in common."""

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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the weights that are computed with, by `precision.dtype`."""


def in_precision(
    precision: PrecisionConfig,
    x: torch.Tensor,
    log_snr: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor,
    low_res: torch.Tensor | None = None,
    *others: Any,
) -> tuple[Any, ...]:
    """The arguments of `UNet.forward`, pictures and text in the weights' type, and pictures in the memory layout that
    convolutions follow. Noise levels and sizes stay fp32: bf16 would round log-SNR 10.03 to 10."""
    dtype = DTYPES[precision.dtype]
    layout = torch.channels_last if precision.channels_last else torch.preserve_format
    low_res = None if low_res is None else low_res.to(dtype, memory_format=layout)
    return x.to(dtype, memory_format=layout), log_snr, text.to(dtype), mask, low_res, *others


Judge = Callable[[float, Sequence[float]], str]
"""(loss of the global batch, sums of the votes) -> why the step must not be applied; empty when it may be."""


def accept(_loss: float, _votes: Sequence[float]) -> str:
    """Every step may be applied."""
    return ""


class Snapshot(Protocol):
    """The training state at one step, on its way to a checkpoint."""

    def copy(self) -> None:
        """Returns when all is in host memory; only the first call has anything to do. Any thread."""

    def assemble(self) -> dict[str, torch.Tensor]:
        """This rank's share of the full tensors by name (`param/NAME`, `exp_avg/NAME`, ...), fp32 on the CPU, valid
        until the next snapshot. With several ranks collective, over the background group."""
        ...


class Engine(Protocol):
    """One U-Net that is trained. All methods are collective unless they say otherwise.

    Call it like the module; the result is fp32 whatever the precision. `micro-batches x (call, backward)`, then `step`.
    """

    module: torch.nn.Module
    updates: int
    """Optimizer steps that were applied (not skipped)."""

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor) -> None:
        """Gradient of one micro-batch's mean loss; averaged over micro-batches and ranks."""

    def step(
        self, step: int, share: torch.Tensor | float = math.nan, votes: Sequence[float] = (), judge: Judge = accept
    ) -> StepInfo:
        """Applies the accumulated gradient as step number `step` (0 for the first), unless it is not finite or `judge`
        refuses it.

        Args:
            share: mean loss of this rank's samples; the loss of the global batch is the mean over the ranks.
            votes: what else the ranks add up, in the same collective.
            judge: asked on every rank with the same values.
        """
        ...

    def norm(self) -> float:
        """Global norm of the weights (fp32 masters)."""
        ...

    def squared_norm(self) -> float:
        """This rank's part of its square. Not collective."""
        ...

    def set_timeout(self, seconds: float) -> None:
        """Time-out of every process group but the background one. Not collective."""

    def averaged(self, index: int = 0) -> AbstractContextManager[torch.nn.Module]:
        """The module with the averaged weights in place of the raw ones, in evaluation mode; all ranks run it in
        step."""
        ...

    def snapshot(self) -> Snapshot:
        """This rank's share of the state. Not collective."""
        ...

    def export_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's share of the full tensors: `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/I/NAME`, fp32
        on the CPU."""
        ...

    def import_tensors(self, read: Callable[[str], torch.Tensor], kinds: dict[str, str], updates: int) -> None:
        """Sets weights and optimizer states from whole tensors.

        Args:
            read: the tensor of a name in a checkpoint; a rank asks only for what it holds a piece of.
            kinds: optimizer state -> the kind it is read under (`{"ema/0": "ema/1"}` when the averages changed places).
            updates: optimizer steps that were applied before; at 0 moments are zero, and need not be there to be read.
        """


class WeightKeeper:
    """The half of an engine that does not depend on how it steps: its weights, their averages and its snapshots.

    A subclass says which fp32 tensors hold the weights (`_weights`) and an average (`_average`), and how the module
    gets to see them (`_publish`).
    """

    def __init__(self, config: Experiment, ranks: Ranks, module: torch.nn.Module) -> None:
        self.config, self.ranks, self.module = config, ranks, module
        self.updates = 0
        self._host: dict[str, torch.Tensor] = {}
        """Memory that every snapshot is copied to."""
        self._snapshot: Snapshot | None = None

    def _weights(self) -> list[torch.Tensor]:
        raise NotImplementedError

    def _average(self, index: int) -> list[torch.Tensor]:
        raise NotImplementedError

    def _publish(self) -> None:
        """Makes the weights of the module what `_weights` says."""

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
        """The state may change from here on: a snapshot of it must have been copied."""
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
