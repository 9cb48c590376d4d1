from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.metrics.psnr import psnr


def test_known_values() -> None:
    truth = np.full((3, 8, 8, 3), 100, dtype=np.uint8)
    pictures = truth.copy()
    pictures[0] += 1
    pictures[1, :4] = 90  # wraps round if computed in uint8
    assert psnr(pictures, truth) == pytest.approx([48.1308, 10 * np.log10(255**2 / 50), np.inf], abs=1e-4)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="different shape"):
        psnr(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))
