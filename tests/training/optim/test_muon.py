"""Muon compared with its definition by the singular value decomposition, and on pieces compared with whole
parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from training.config.experiment import OptimizerConfig
from training.optim.base import Sharding
from training.optim.muon import COEFFICIENTS, Muon, is_matrix, orthogonalised
from training.optim.pieces import Piece

SHAPES = {"matrix": (34, 40), "kernel": (36, 4, 3, 3), "vector": (6,), "first": (40, 3, 3, 3)}


def gradients(seed: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        yield {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def start(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


def built(parameters: list[torch.Tensor]) -> Muon:
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.3, betas=[0.9, 0.99])
    return Muon.build(parameters, config, fused=False)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 33)])
def test_the_update_is_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    """The iteration keeps both bases and moves each singular value by the polynomial, five times; near one in the
    end."""
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), False)
    values = torch.linspace(0.05, 1.0, min(shape))
    a, b, c = COEFFICIENTS
    wanted = values / values.norm()
    for _ in range(5):
        wanted = a * wanted + b * wanted**3 + c * wanted**5
    found = orthogonalised(7 * left @ values.diag() @ right, 5)
    torch.testing.assert_close(found, left @ wanted.diag() @ right, atol=2e-4, rtol=0)
    assert wanted.min() > 0.65 and wanted.max() < 1.2
    assert torch.equal(orthogonalised(torch.zeros(shape), 5), torch.zeros(shape))


def dense() -> dict[str, torch.Tensor]:
    """Written out: Nesterov's momentum of each matrix, orthogonalised; torch's AdamW for the rest."""
    weights = {name: start(name) for name in SHAPES}
    rest = {name: torch.nn.Parameter(start(name)) for name in ("vector", "first")}
    adam = torch.optim.AdamW(rest.values(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.3)
    momenta = {name: torch.zeros(SHAPES[name]).flatten(1) for name in ("matrix", "kernel")}
    for drawn in gradients():
        for name, momentum in momenta.items():
            gradient = drawn[name].flatten(1)
            momentum.mul_(0.95).add_(0.05 * gradient)
            update = orthogonalised(0.05 * gradient + 0.95 * momentum, 5)
            scale = 0.2 * math.sqrt(max(update.shape))
            weights[name] = weights[name] * (1 - 0.1 * 0.3) - 0.1 * scale * update.view(SHAPES[name])
        for name, parameter in rest.items():
            parameter.grad = drawn[name].clone()
        adam.step()
    return {**weights, **{name: parameter.detach() for name, parameter in rest.items()}}


def test_whole_parameters_are_updated_by_the_definition() -> None:
    assert [name for name, shape in SHAPES.items() if is_matrix(shape)] == ["matrix", "kernel"]
    weights = {name: torch.nn.Parameter(start(name)) for name in SHAPES}
    optimizer = built(list(weights.values()))
    for drawn in gradients():
        for name, parameter in weights.items():
            parameter.grad = drawn[name].clone()
        optimizer.step()
    for name, wanted in dense().items():
        torch.testing.assert_close(weights[name].detach(), wanted, atol=1e-5, rtol=1e-5)


def test_pieces_on_two_processes_are_updated_as_the_whole() -> None:
    """Both processes run here, in threads, each with one flat tensor; kernels and matrices are cut inside rows."""
    import threading

    layout: list[list[Piece]] = [[], []]
    ends = [2, 0]
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        middle = size if name == "matrix" else size * 2 // 5
        for rank, (a, b) in enumerate(((0, middle), (middle, size))):
            if b > a:
                layout[rank].append(Piece(name, a, b, 0, ends[rank]))
                ends[rank] += b - a + 1
    barrier, sums = threading.Barrier(2), [torch.zeros(0), torch.zeros(0)]
    results: list[torch.Tensor] = [torch.zeros(0), torch.zeros(0)]
    states: list[dict[str, list[str]]] = [{}, {}]

    def process(rank: int) -> None:
        def add_up(values: torch.Tensor) -> None:
            sums[rank] = values.clone()
            barrier.wait(30)
            values.copy_(sums[0] + sums[1])
            barrier.wait(30)

        flat = torch.nn.Parameter(torch.full((ends[rank] + 1,), 7.0))
        optimizer = built([flat])
        optimizer.shard(Sharding([flat], layout, SHAPES, rank, add_up))
        with torch.no_grad():
            for piece in layout[rank]:
                piece.of([flat]).copy_(start(piece.name).flatten()[piece.start : piece.stop])
        for drawn in gradients():
            flat.grad = torch.zeros_like(flat)
            for piece in layout[rank]:
                piece.of([flat.grad]).copy_(drawn[piece.name].flatten()[piece.start : piece.stop])
            optimizer.step()
        results[rank] = flat.detach()
        states[rank] = {name: sorted(kinds) for name, kinds in optimizer.whole_states().items()}

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    wanted = dense()
    for rank in range(2):
        for piece in layout[rank]:
            values = wanted[piece.name].flatten()[piece.start : piece.stop]
            torch.testing.assert_close(piece.of([results[rank]]), values, atol=1e-5, rtol=1e-5)
        assert states[rank] == {"vector": ["variance"], "first": ["variance"]}


def test_the_bytes_of_muons_states() -> None:
    assert Muon.state_bytes(list(SHAPES.values()), 1000) == 4 * 1000 + 4 * (6 + 40 * 27)
