"""The interface of optimizers to the engines, checkpoints and the memory plan.

An optimizer declares which states it keeps and how many bytes they take. A *sliced* state has one value per weight and
is stored like the weights: under ZeRO in flat tensors. A *whole* state belongs to a whole parameter (a mean over its
rows), and each process keeps all of them.

Moving averages of the weights (training/optim/averages.py) are states of every optimizer: ZeRO shards them exactly like
its moments, in fp32, without gathering. A step that an engine skips never reaches the optimizer, so it does not change
the averages either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import Tensor

from training.config.experiment import OptimizerConfig
from training.optim.averages import state_name
from training.optim.pieces import Layout, Shapes


@dataclass(frozen=True)
class Sharding:
    """The slices of parameters that the tensors of an optimizer hold, on this process and on all others."""

    flats: list[Tensor]
    """The tensors that the optimizer updates, each of which it sees as a parameter."""
    layout: Layout
    """The pieces of each process; each `Piece` has the index of its flat."""
    shapes: Shapes
    """Shapes of the whole parameters, by name."""
    rank: int
    """Index of this process in the layout."""
    add_up: Callable[[Tensor], object] = lambda _: None
    """Sums a tensor over the processes, in place."""


class TrainOptimizer(torch.optim.Optimizer):
    """Base of all optimizers: a subclass updates the weights in `update`; `step` also updates the averages.

    Before each step the engine sets `averaging`, one decay per average, from its own count of updates (ZeRO 3 calls
    `step` once per group of parameters). An average starts as the weights before its first step.
    """

    SLICED: ClassVar[tuple[str, ...]] = ()
    """Names of the sliced states; also the prefixes of their tensors in a checkpoint."""
    WHOLE: ClassVar[tuple[str, ...]] = ()
    """Names of the whole states; a parameter need not have all of them."""
    averaging: tuple[float, ...] = ()

    @classmethod
    def build(cls, parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool) -> Self:
        """Return the optimizer for `parameters`. `fused`: allow a fused kernel (parameters on a GPU)."""
        raise NotImplementedError

    def update(self) -> None:
        """Update every parameter that has a gradient; collective if `shard` was called."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Call `update`, then move every average towards the new weights."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        names = [state_name(index) for index in range(len(self.averaging))]
        fresh = {p: p.detach().clone() for p in parameters if any(name not in self.state[p] for name in names)}
        self.update()
        for name, decay in zip(names, self.averaging, strict=True):
            for p in fresh:
                self.state[p].setdefault(name, fresh[p].clone())
            averages = [self.state[p][name] for p in parameters]
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)

    # ----------------------------------------------------------------------------------------------- states

    def shard(self, sharding: Sharding) -> None:
        """Set the slices of parameters that the tensors hold; called once, before the first step, under ZeRO. An
        elementwise optimizer has nothing to do."""

    def begin(self, p: Tensor) -> None:
        """Set the sliced states of p to zero, and its step count to 0."""
        self.count(p, 0)
        for kind in self.SLICED:
            self.set_sliced(p, kind, torch.zeros_like(p))

    def count(self, p: Tensor, updates: int) -> None:
        """Set the number of steps that p has been updated."""
        self.state[p]["step"] = torch.tensor(float(updates), device=p.device if p.is_cuda else "cpu")

    def sliced(self, p: Tensor, kind: str) -> Tensor:
        """Return a sliced state or an average of p: fp32, in p's shape. It may be changed in place only if `set_sliced`
        is called with it afterwards."""
        return self.state[p][kind]

    def set_sliced(self, p: Tensor, kind: str, values: Tensor) -> None:
        """Set a sliced state or an average of p; `values` may be kept, not copied."""
        self.state[p][kind] = values

    def states(self, p: Tensor) -> dict[str, Tensor]:
        """Return all states of a whole parameter p by name, fp32, including averages; empty before its first step."""
        return {kind: value for kind, value in self.state[p].items() if kind != "step"}

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        """Return the whole states of sharded tensors, by parameter and state; they are the same on all processes."""
        return {}

    # ------------------------------------------------------------------------------------------------- bytes

    @classmethod
    def state_bytes(cls, shapes: Sequence[tuple[int, ...]], share: int) -> int:
        """Return the bytes that the states, without averages, take in one process.

        Args:
            shapes: shapes of all parameters.
            share: number of their values that this process keeps.
        """
        return 4 * len(cls.SLICED) * share + cls.whole_bytes(shapes)

    @classmethod
    def saved_bytes(cls, shapes: Sequence[tuple[int, ...]], share: int) -> int:
        """Return the bytes of the same states in a checkpoint, where they are fp32."""
        return 4 * len(cls.SLICED) * share + cls.whole_bytes(shapes)

    @classmethod
    def whole_bytes(cls, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the bytes of the whole states."""
        return 4 * sum(sum(cls.whole_lengths(shape).values()) for shape in shapes)

    @classmethod
    def whole_lengths(cls, shape: tuple[int, ...]) -> dict[str, int]:
        """Return the number of values of each whole state of a parameter of this shape."""
        return {}


def columns_of(shape: tuple[int, ...]) -> int:
    """Return the number of columns of the matrix (O, I h w) of a kernel (O, I, h, w); 0 for a vector or a scalar."""
    return prod(shape[1:]) if len(shape) > 1 else 0


def skip_compiler() -> None:
    """Avoid importing torch's compiler (4 s) in a process that compiles nothing.

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
