"""Adafactor (Shazeer & Stern 2018, algorithms 4 and 5, without momentum) on whole parameters or on pieces of them.

ZeRO gives an optimizer flat slices, but Adafactor's second moments are means over the rows and columns of a whole
matrix, and its step sizes depend on the norms of whole parameters. So each process sums what it has, the sums are
reduced over the processes (twice per step, one number per row and column), and every process keeps the same small
means. With whole parameters it equals torch.optim.Adafactor, except that a convolution (O, I, h, w) is factored as the
matrix (O, I h w): torch factors the last two dimensions, which saves next to nothing for 3 x 3 kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from training.config.experiment import OptimizerConfig
from training.optim.base import Sharding, TrainOptimizer, columns_of
from training.optim.pieces import Piece

EPS1 = torch.finfo(torch.float32).eps
BETA2_DECAY = -0.8
LEAST_RMS = 1e-3
"""Lower bound on a parameter's root mean square in its step size (eps_2 in the paper)."""


@dataclass
class Unit:
    """One parameter: its pieces in a tensor of this process, and its second moments."""

    name: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def columns(self) -> int:
        """Columns of its matrix; 0 for a vector, which is not factored."""
        return columns_of(self.shape)

    @property
    def lengths(self) -> dict[str, int]:
        """Number of values of each state."""
        return Adafactor.whole_lengths(self.shape)

    def begin(self, device: torch.device) -> None:
        """Create missing second moments, as zeros."""
        for kind, length in self.lengths.items():
            self.state.setdefault(kind, torch.zeros(length, device=device))

    def add_squares(self, piece: Piece, gradient: Tensor, sums: list[Tensor]) -> None:
        """Add the squared gradient of a piece to the sums of its rows and columns (for a vector, of its values)."""
        if not self.columns:
            sums[0][piece.start : piece.stop] += gradient.square()
            return
        first, last, inside = self._rows(piece)
        squares = gradient.new_zeros((last - first) * self.columns)
        torch.square(gradient, out=squares[inside])
        matrix = squares.view(-1, self.columns)
        sums[0][first:last] += matrix.sum(1)
        sums[1] += matrix.sum(0)

    def remember(self, sums: list[Tensor], share: float) -> None:
        """Move the second moments by `share` towards the means from the whole parameter's sums."""
        counts = (self.columns, self.shape[0]) if self.columns else (1,)
        for kind, total, count in zip(self.lengths, sums, counts, strict=True):
            self.state[kind].lerp_(total / count, share)

    def second_moment(self, piece: Piece) -> Tensor:
        """Return the estimated second moment of each value of a piece."""
        if not self.columns:
            return self.state["variance"][piece.start : piece.stop].clone()
        first, last, inside = self._rows(piece)
        rows = self.state["row_var"] / self.state["row_var"].mean().clamp(min=EPS1)
        return torch.outer(rows[first:last], self.state["col_var"]).view(-1)[inside]

    def _rows(self, piece: Piece) -> tuple[int, int, slice]:
        """Return the first and last + 1 row that a piece touches, and its slice within these rows."""
        first, last = piece.start // self.columns, -(-piece.stop // self.columns)
        return first, last, slice(piece.start - first * self.columns, piece.stop - first * self.columns)


class Adafactor(TrainOptimizer):
    """See the module docstring. `shard` sets the pieces that tensors hold; without it they are whole parameters."""

    WHOLE = ("row_var", "col_var", "variance")

    @classmethod
    def build(cls, parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool) -> Adafactor:
        """See TrainOptimizer.build."""
        return cls(parameters, lr=config.lr, weight_decay=config.weight_decay)

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._units: dict[Tensor, list[Unit]] = {}
        self._add_up: Callable[[Tensor], object] = lambda sums: None

    def shard(self, sharding: Sharding) -> None:
        """Set the pieces that this process holds, and create second moments of zero for all parameters of its flats."""
        self._add_up = sharding.add_up
        for index, flat in enumerate(sharding.flats):
            names = sorted({piece.name for pieces in sharding.layout for piece in pieces if piece.flat == index})
            own = [piece for piece in sharding.layout[sharding.rank] if piece.flat == index]
            self._units[flat] = [
                Unit(name, sharding.shapes[name], [piece for piece in own if piece.name == name]) for name in names
            ]
            for unit in self._units[flat]:
                unit.begin(flat.device)

    @classmethod
    def whole_lengths(cls, shape: tuple[int, ...]) -> dict[str, int]:
        """Row and column means for a matrix; one value each for a vector."""
        columns = columns_of(shape)
        return {"row_var": shape[0], "col_var": columns} if columns else {"variance": prod(shape)}

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        """See TrainOptimizer.whole_states."""
        return {unit.name: unit.state for units in self._units.values() for unit in units}

    def update(self) -> None:
        """Update all tensors that have a gradient; the gradient is overwritten."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group["lr"], group["weight_decay"])

    def _move(self, p: Tensor, lr: float, weight_decay: float) -> None:
        state, units = self.state[p], self._units_of(p)
        state["step"] = state.get("step", torch.zeros(())) + 1
        step = float(state["step"])
        held = [(index, piece) for index, unit in enumerate(units) for piece in unit.pieces]
        assert p.grad is not None
        gradients = [piece.cut(p.grad) for _, piece in held]
        weights = [piece.cut(p) for _, piece in held]

        lengths = [[*unit.lengths.values(), 1] for unit in units]
        flat_sums = torch.zeros(sum(map(sum, lengths)), device=p.device)
        parts = iter(flat_sums.split([length for unit in lengths for length in unit]))
        sums = [[next(parts) for _ in unit] for unit in lengths]
        for (index, piece), gradient, weight in zip(held, gradients, weights, strict=True):
            units[index].add_squares(piece, gradient, sums[index])
            sums[index][-1] += weight.square().sum()
        self._add_up(flat_sums)
        for unit, own in zip(units, sums, strict=True):
            unit.remember(own[:-1], step**BETA2_DECAY)

        moved = torch.zeros(len(units), device=p.device)
        for (index, piece), gradient in zip(held, gradients, strict=True):
            gradient.mul_(units[index].second_moment(piece).clamp_(min=EPS1 * EPS1).rsqrt_())
            moved[index] += gradient.square().sum()
        self._add_up(moved)
        if weight_decay:
            p.mul_(1 - lr * weight_decay)
        for (index, _), gradient, weight in zip(held, gradients, weights, strict=True):
            size = units[index].size
            rate = (sums[index][-1] / size).sqrt().clamp_(min=LEAST_RMS) * min(lr, step**-0.5)
            weight.addcmul_(gradient, rate / (moved[index] / size).sqrt().clamp_(min=1.0), value=-1)

    def _units_of(self, p: Tensor) -> list[Unit]:
        if p in self._units:
            return self._units[p]
        unit = Unit("", tuple(p.shape), [Piece("", 0, p.numel(), 0, 0)], self.state[p])
        unit.begin(p.device)
        return [unit]
