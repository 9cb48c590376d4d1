"""U-Net sizes: one row per preset (no torch here, so that the command line can validate with it)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class UNetConfig:
    """Structure of one U-Net. `widths[i]` is the channel count of level i (finest first); per-level tuples have equal length."""

    widths: tuple[int, ...] = (64, 128)
    blocks: tuple[int, ...] = (2, 2)
    """Residual blocks per level (the same number on the way down and on the way up)."""
    self_attention: tuple[bool, ...] = (True, True)
    """Levels with self-attention to which text keys and values are appended."""
    cross_attention: tuple[bool, ...] = (False, False)
    """Levels with attention to the text alone."""
    head_dim: int = 64
    patch: int = 1
    """Pixels per side folded into channels by the stem (pixel unshuffle)."""
    efficient: bool = False
    """Efficient U-Net (Imagen, appendix B): down-sample before, up-sample after the convolutions."""
    skip_scale: bool = True
    """Scale sums with the skip connections by 1/sqrt(2)."""
    text_dim: int = 384
    """Width of the text embeddings that come in."""
    cond_dim: int = 256
    """Width of the time + pooled-text embedding."""
    text_pool_heads: int = 4
    low_res: bool = False
    """The stage takes an up-sampled low-res picture and its augmentation level."""
    channels: int = 3
    dropout: float = 0.0
    checkpoint_blocks: bool = False
    """Activation checkpointing per block."""


PRESETS: dict[str, UNetConfig] = {}


def resolve(preset: str, overrides: dict[str, Any]) -> UNetConfig:
    """The preset with single fields replaced.

    Raises:
        ValueError: an unknown preset or field, with the valid names.
    """
    if preset not in PRESETS:
        raise ValueError(f"stage.model.preset={preset}: it must be one of {', '.join(PRESETS)}")
    known = {f.name for f in fields(UNetConfig)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"stage.model.overrides.{name}: no such field; known are {', '.join(sorted(known))}")
    values = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in overrides.items()}
    return replace(PRESETS[preset], **values)
