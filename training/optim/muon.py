"""Muon (Jordan et al. 2024): the momentum of each matrix, orthogonalised, is its update; AdamW moves the rest.

A convolution (O, I, h, w) counts as the matrix (O, I h w). Matrices with a side below LEAST_SIDE are left to AdamW:
the first and the last convolution, as the authors advise, and low-rank adapters. Updates are scaled by 0.2
sqrt(max(rows, columns)), which gives them the size of AdamW's, so both share learning rate and weight decay (Liu et al.
2025, "Muon is scalable for LLM training").

ZeRO hands an optimizer flat slices, but a slice of a matrix cannot be orthogonalised. A matrix that lies in several
processes is added up from its slices, orthogonalised by one of them, and handed to all; each keeps what it holds.
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
"""Of the quintic iteration, chosen by its authors for its slope at zero: singular values end between 0.68 and 1.14."""
CHUNK = 1 << 26
"""Values of cut matrices that are sent together."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is moved by an orthogonalised update."""
    return len(shape) > 1 and min(shape[0], columns_of(tuple(shape))) >= LEAST_SIDE


def orthogonalised(matrix: Tensor, iterations: int) -> Tensor:
    """The nearest semi-orthogonal matrix U V^T, about, of a matrix U S V^T (Newton-Schulz iteration). On a GPU in
    bf16, for which the iteration was made, else in fp32. A zero matrix stays zero."""
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
    """The update of a parameter of this shape, flat: to be subtracted times the learning rate."""
    rows, columns = shape[0], columns_of(shape)
    return orthogonalised(momentum.view(rows, columns), iterations).reshape(-1) * (0.2 * sqrt(max(rows, columns)))


@dataclass
class MuonPart:
    """One parameter of a tensor of this process."""

    name: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    """Those that this process holds."""
    owner: int = -1
    """The process that orthogonalises it, where several hold pieces; -1: one holds it whole."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """`variance` of what AdamW moves: all values, on every process."""

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


class Muon(TrainOptimizer):
    """See above. `shard` says which pieces the tensors hold; without it they are whole parameters."""

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
        """Takes up the pieces that this process holds, and says who orthogonalises which cut matrix: in turn, the
        largest first."""
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
        """The second moments of what AdamW moves."""
        return {} if is_matrix(shape) else {"variance": prod(shape)}

    def whole_states(self) -> dict[str, dict[str, Tensor]]:
        """See TrainOptimizer.whole_states."""
        return {part.name: part.state for parts in self._parts.values() for part in parts if part.state}

    def update(self) -> None:
        """One update of all tensors that have a gradient (which is overwritten)."""
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
        """AdamW. Every process keeps all second moments of these few values, so their squares are added up."""
        (beta1, beta2), step = group["betas"], float(self.state[p]["step"])
        squares = torch.zeros(sum(part.size for part in parts), device=p.device)
        if not len(squares):
            return
        for part, own in zip(parts, squares.split([part.size for part in parts]), strict=True):
            for piece in part.pieces:
                own[piece.start : piece.stop] = _cut(p.grad, piece).square()
        self._add_up(squares)
        for part, own in zip(parts, squares.split([part.size for part in parts]), strict=True):
            part.state["variance"].lerp_(own, 1 - beta2)
            for piece in part.pieces:
                mean = _cut(self.state[p]["exp_avg"], piece).lerp_(_cut(p.grad, piece), 1 - beta1)
                root = (part.state["variance"][piece.start : piece.stop] / (1 - beta2**step)).sqrt_()
                rate = group["lr"] / (1 - beta1**step)
                _cut(p, piece).addcdiv_(mean, root.add_(group["eps"]), value=-rate)

    def _by_matrix(self, p: Tensor, parts: list[MuonPart], group: dict[str, Any]) -> None:
        """Nesterov's momentum, orthogonalised."""
        share, iterations, lr = group["momentum"], group["iterations"], group["lr"]
        for part in parts:
            for piece in part.pieces:
                gradient = _cut(p.grad, piece)
                momentum = _cut(self.state[p]["exp_avg"], piece).lerp_(gradient, 1 - share)
                gradient.lerp_(momentum, share)
        for part in parts:
            if part.owner < 0 and part.pieces:
                (piece,) = part.pieces
                update = muon_update(_cut(p.grad, piece), part.shape, iterations)
                _cut(p, piece).sub_(update, alpha=lr)
        for some in _chunks([part for part in parts if part.owner >= 0]):
            sizes = [part.size for part in some]
            whole = torch.zeros(sum(sizes), device=p.device)
            for part, values in zip(some, whole.split(sizes), strict=True):
                for piece in part.pieces:
                    values[piece.start : piece.stop] = _cut(p.grad, piece)
            self._add_up(whole)
            for part, values in zip(some, whole.split(sizes), strict=True):
                mine = part.owner == self._rank
                values.copy_(muon_update(values, part.shape, iterations)) if mine else values.zero_()
            self._add_up(whole)
            for part, values in zip(some, whole.split(sizes), strict=True):
                for piece in part.pieces:
                    _cut(p, piece).sub_(values[piece.start : piece.stop], alpha=lr)

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
    """Runs of parts with at most CHUNK values together, or one larger part."""
    some: list[MuonPart] = []
    for part in parts:
        if some and sum(p.size for p in some) + part.size > CHUNK:
            yield some
            some = []
        some.append(part)
    if some:
        yield some


def _cut(tensor: Tensor | None, piece: Piece) -> Tensor:
    assert tensor is not None
    return tensor.view(-1)[piece.offset : piece.offset + piece.size]
