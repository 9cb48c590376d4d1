"""Converts the pieces that a rank holds to whole tensors by name, and back. Uses torch.distributed, but not DeepSpeed.

ZeRO keeps a rank's share of the fp32 weights in a few flat tensors, and every optimizer state in flat tensors of the
same layout. A `Piece` is the position of a slice of a parameter in them. The pieces of all ranks determine, without
further communication, which rank owns (and writes) each whole tensor, and which slices each rank sends to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """`flats[flat][offset : offset + stop - start]` is `parameter.flatten()[start:stop]`."""

    name: str
    start: int
    stop: int
    flat: int
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        return self.stop - self.start

    def cut(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the view of this piece in its own flat tensor."""
        return flat.view(-1)[self.offset : self.offset + self.size]

    def of(self, flats: list[torch.Tensor]) -> torch.Tensor:
        """Return the view of this piece in `flats`."""
        return self.cut(flats[self.flat])


Layout = list[list[Piece]]
"""The pieces of each rank."""


def assign_owners(layout: Layout, shapes: Shapes) -> dict[str, int]:
    """Return for each parameter the rank that assembles and writes it, balanced by number of elements.

    A parameter that one rank holds whole stays there (with ZeRO 1 and 2 nearly all, in equal shares by construction);
    split ones go, largest first, to the rank with the fewest elements so far.
    """
    owners: dict[str, int] = {}
    load = [0] * len(layout)
    for rank, pieces in enumerate(layout):
        for piece in pieces:
            size = prod(shapes[piece.name])
            if piece.size == size and piece.name not in owners:
                owners[piece.name] = rank
                load[rank] += size
    for name in sorted(shapes.keys() - owners.keys(), key=lambda n: (-prod(shapes[n]), n)):
        rank = min(range(len(load)), key=lambda r: (load[r], r))
        owners[name] = rank
        load[rank] += prod(shapes[name])
    return owners


class Assembler:
    """Assembles whole tensors from all ranks' pieces; every rank gets those it owns."""

    def __init__(self, layout: Layout, shapes: Shapes, rank: int) -> None:
        self.layout, self.shapes, self.rank = layout, shapes, rank
        self.owners = assign_owners(layout, shapes)
        self.world_size = len(layout)

    def _message(self, source: int, target: int) -> list[Piece]:
        """Return the pieces that `source` sends to `target`, in order."""
        return [piece for piece in self.layout[source] if self.owners[piece.name] == target]

    def assemble(self, flats: list[torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
        """Return the tensors that this rank owns, fp32 in their shapes, from all ranks' `flats` (CPU).

        Collective over `group` (gloo). A tensor that this rank holds whole is a view of `flats`, not a copy.
        """
        outgoing, incoming, requests = [], {}, []
        for other in range(self.world_size):
            if other == self.rank:
                continue
            message = self._message(self.rank, other)
            if message:
                outgoing.append(torch.cat([piece.of(flats) for piece in message]))
                requests.append(dist.isend(outgoing[-1], other, group=group))
            expected = sum(piece.size for piece in self._message(other, self.rank))
            if expected:
                incoming[other] = torch.empty(expected, dtype=flats[0].dtype)
                requests.append(dist.irecv(incoming[other], other, group=group))
        for request in requests:
            assert request is not None, "this rank is not in the group"
            request.wait()
        whole: dict[str, torch.Tensor] = {}
        self._fill(whole, self._message(self.rank, self.rank), lambda piece: piece.of(flats))
        for other, buffer in incoming.items():
            message = self._message(other, self.rank)
            chunks = dict(zip(message, buffer.split([piece.size for piece in message]), strict=True))
            self._fill(whole, message, chunks.__getitem__)
        return {name: tensor.view(self.shapes[name]) for name, tensor in whole.items()}

    def _fill(
        self, whole: dict[str, torch.Tensor], message: Iterable[Piece], value: Callable[[Piece], torch.Tensor]
    ) -> None:
        for piece in message:
            size = prod(self.shapes[piece.name])
            if piece.size == size:
                whole[piece.name] = value(piece)
                continue
            if piece.name not in whole:
                whole[piece.name] = torch.empty(size, dtype=torch.float32)
            whole[piece.name][piece.start : piece.stop].copy_(value(piece))


def scatter(read: Callable[[str], torch.Tensor], pieces: list[Piece], flats: list[torch.Tensor]) -> None:
    """Fill this rank's flat tensors from whole tensors; `read(name)` returns the parameter's value or state."""
    for piece in pieces:
        piece.of(flats).copy_(read(piece.name).reshape(-1)[piece.start : piece.stop])
