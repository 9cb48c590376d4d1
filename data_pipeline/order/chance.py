"""Random numbers as pure functions of (seed, position, stream), with no state to save or share."""

from __future__ import annotations

import hashlib


def hash_bits(seed: int, position: int, stream: str) -> int:
    """Return 64 random bits (BLAKE2b), the same on every machine and in every process.

    Args:
        seed: the run's seed, any integer.
        position: number of samples consumed before this one, or any other counter.
        stream: the purpose of the number; different names give independent numbers.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash_uniform(seed: int, position: int, stream: str) -> float:
    """Return a number in [0, 1) with 53 random bits. Arguments as for `hash_bits`."""
    return (hash_bits(seed, position, stream) >> 11) * 2.0**-53


def hash_below(limit: int, seed: int, position: int, stream: str) -> int:
    """Return an integer in [0, limit), with a bias below limit / 2^64. Other arguments as for `hash_bits`."""
    return hash_bits(seed, position, stream) % limit
