"""A perceptual loss on the estimate of x0: P-DINO of PixelGen (Ma et al. 2026, arXiv 2602.02493)."""

from __future__ import annotations

from torch import Tensor

from training.config.features import PerceptualConfig
from training.model.alignment import token_distance


def perceptual_term(seen: Tensor, wanted: Tensor, log_snr: Tensor, config: PerceptualConfig) -> Tensor:
    """Return the term to add to each sample's loss, (B,): weight times 1 - cosine similarity, averaged over patches,
    between the features (B, N, D) of the x0 estimate and of the clean picture. It is exactly zero at log-SNRs (B,)
    below `log_snr_above`, where the estimate is an average over many possible pictures."""
    counts = (log_snr >= config.log_snr_above).to(seen.dtype)
    return config.weight * counts * token_distance(seen, wanted)
