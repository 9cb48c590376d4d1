"""AdamW with packed moments: near AdamW, and exact through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from training.optim.adamw8bit import BLOCK, AdamW8bit, Packed, places

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_has_256_distinct_values_in_order(signed: bool) -> None:
    table = places(signed)
    assert len(table) == len(set(table)) == 256 and list(table) == sorted(table)
    assert table[-1] == 1.0 and table[0] == (-1.0 if signed else 0.0) and 0.0 in table


@pytest.mark.parametrize("signed", [True, False])
def test_packing_is_near_and_packing_again_is_exact(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5 * BLOCK + 17, generator=generator) * torch.logspace(-6, 2, 5 * BLOCK + 17)
    values = values if signed else values.abs()
    packed = Packed(len(values), signed, torch.device("cpu"))
    assert torch.equal(packed.get(0, len(values)), torch.zeros(len(values)))
    packed.put(0, values)
    once = packed.get(0, len(values))
    blocks = torch.nn.functional.pad(values, (0, BLOCK - 17)).view(-1, BLOCK)
    largest = blocks.abs().amax(1).repeat_interleave(BLOCK)[: len(values)]
    assert ((once - values).abs() <= 0.01 * largest).all() and (once - values).abs().mean() < 0.02 * values.abs().mean()
    packed.put(0, once)
    assert torch.equal(packed.get(0, len(values)), once)


def test_adamw8bit_learns_as_adamw_with_a_quarter_of_the_memory() -> None:
    """On the same quadratic problem: nearly the same weights, and moments a quarter of the size."""
    torch.manual_seed(0)
    target, start = torch.randn(40, 30), torch.zeros(40, 30)
    ends = []
    for kind in (torch.optim.AdamW, AdamW8bit):
        weights = torch.nn.Parameter(start.clone())
        optimizer = kind([weights], **SETTINGS)  # type: ignore[operator]
        for step in range(60):
            noise = torch.randn(40, 30, generator=torch.Generator().manual_seed(step))
            weights.grad = weights.detach() - target + 0.3 * noise
            optimizer.step()
        ends.append(weights.detach())
    assert (ends[0] - ends[1]).norm() < 0.03 * ends[0].norm()
    packed = optimizer._packed[weights]["exp_avg"]
    assert packed.codes.nbytes + packed.scale.nbytes < 0.3 * 4 * packed.size


def test_exporting_and_importing_moments_changes_nothing() -> None:
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.ones(7, 100)) for _ in range(2))
    one, other = AdamW8bit([first], **SETTINGS), AdamW8bit([second], **SETTINGS)  # type: ignore[arg-type]
    for _ in range(3):
        first.grad = torch.randn(7, 100)
        one.step()
    with torch.no_grad():
        second.copy_(first)
    other.state[second]["step"] = one.state[first]["step"].clone()
    for kind in AdamW8bit.SLICED:
        other.set_sliced(second, kind, one.sliced(first, kind))
    for _ in range(2):
        first.grad = torch.randn(7, 100)
        second.grad = first.grad.clone()
        one.step()
        other.step()
    assert torch.equal(first, second)
