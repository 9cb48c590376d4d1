"""Muon (Jordan et al. 2024): updates each matrix by its orthogonalised momentum, and everything else by AdamW.

A convolution (O, I, h, w) is treated as the matrix (O, I h w). Matrices with a side below LEAST_SIDE are left to AdamW:
the first and the last convolution, as the authors advise, and low-rank adapters. Updates are scaled by 0.2
sqrt(max(rows, columns)), which gives them the size of AdamW's, so both share learning rate and weight decay (Liu et al.
2025, "Muon is scalable for LLM training").

ZeRO gives an optimizer flat slices, but a slice of a matrix cannot be orthogonalised. A matrix that is split over
several processes is gathered from its slices, orthogonalised by one process, and sent to all; each uses its own slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from training.config.experiment import OptimizerConfig
from training.config.optimizers import options_of
from training.optim.base import Sharding, TrainOptimizer, columns_of
from training.optim.pieces import Piece

LEAST_SIDE = 32
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by its authors for a steep slope at zero: singular values end between
0.68 and 1.14."""
CHUNK = 1 << 26
"""Number of values of split matrices to send together."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Return whether a parameter of this shape gets an orthogonalised update."""
    return len(shape) > 1 and min(shape[0], columns_of(tuple(shape))) >= LEAST_SIDE


def orthogonalised(matrix: Tensor, iterations: int) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix U V^T of a matrix U S V^T by Newton-Schulz iteration: on a GPU in
    bf16, for which the iteration was designed, otherwise in fp32. A zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-30)
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def muon_update(momentum: Tensor, shape: tuple[int, ...], iterations: int) -> Tensor:
    """Return the flat update of a parameter of this shape, to be multiplied by the learning rate and subtracted."""
    rows, columns = shape[0], columns_of(shape)
    return orthogonalised(momentum.view(rows, columns), iterations).reshape(-1) * (0.2 * sqrt(max(rows, columns)))


@dataclass
class MuonPart:
    """One parameter in a tensor of this process."""

    name: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    """The pieces that this process holds."""
    owner: int = -1
    """The process that orthogonalises it, if several hold pieces; -1: one process holds it whole."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """For parameters updated by AdamW: `variance`, all values, on every process."""

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


class Muon(TrainOptimizer):
    """See the module docstring. `shard` sets the pieces that tensors hold; without it they are whole parameters."""

    SLICED = ("exp_avg",)
    WHOLE = ("variance",)

    @classmethod
    def build(cls, parameters: Iterable[Tensor], config: OptimizerConfig, fused: bool) -> Muon:
        """See TrainOptimizer.build."""
        beta1, beta2 = config.betas
        options = options_of(config)
        return cls(
            parameters,
            {
                "lr": config.lr,
                "weight_decay": config.weight_decay,
                "betas": (beta1, beta2),
                "eps": config.eps,
                "momentum": options["momentum"],
                "iterations": int(options["iterations"]),
            },
        )

    def __init__(self, params: Iterable[Tensor], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._parts: dict[Tensor, list[MuonPart]] = {}
        self._add_up: Callable[[Tensor], object] = lambda sums: None
        self._rank = 0

    def shard(self, sharding: Sharding) -> None:
        """Set the pieces that this process holds, and assign split matrices to processes for orthogonalisation: in
        turn, the largest first."""
        self._add_up, self._rank = sharding.add_up, sharding.rank
        for index, flat in enumerate(sharding.flats):
            holders: dict[str, set[int]] = {}
            for rank, pieces in enumerate(sharding.layout):
                for piece in pieces:
                    if piece.flat == index:
                        holders.setdefault(piece.name, set()).add(rank)
            cut = sorted((name for name in holders if len(holders[name]) > 1), key=lambda n: -prod(sharding.shapes[n]))
            owners = {name: i % len(sharding.layout) for i, name in enumerate(cut)}
            own = [piece for piece in sharding.layout[sharding.rank] if piece.flat == index]
            self._parts[flat] = [
                MuonPart(name, sharding.shapes[name], [p for p in own if p.name == name], owners.get(name, -1))
                for name in sorted(holders)
            ]
            for part in self._parts[flat]:
                _begin_variance(part, flat.device)

    @classmethod
    def whole_lengths(cls, shape: tuple[int, ...]) -> dict[str, int]:
        """Second moments of parameters updated by AdamW."""
        return {} if is_matrix(shape) else {"variance": prod(shape)}

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        """See TrainOptimizer.whole_states."""
        return {part.name: part.state for parts in self._parts.values() for part in parts if part.state}

    def update(self) -> None:
        """Update all tensors that have a gradient; the gradient is overwritten."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "exp_avg" not in self.state[p]:
                    self.begin(p)
                self.state[p]["step"] += 1
                parts = self._parts_of(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                self._by_value(p, [part for part in parts if not is_matrix(part.shape)], group)
                self._by_matrix(p, [part for part in parts if is_matrix(part.shape)], group)

    def _by_value(self, p: Tensor, parts: list[MuonPart], group: dict[str, Any]) -> None:
        """Update by AdamW. Every process keeps all second moments of these few values, so their squares are reduced
        over the processes."""
        (beta1, beta2), step = group["betas"], float(self.state[p]["step"])
        assert p.grad is not None
        squares = torch.zeros(sum(part.size for part in parts), device=p.device)
        if not len(squares):
            return
        for part, own in zip(parts, squares.split([part.size for part in parts]), strict=True):
            for piece in part.pieces:
                own[piece.start : piece.stop] = piece.cut(p.grad).square()
        self._add_up(squares)
        for part, own in zip(parts, squares.split([part.size for part in parts]), strict=True):
            part.state["variance"].lerp_(own, 1 - beta2)
            for piece in part.pieces:
                mean = piece.cut(self.state[p]["exp_avg"]).lerp_(piece.cut(p.grad), 1 - beta1)
                root = (part.state["variance"][piece.start : piece.stop] / (1 - beta2**step)).sqrt_()
                rate = group["lr"] / (1 - beta1**step)
                piece.cut(p).addcdiv_(mean, root.add_(group["eps"]), value=-rate)

    def _by_matrix(self, p: Tensor, parts: list[MuonPart], group: dict[str, Any]) -> None:
        """Update by orthogonalised Nesterov momentum."""
        share, iterations, lr = group["momentum"], group["iterations"], group["lr"]
        assert p.grad is not None
        for part in parts:
            for piece in part.pieces:
                gradient = piece.cut(p.grad)
                momentum = piece.cut(self.state[p]["exp_avg"]).lerp_(gradient, 1 - share)
                gradient.lerp_(momentum, share)
        for part in parts:
            if part.owner < 0 and part.pieces:
                (piece,) = part.pieces
                update = muon_update(piece.cut(p.grad), part.shape, iterations)
                piece.cut(p).sub_(update, alpha=lr)
        for some in _chunks([part for part in parts if part.owner >= 0]):
            sizes = [part.size for part in some]
            whole = torch.zeros(sum(sizes), device=p.device)
            for part, values in zip(some, whole.split(sizes), strict=True):
                for piece in part.pieces:
                    values[piece.start : piece.stop] = piece.cut(p.grad)
            self._add_up(whole)
            for part, values in zip(some, whole.split(sizes), strict=True):
                mine = part.owner == self._rank
                values.copy_(muon_update(values, part.shape, iterations)) if mine else values.zero_()
            self._add_up(whole)
            for part, values in zip(some, whole.split(sizes), strict=True):
                for piece in part.pieces:
                    piece.cut(p).sub_(values[piece.start : piece.stop], alpha=lr)

    def _parts_of(self, p: Tensor) -> list[MuonPart]:
        if p in self._parts:
            return self._parts[p]
        part = MuonPart("", tuple(p.shape), [Piece("", 0, p.numel(), 0, 0)], state=self.state[p])
        _begin_variance(part, p.device)
        return [part]


def _begin_variance(part: MuonPart, device: torch.device) -> None:
    if not is_matrix(part.shape):
        part.state.setdefault("variance", torch.zeros(part.size, device=device))


def _chunks(parts: list[MuonPart]) -> Iterator[list[MuonPart]]:
    """Yield consecutive parts with at most CHUNK values in total, or one larger part."""
    some: list[MuonPart] = []
    for part in parts:
        if some and sum(p.size for p in some) + part.size > CHUNK:
            yield some
            some = []
        some.append(part)
    if some:
        yield some
