"""Auxiliary losses on the features of a frozen picture encoder (plain dataclasses, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.config import at_least, require


@dataclass
class DinoConfig:
    """The frozen picture encoder whose features the `repa` and `perceptual` losses compare."""

    path: str | None = None
    """Local directory of a DINOv2 model in transformers format (config.json, model.safetensors); never downloaded."""
    side: int = 224
    """Pictures are resized to about side x side pixels (whole patches, same aspect ratio) before encoding."""
    sha: str | None = None
    """Hash of the encoder's files; null: computed at the start. Checkpoints store it, and refuse a different
    encoder."""

    def __post_init__(self) -> None:
        at_least(self, "dino", side=1)


@dataclass
class RepaConfig:
    """Representation alignment (REPA): a projection head on the middle of the U-Net learns to predict the encoder's
    features of the clean picture. The head is trained with the U-Net and left out of bundles."""

    weight: float = 0.0
    """Weight of the loss, 1 - cosine similarity averaged over the encoder's patches; 0: off."""
    until: int = 0
    """Step from which the loss is switched off: it helps early in training and hurts later."""
    width: int = 2048
    """Width of the projection head's two hidden layers."""

    def __post_init__(self) -> None:
        at_least(self, "repa", weight=0, until=0, width=1)


@dataclass
class PerceptualConfig:
    """Perceptual loss: the encoder's features of the x0 estimate are compared with those of the clean picture, at low
    enough noise levels."""

    weight: float = 0.0
    """Weight of the loss, 1 - cosine similarity averaged over the encoder's patches; 0: off."""
    log_snr_above: float = -1.69
    """Minimum log signal-to-noise ratio at which the loss applies."""

    def __post_init__(self) -> None:
        at_least(self, "perceptual", weight=0)
        value = self.log_snr_above
        require(math.isfinite(value), f"perceptual.log_snr_above={value}: it must be a number")
