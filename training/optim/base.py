"""What the engines, checkpoints and the memory plan ask of an optimizer, whichever it is.

An optimizer says which states it keeps, where they lie and how many bytes they take. A *sliced* state has a value for
each weight and lies where the weight lies: under ZeRO in flat tensors like the weights'. A *whole* state belongs to a
whole parameter (a mean over its rows), and each process keeps all of them.

Moving averages of the weights (training/optim/averages.py) are states of every optimizer: ZeRO shards them exactly like
its moments, in fp32, without gathering. A step that an engine skips never reaches the optimizer, so it does not move
an average either.
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
    """Which slices of which parameters the tensors of an optimizer hold, on this process and on all others."""

    flats: list[Tensor]
    """The tensors that the optimizer moves, each a parameter to it."""
    layout: Layout
    """The pieces of each process; a `Piece` says which of the flats it lies in."""
    shapes: Shapes
    """Of the whole parameters, by name."""
    rank: int
    """This process among those of the layout."""
    add_up: Callable[[Tensor], object] = lambda _: None
    """Sums a tensor over the processes, in place."""


class TrainOptimizer(torch.optim.Optimizer):
    """Base of all optimizers: a subclass moves the weights in `update`; `step` moves the averages as well.

    Before each step the engine sets `averaging` (one decay per average; it follows from the number of updates so far,
    because ZeRO 3 calls `step` once per group of parameters). An average begins as the weights before its first step.
    """

    SLICED: ClassVar[tuple[str, ...]] = ()
    """Names of the sliced states; also the first part of their tensors' names in a checkpoint."""
    WHOLE: ClassVar[tuple[str, ...]] = ()
    """Names of the whole states; a parameter need not have all of them."""
    averaging: tuple[float, ...] = ()

    @classmethod
    def build(cls, parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool) -> Self:
        """The optimizer of `parameters`. `fused`: they lie on a GPU, where one kernel may do all."""
        raise NotImplementedError

    def update(self) -> None:
        """One update of every parameter that has a gradient; collective where `shard` was called."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """`update`, then every average moves towards the new weights."""
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
        """Called once, before the first step, when the tensors hold slices of parameters. An optimizer that treats each
        value by itself has nothing to do."""

    def begin(self, p: Tensor) -> None:
        """Sliced states of zero, and a count of no steps."""
        self.count(p, 0)
        for kind in self.SLICED:
            self.set_sliced(p, kind, torch.zeros_like(p))

    def count(self, p: Tensor, updates: int) -> None:
        """As many steps have been taken of p."""
        self.state[p]["step"] = torch.tensor(float(updates), device=p.device if p.is_cuda else "cpu")

    def sliced(self, p: Tensor, kind: str) -> Tensor:
        """A sliced state or an average of p: fp32, in p's shape. May be changed in place only if `set_sliced` is called
        with it afterwards."""
        return self.state[p][kind]

    def set_sliced(self, p: Tensor, kind: str, values: Tensor) -> None:
        """Sets it; `values` may be kept."""
        self.state[p][kind] = values

    def states(self, p: Tensor) -> dict[str, Tensor]:
        """All states of a whole parameter p by name, fp32, averages included; empty before its first step."""
        return {kind: value for kind, value in self.state[p].items() if kind != "step"}

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        """Parameter -> its whole states by name, of sharded tensors; the same on all processes."""
        return {}

    # ------------------------------------------------------------------------------------------------- bytes

    @classmethod
    def state_bytes(cls, shapes: Sequence[tuple[int, ...]], share: int) -> int:
        """Bytes that the states (without averages) take in a process.

        Args:
            shapes: of all parameters.
            share: how many of their values this process keeps.
        """
        return 4 * len(cls.SLICED) * share + cls.whole_bytes(shapes)

    @classmethod
    def saved_bytes(cls, shapes: Sequence[tuple[int, ...]], share: int) -> int:
        """The same of what a checkpoint gets of them, in fp32."""
        return 4 * len(cls.SLICED) * share + cls.whole_bytes(shapes)

    @classmethod
    def whole_bytes(cls, shapes: Sequence[tuple[int, ...]]) -> int:
        """Bytes of the whole states."""
        return 4 * sum(sum(cls.whole_lengths(shape).values()) for shape in shapes)

    @classmethod
    def whole_lengths(cls, shape: tuple[int, ...]) -> dict[str, int]:
        """Whole state -> number of values, of a parameter of this shape."""
        return {}


def columns_of(shape: tuple[int, ...]) -> int:
    """Columns of the matrix (O, I h w) that a kernel (O, I, h, w) counts as; 0: a vector or a scalar."""
    return prod(shape[1:]) if len(shape) > 1 else 0


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
