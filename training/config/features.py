"""Losses on the features of a frozen picture encoder, beside the diffusion loss (plain dataclasses, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.config import at_least, require


@dataclass
class DinoConfig:
    """The frozen picture encoder that `repa` and `perceptual` compare by."""

    path: str | None = None
    """Directory of a DINOv2 model as transformers stores it (config.json, model.safetensors); never downloaded."""
    side: int = 224
    """Pictures are resized to about side x side pixels for it, in whole patches."""
    sha: str | None = None
    """Hash of its files. Null: found out at the start; checkpoints keep it and refuse another encoder."""

    def __post_init__(self) -> None:
        at_least(self, "dino", side=1)


@dataclass
class RepaConfig:
    """Representation alignment: the middle of the U-Net, through a small network that is trained with it and left out
    of bundles, is drawn to the encoder's features of the clean picture."""

    weight: float = 0.0
    """Of 1 - cosine, the mean over the encoder's patches, beside the diffusion loss; 0: off."""
    until: int = 0
    """Step from which it no longer counts: it helps early and hurts late."""
    width: int = 2048
    """Of the two hidden layers of the small network."""

    def __post_init__(self) -> None:
        at_least(self, "repa", weight=0, until=0, width=1)


@dataclass
class PerceptualConfig:
    """The estimate of the clean picture is compared with it by the encoder's features, where noise is low enough."""

    weight: float = 0.0
    """Of 1 - cosine, the mean over the encoder's patches, beside the diffusion loss; 0: off."""
    log_snr_above: float = -1.69
    """Log signal-to-noise ratio from which it counts."""

    def __post_init__(self) -> None:
        at_least(self, "perceptual", weight=0)
        value = self.log_snr_above
        require(math.isfinite(value), f"perceptual.log_snr_above={value}: it must be a number")
