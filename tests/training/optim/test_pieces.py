from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.optim.pieces import Assembler, Layout, Piece, assign_owners, scatter


def cut(shapes: dict[str, tuple[int, ...]], world: int, per_parameter: bool) -> tuple[Layout, list[int]]:
    """Layouts as ZeRO makes them: one flat tensor cut into equal parts (1, 2), or every parameter cut (3). Also returns
    the flat sizes."""
    layout: Layout = [[] for _ in range(world)]
    if per_parameter:
        sizes = [0] * world
        for name, shape in shapes.items():
            each = -(-prod(shape) // world)
            for rank in range(world):
                start, stop = rank * each, min((rank + 1) * each, prod(shape))
                if stop > start:
                    layout[rank].append(Piece(name, start, stop, 0, sizes[rank]))
                sizes[rank] += each
        return layout, sizes
    share = -(-sum(map(prod, shapes.values())) // world)
    at = 0
    for name, shape in shapes.items():
        for rank in range(world):
            first, last = max(at, rank * share), min(at + prod(shape), (rank + 1) * share)
            if last > first:
                layout[rank].append(Piece(name, first - at, last - at, 0, first - rank * share))
        at += prod(shape)
    return layout, [share] * world


many_shapes = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=5),
    st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
    min_size=1,
    max_size=20,
)


@given(many_shapes, st.integers(1, 5), st.booleans())
def test_pieces_are_scattered_and_gathered(shapes: dict[str, tuple[int, ...]], world: int, cut_each: bool) -> None:
    layout, sizes = cut(shapes, world, cut_each)
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    flats = [[torch.zeros(size)] for size in sizes]
    for rank in range(world):
        scatter(whole.__getitem__, layout[rank], flats[rank])
    again = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for rank in range(world):
        for piece in layout[rank]:
            again[piece.name].view(-1)[piece.start : piece.stop] = piece.of(flats[rank])
    assert all(torch.equal(again[name], whole[name]) for name in shapes)
    owners = assign_owners(layout, shapes)
    assert owners.keys() == shapes.keys() and set(owners.values()) <= set(range(world))
    if world == 1:
        found = Assembler(layout, shapes, 0).assemble(flats[0], None)
        assert all(torch.equal(found[name], whole[name]) for name in shapes)


@given(many_shapes, st.integers(2, 5), st.booleans())
def test_owners_share_the_work_evenly(shapes: dict[str, tuple[int, ...]], world: int, cut_each: bool) -> None:
    """No rank carries more than its even share and one tensor; single numbers, which cannot be cut, stay where they
    are."""
    layout, _ = cut(shapes, world, cut_each)
    load = [0] * world
    for name, rank in assign_owners(layout, shapes).items():
        load[rank] += prod(shapes[name])
    sizes = [prod(shape) for shape in shapes.values()]
    assert max(load) <= -(-sum(sizes) // world) + max(sizes) + sizes.count(1)
