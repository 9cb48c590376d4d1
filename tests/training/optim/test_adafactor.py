"""Our Adafactor compared with torch's, and on pieces compared with whole parameters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from training.optim.adafactor import Adafactor
from training.optim.base import Sharding
from training.optim.pieces import Piece

SHAPES = {"matrix": (7, 5), "vector": (6,), "kernel": (4, 3, 2, 2)}


def gradients() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        yield {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def start(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


def whole(weight_decay: float = 0.0) -> dict[str, torch.Tensor]:
    weights = {name: torch.nn.Parameter(start(name)) for name in SHAPES}
    optimizer = Adafactor(weights.values(), lr=0.1, weight_decay=weight_decay)
    for drawn in gradients():
        for name, parameter in weights.items():
            parameter.grad = drawn[name].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in weights.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_matrices_and_vectors_are_updated_as_by_torch(weight_decay: float) -> None:
    """Kernels too, once torch is given the matrix as which they are factored."""
    weights = {name: torch.nn.Parameter(start(name).flatten(1) if name == "kernel" else start(name)) for name in SHAPES}
    optimizer = torch.optim.Adafactor(weights.values(), lr=0.1, weight_decay=weight_decay)
    for drawn in gradients():
        for name, parameter in weights.items():
            parameter.grad = drawn[name].view_as(parameter)
        optimizer.step()
    for name, mine in whole(weight_decay).items():
        assert torch.allclose(mine, weights[name].view_as(mine), rtol=1e-5, atol=1e-6), name


def test_pieces_are_updated_as_the_whole() -> None:
    """Everything in one flat tensor, in pieces that begin and end inside rows, with gaps between."""
    pieces, offset = [], 2
    for name, shape in SHAPES.items():
        size, at = torch.Size(shape).numel(), 0
        for length in (3, 9, size):
            stop = min(size, at + length)
            if stop > at:
                pieces.append(Piece(name, at, stop, 0, offset))
                offset, at = offset + stop - at + 1, stop
    flat = torch.nn.Parameter(torch.full((offset,), 7.0))
    optimizer = Adafactor([flat], lr=0.1)
    optimizer.shard(Sharding([flat], [pieces], SHAPES, 0))
    with torch.no_grad():
        for piece in pieces:
            piece.of([flat]).copy_(start(piece.name).flatten()[piece.start : piece.stop])
    for drawn in gradients():
        flat.grad = torch.ones_like(flat)
        for piece in pieces:
            piece.of([flat.grad]).copy_(drawn[piece.name].flatten()[piece.start : piece.stop])
        optimizer.step()
    wanted = whole()
    for piece in pieces:
        values = wanted[piece.name].flatten()[piece.start : piece.stop]
        assert torch.allclose(piece.of([flat]), values, rtol=1e-5, atol=1e-6), piece
    assert flat[0].item() == 7.0, "what is no piece stays"
    kinds = {name: sorted(states) for name, states in optimizer.whole_states().items()}
    assert kinds == {"matrix": ["col_var", "row_var"], "vector": ["variance"], "kernel": ["col_var", "row_var"]}
