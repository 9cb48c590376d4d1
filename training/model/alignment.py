"""Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940; for U-Nets U-REPA, Tian et al. 2025, arXiv
2503.18414): the middle of the U-Net learns to predict a frozen encoder's features of the clean picture.

As in U-REPA, the features are taken from the middle of the U-Net and up-sampled after the projection head. U-REPA's
loss on similarities between the samples of a batch is left out: here a sample's loss must not depend on its batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from training.config.features import RepaConfig

BESIDE = "alignment."
"""Prefix of the names of weights that are trained with the U-Net but not used for sampling."""


class Alignment(nn.Module):
    """The projection head: three linear layers with SiLU in between (REPA, section 3.2), applied to each pixel of a
    feature map.

    The output is kept until `take` is called, so that `UNet.forward` still returns the U-Net's output alone.

    Args:
        channels: C, channels of the feature map.
        width: width of the two hidden layers.
        features: width of the encoder's features.
    """

    def __init__(self, channels: int, width: int, features: int):
        super().__init__()
        first, second, third = nn.Linear(channels, width), nn.Linear(width, width), nn.Linear(width, features)
        self.mlp = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
        self._latest: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """h (B, C, H, W) -> (B, features, H, W)."""
        self._latest = self.mlp(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._latest

    def take(self) -> Tensor:
        """Return the output of the last forward pass, (B, features, H, W), and forget it; call `forward` first."""
        latest, self._latest = self._latest, None
        assert latest is not None, "forward() first"
        return latest


def token_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Return 1 - cosine similarity of features (B, N, D), averaged over the N patches, (B,): REPA, equation 8, plus
    one."""
    return 1 - F.cosine_similarity(found, wanted, dim=-1).mean(1)


def alignment_loss(made: Tensor, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the `token_distance` (B,) between a map (B, D, h, w), resized to `grid` (rows, columns), and the encoder's
    features (B, rows x columns, D)."""
    sized = F.interpolate(made.float(), size=grid, mode="bilinear", align_corners=False)
    return token_distance(sized.flatten(2).transpose(1, 2), wanted)


def repa_term(made: Tensor, wanted: Tensor | None, grid: tuple[int, int], config: RepaConfig) -> Tensor:
    """Return the term to add to each sample's loss, (B,).

    After `repa.until` (`wanted` None) it is exactly zero, but still connected to all weights, because ZeRO needs a
    gradient for each.
    """
    if wanted is None:
        return 0.0 * made.float().flatten(1).sum(1)
    return config.weight * alignment_loss(made, wanted, grid)
