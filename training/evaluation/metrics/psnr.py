"""Peak signal-to-noise ratio of 8-bit pictures."""

from __future__ import annotations

import numpy as np


def psnr(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return 10 log10(255^2 / mean squared error) per picture, in dB.

    Args:
        pictures, truth: (N, ...), of equal shape, uint8 or floating-point, 0 to 255.

    Returns:
        float64 (N,); infinite for identical pictures.

    Raises:
        ValueError: the shapes differ.
    """
    if pictures.shape != truth.shape:
        raise ValueError(f"pictures of different shape: {pictures.shape} and {truth.shape}")
    difference = pictures.astype(np.float64) - truth.astype(np.float64)
    error = np.square(difference).reshape(len(pictures), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)
