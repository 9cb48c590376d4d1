"""Counter-based random numbers: a pure function of (seed, position, stream), the same on any device and rank count.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written in int64 tensors whose
values stay below 2^50, so that CPU and GPU compute the same integers. Uniforms are bit-identical everywhere; normals
agree up to the rounding of the device's log, sqrt and cos.

Counter words: (block, position low, position high, stream | sub << 8); key: the two halves of the seed.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """What a random number is used for; no two uses share a stream. Results depend on the values: never renumber."""

    TIME = 1
    NOISE = 2
    TEXT_DROP = 3
    AUG_LEVEL = 4
    AUG_NOISE = 5
    SAMPLE_START = 6
    SAMPLE_STEP = 7
    SAMPLE_AUG = 8


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a * m for 32-bit a and m, by 16-bit halves of m, so that no product overflows
    int64."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four int64 tensors of 32 random bits each, from a counter of four 32-bit words (broadcast) and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        h0, l0 = _multiply(c0, MULTIPLIERS[0])
        h1, l1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def bits(seed: int, positions: Tensor, stream: int, count: int, sub: int = 0) -> Tensor:
    """Return random integers in [0, 2^32), int64 (B, count). Other arguments as for `uniform`."""
    positions = positions.to(torch.int64)[:, None]
    blocks = torch.arange((count + 3) // 4, device=positions.device)[None, :]
    word = torch.full_like(positions, (stream + (sub << 8)) & MASK)
    zero = torch.zeros_like(blocks)
    counter = (blocks, (positions & MASK) + zero, ((positions >> 32) & MASK) + zero, word + zero)
    words = torch.stack(philox(counter, (seed & MASK, (seed >> 32) & MASK)), dim=-1)
    return words.flatten(1)[:, :count]


def uniform(seed: int, positions: Tensor, stream: int, shape: tuple[int, ...] = (), *, sub: int = 0) -> Tensor:
    """Return uniform random numbers in [0, 1), multiples of 2^-24, fp32 (B, *shape).

    Args:
        seed: any integer of up to 64 bits.
        positions: int64 (B,), the global sample positions; each row depends on its own position only.
        stream: what the number is used for (`Stream`).
        shape: shape of one sample's numbers.
        sub: index of a repeated use of the stream (a sampler's step), 0 <= sub < 2^24.
    """
    drawn = bits(seed, positions, stream, math.prod(shape), sub)
    return ((drawn >> 8).to(torch.float32) * 2.0**-24).view(-1, *shape)


def normal(seed: int, positions: Tensor, stream: int, shape: tuple[int, ...] = (), *, sub: int = 0) -> Tensor:
    """Return standard normal random numbers, fp32 (B, *shape) (Box-Muller; |value| < 6.8). Arguments as for
    `uniform`."""
    count = math.prod(shape)
    half = (count + 1) // 2
    drawn = bits(seed, positions, stream, 2 * half, sub)
    radius = ((drawn[:, :half].to(torch.float32) + 0.5) * 2.0**-32).log().mul(-2).clamp(min=0).sqrt()
    angle = (drawn[:, half:] >> 8).to(torch.float32) * (2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].reshape(-1, *shape)
