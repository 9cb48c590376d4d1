"""The Frechet distance of 2,048 features against scipy's matrix square root, on the same moments.

python -m benchmarks.evaluation [width=2048] [count=5000]
"""

from __future__ import annotations

import sys
import time

import numpy as np

from training.evaluation.metrics.frechet import Moments, frechet_distance, frechet_figure
from training.evaluation.metrics.kernels import kid


def timed(call):  # type: ignore[no-untyped-def]
    """(seconds, what the call returned)."""
    began = time.perf_counter()
    value = call()
    return time.perf_counter() - began, value


def main(width: int = 2048, count: int = 5000) -> None:
    """Prints seconds, the ratio, and how far the two values are apart."""
    import scipy.linalg

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / width**0.5 for _ in range(2))
    a, b = Moments.of(x), Moments.of(y)
    ours, value = timed(lambda: frechet_distance(a, b))
    theirs, root = timed(lambda: scipy.linalg.sqrtm(a.covariance @ b.covariance))
    shift = a.mean - b.mean
    expected = float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real))
    print(f"frechet_distance: {ours:.2f} s, scipy.linalg.sqrtm: {theirs:.2f} s, ratio {theirs / ours:.1f}")
    print(f"values {value:.10g} and {expected:.10g}, relative difference {abs(value / expected - 1):.1e}")
    print(f"with its interval (frechet_figure): {timed(lambda: frechet_figure(x, y))[0]:.2f} s")
    print(f"KID of {count} and {count} pictures with its standard error: {timed(lambda: kid(x, y))[0]:.2f} s")


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (word.split("=") for word in sys.argv[1:])})
