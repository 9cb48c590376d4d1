"""Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940; for U-Nets U-REPA, Tian et al. 2025, arXiv
2503.18414): the middle of the U-Net is drawn to a frozen encoder's features of the clean picture.

Of U-REPA are the middle as the place, and up-sampling behind the small network. Its loss on similarities between the
samples of a batch is left out: a sample's loss here does not depend on the batch that it is in.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from training.config.features import RepaConfig

BESIDE = "alignment."
"""Begins the names of weights that are trained with the U-Net, and that nothing is drawn with."""


class Alignment(nn.Module):
    """Three linear layers with SiLU between them (REPA, section 3.2), at every place of a feature map.

    What it made of the last map is kept until it is taken: the U-Net's own output stays its only one.
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
        """What the last forward pass made, once."""
        latest, self._latest = self._latest, None
        assert latest is not None, "forward() first"
        return latest


def token_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine of features (B, N, D), the mean over the N places, (B,): REPA, equation 8, plus one."""
    return 1 - F.cosine_similarity(found, wanted, dim=-1).mean(1)


def alignment_loss(made: Tensor, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B,) `token_distance` of a map (B, D, h, w) from features (B, rows x columns, D), up-sampled to their grid."""
    sized = F.interpolate(made.float(), size=grid, mode="bilinear", align_corners=False)
    return token_distance(sized.flatten(2).transpose(1, 2), wanted)


def repa_term(made: Tensor, wanted: Tensor | None, grid: tuple[int, int], config: RepaConfig) -> Tensor:
    """What is added to the loss of each sample, (B,). After `repa.until` (`wanted` None) an exact zero through which
    all weights still get a gradient, because ZeRO wants one for each."""
    if wanted is None:
        return 0.0 * made.float().flatten(1).sum(1)
    return config.weight * alignment_loss(made, wanted, grid)
