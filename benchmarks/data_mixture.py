"""How far the counts of a mixture deviate from weight x samples, and what assigning a position costs.

python -m benchmarks.data_mixture
"""

from __future__ import annotations

import random
import time
from fractions import Fraction

import numpy as np

from data_pipeline.order.mixture import Shares

WEIGHTINGS = 12
"""Number of random weightings for each number of data sets and lanes."""


def main() -> None:
    """Print one line per number of lanes and data sets."""
    generator = random.Random(0)
    for lanes in (8, 48, 256):
        for sets in (2, 4, 20):
            worst = rounds = seconds = 0.0
            positions = np.arange(200 * lanes)
            for _ in range(WEIGHTINGS):
                weights = [Fraction(generator.randint(1, 100), 100) for _ in range(sets)]
                shares = Shares(lanes, [(0, weights)])
                began = time.process_time()
                datasets, _ = shares.split(positions)
                seconds += time.process_time() - began
                expected = shares.expected(positions)
                for number in range(sets):
                    off = np.abs(np.cumsum((datasets == number) - expected[:, number]))
                    worst, rounds = max(worst, off.max()), max(rounds, off[lanes - 1 :: lanes].max())
            cost = seconds / WEIGHTINGS / len(positions) * 1e6
            print(
                f"{lanes} lanes, {sets} data sets: at most {worst:.1f} samples off, {rounds:.2f} after whole rounds; "
                f"{cost:.2f} us of CPU per position"
            )


if __name__ == "__main__":
    main()
