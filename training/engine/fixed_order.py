"""Gradients, losses and norms that are bit-identical on any number of ranks (`train.deterministic_reduction`).

The micro-batches of the global batch are the leaves of one binary tree, whichever rank computes them: leaf k is
micro-batch k of the global batch, and the same pairs are always added. A rank adds the pairs that it holds and sends
the few remaining partial sums to the ranks that own their slices, which finish the tree. The gradient norm is a sum
over slices whose borders depend on the number of ranks, so it is computed exactly, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from training.optim.pieces import Layout

Value = TypeVar("Value")
Node = tuple[int, int]
"""(level, index): the sum of the leaves [index 2^level, (index + 1) 2^level)."""


class Tree(Generic[Value]):
    """Sums the leaves 0 to `count` - 1, always in the same pairs, in whatever order they arrive. A node without a
    neighbour (if `count` is not a power of two) moves up unchanged."""

    def __init__(self, count: int, add: Callable[[Value, Value], Value]) -> None:
        self.count, self._add = count, add
        self.nodes: dict[Node, Value] = {}
        """Nodes that wait for their neighbour; once all leaves are in, only the root."""

    def put(self, node: Node, value: Value) -> None:
        """Add the value of a leaf (0, k), or of a complete node."""
        level, index = node
        while (width := -(-self.count >> level)) > 1:
            other = index ^ 1
            if other < width:
                if (level, other) not in self.nodes:
                    break
                pair = self.nodes.pop((level, other)), value
                value = self._add(*(pair if other < index else pair[::-1]))
            level, index = level + 1, index // 2
        self.nodes[level, index] = value

    def root(self) -> Value:
        """Return the sum of all leaves."""
        (value,) = self.nodes.values()
        return value


def partial_sums(rank: int, world_size: int, leaves: int) -> list[Node]:
    """Return the nodes that remain on a rank after it has added the pairs in its share of the leaves."""
    tree: Tree[int] = Tree(leaves, lambda a, b: a + b)
    for leaf in range(rank * leaves // world_size, (rank + 1) * leaves // world_size):
        tree.put((0, leaf), 1)
    return sorted(tree.nodes)


class _Border(torch.autograd.Function):
    """The identity, as a separate node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients


def mark_borders(model: torch.nn.Module) -> None:
    """Put the identity around every module, as ZeRO 3 does with functions of its own.

    If several modules read one tensor (the conditioning vector), autograd then sums the gradients from inside one
    module before adding those from others. Without borders it adds them all one by one: different pairs, and so
    different bits.
    """

    def border(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(border, value))
        return _Border.apply(value) if isinstance(value, torch.Tensor) else value

    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: border(inputs))
        module.register_forward_hook(lambda _, __, output: border(output))


class FixedOrder:
    """The gradient of one step, micro-batch by micro-batch.

    Args:
        leaves: number of micro-batches of the global batch, over all ranks.
        layout: the slices of parameters that each rank updates; together they cover all parameters once.
        rank: this rank.
        group: process group of all ranks; None for a single rank.
    """

    def __init__(self, leaves: int, layout: Layout, rank: int, group: Any, device: str) -> None:
        self.leaves, self.layout, self.rank, self.group, self.device = leaves, layout, rank, group, device
        self._sizes = [sum(piece.size for piece in pieces) for pieces in layout]
        self._nodes = [partial_sums(r, len(layout), leaves) for r in range(len(layout))]
        self._share = leaves // len(layout)
        self.begin()

    def begin(self) -> None:
        """Start a new step."""
        self._tree: Tree[torch.Tensor] = Tree(self.leaves, torch.Tensor.add_)
        self._losses: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, number: int, gradients: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Add this rank's micro-batch `number`: its gradients by name (missing ones are zero) and its mean loss."""
        parts = []
        for pieces in self.layout:
            for piece in pieces:
                gradient = gradients.get(piece.name)
                if gradient is None:
                    parts.append(torch.zeros(piece.size, device=self.device))
                else:
                    parts.append(gradient.reshape(-1)[piece.start : piece.stop].float())
        leaf = self.rank * self._share + number
        self._losses[leaf] = loss.detach().double()
        self._tree.put((0, leaf), torch.cat(parts))

    @torch.no_grad()
    def mean(self) -> torch.Tensor:
        """Return this rank's slices of the mean gradient, concatenated, fp32. Collective."""
        own = self._tree.nodes
        if len(self.layout) > 1:
            own = self._exchange()
        tree: Tree[torch.Tensor] = Tree(self.leaves, torch.Tensor.add_)
        for node in sorted(own):
            tree.put(node, own[node])
        return tree.root().div_(self.leaves)

    def _exchange(self) -> dict[Node, torch.Tensor]:
        """Return this rank's slices of all ranks' partial sums."""
        found: dict[Node, torch.Tensor] = {}
        mine, own = self._sizes[self.rank], self._nodes[self.rank]
        for turn in range(max(map(len, self._nodes))):
            sends = turn < len(own)
            outgoing = self._tree.nodes[own[turn]] if sends else torch.empty(0, device=self.device)
            counts = [mine if turn < len(nodes) else 0 for nodes in self._nodes]
            incoming = torch.empty(sum(counts), device=self.device)
            out_counts = self._sizes if sends else [0] * len(self._sizes)
            dist.all_to_all_single(incoming, outgoing, counts, out_counts, group=self.group)
            for nodes, part in zip(self._nodes, incoming.split(counts), strict=True):
                if turn < len(nodes):
                    found[nodes[turn]] = part
        return found

    def norm(self, gradients: Sequence[torch.Tensor], add_up: Callable[[torch.Tensor | None], list[float]]) -> float:
        """Return the global norm of all ranks' `gradients`, independent of the borders of slices; inf if it is not
        finite. Ends the step. Takes one collective for the largest magnitude, besides `add_up`.

        Args:
            add_up: sums a tensor over the ranks, together with whatever else it has to sum; called with None if the
                norm is not finite.
        """
        peaks, count = peak_of(gradients, self.device), sum(self._sizes)
        if self.group is not None:
            dist.all_reduce(peaks, dist.ReduceOp.MAX, group=self.group)
        peak = float(peaks)
        finite = math.isfinite(peak)
        sums = add_up(exact_squares(gradients, peak, count, self.device) if finite else None)
        self.begin()
        return norm_of(sums, peak, count) if finite else math.inf

    def losses(self) -> torch.Tensor:
        """Return the losses of this rank's micro-batches at their leaves, zeros elsewhere: fp64 (leaves,)."""
        places = torch.zeros(self.leaves, dtype=torch.float64, device=self.device)
        for leaf, loss in self._losses.items():
            places[leaf] = loss
        return places


@torch.no_grad()
def peak_of(tensors: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """Return the largest magnitude, fp64 (1,); inf if a value is not finite."""
    peaks = [torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32).double() for tensor in tensors]
    peak = torch.stack(peaks).max() if peaks else torch.zeros((), dtype=torch.float64)
    return torch.where(peak.isfinite(), peak, math.inf).reshape(1).to(device)


@torch.no_grad()
def exact_squares(tensors: Sequence[torch.Tensor], peak: float, count: int, device: str) -> torch.Tensor:
    """Return the sum of the squares of fp32 values in fixed point, as integers in fp64 (4,) that can be summed over
    ranks in any order; the truncation error is below count^-1 2^-60 of the largest square.

    Args:
        peak: the largest magnitude on any rank, finite.
        count: number of values on all ranks together.
    """
    bits, scale = _bits(count), 2.0 ** -math.frexp(peak)[1]
    sums = torch.zeros(2, dtype=torch.int64, device=device)
    for tensor in tensors:
        square = (tensor.reshape(-1).double() * scale).square_().mul_(2.0**bits)  # 48 of 53 bits: exact
        high = square.floor()
        low = square.sub_(high).mul_(2.0**bits)
        sums += torch.stack([high.long().sum(), low.long().sum()])
    return torch.cat([sums >> 31, sums & (2**31 - 1)]).double()


def norm_of(sums: Sequence[float], peak: float, count: int) -> float:
    """Return the norm from the sums of `exact_squares`."""
    bits = _bits(count)
    high, low = ((int(sums[i]) << 31) + int(sums[2 + i]) for i in range(2))
    return math.ldexp(math.sqrt(math.ldexp((high << bits) + low, -2 * bits)), math.frexp(peak)[1])


def _bits(count: int) -> int:
    """Return the number of bits of each of the two parts of a square, so that sums of `count` of them fit in 62
    bits."""
    return 62 - max(1, count).bit_length()
