"""The counter-based generator: known answers, independence of batch and rank, moments."""

from __future__ import annotations

import pytest
import torch

from training.diffusion.random import Stream, bits, normal, philox, uniform

F = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((F, F, F, F), (F, F), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], answer: str
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert " ".join(f"{int(word):08x}" for word in philox((c0, c1, c2, c3), key)) == answer


def test_a_row_depends_on_its_position_alone() -> None:
    positions = torch.tensor([5, 2**40 + 7, 0, 123456789])
    whole = normal(11, positions, Stream.NOISE, (3, 5, 5))
    for row, position in enumerate(positions):
        assert torch.equal(whole[row], normal(11, position[None], Stream.NOISE, (3, 5, 5))[0])


def test_seed_position_stream_and_sub_all_matter() -> None:
    at = torch.tensor([1])
    drawn = [
        bits(0, at, Stream.NOISE, 64),
        bits(1, at, Stream.NOISE, 64),
        bits(1 << 32, at, Stream.NOISE, 64),
        bits(0, at + 1, Stream.NOISE, 64),
        bits(0, at + (1 << 32), Stream.NOISE, 64),
        bits(0, at, Stream.TIME, 64),
        bits(0, at, Stream.NOISE, 64, sub=1),
    ]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not (first == second).any()


def test_uniform_has_the_moments_and_the_range() -> None:
    u = uniform(3, torch.arange(500), Stream.TIME, (400,)).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.002 and abs(u.var() - 1 / 12) < 0.001


def test_normal_has_four_moments_and_odd_shapes() -> None:
    n = normal(3, torch.arange(500), Stream.NOISE, (401,)).double()
    assert n.shape == (500, 401)
    assert abs(n.mean()) < 0.01 and abs(n.var() - 1) < 0.02
    assert abs((n**3).mean()) < 0.04 and abs((n**4).mean() - 3) < 0.1
    assert abs((n[:, :200] * n[:, 201:]).mean()) < 0.01  # the two halves of Box-Muller


def test_neighbouring_positions_and_streams_are_uncorrelated() -> None:
    a = normal(0, torch.arange(2000), Stream.NOISE, (64,))
    b = normal(0, torch.arange(2000), Stream.AUG_NOISE, (64,))
    assert abs((a * b).mean()) < 0.01
    assert abs((a[1:] * a[:-1]).mean()) < 0.01
