"""A perceptual loss on the estimate of x0: P-DINO of PixelGen (Ma et al. 2026, arXiv 2602.02493)."""

from __future__ import annotations

from torch import Tensor

from training.config.features import PerceptualConfig
from training.model.alignment import token_distance


def perceptual_term(seen: Tensor, wanted: Tensor, log_snr: Tensor, config: PerceptualConfig) -> Tensor:
    """What is added to the loss of each sample, (B,): weight times the mean over patches of 1 - cosine between the
    features of the estimated and of the clean picture, (B, N, D) each; an exact zero at log-SNRs (B,) below
    `log_snr_above`, where the estimate is a mean of many pictures."""
    counts = (log_snr >= config.log_snr_above).to(seen.dtype)
    return config.weight * counts * token_distance(seen, wanted)
