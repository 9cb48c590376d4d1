"""U-Net sizes: one row per preset. Does not import torch, so that the command line validates quickly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "float": (lambda value: isinstance(value, (int, float)) and not isinstance(value, bool), "a number"),
    "str": (lambda value: isinstance(value, str), "a string"),
}


@dataclass(frozen=True)
class UNetConfig:
    """Structure of one U-Net. `widths[i]` is the number of channels at level i (finest first); all per-level tuples
    have the same length."""

    widths: tuple[int, ...] = (64, 128)
    blocks: tuple[int, ...] = (2, 2)
    """Residual blocks per level (the same number on the way down and on the way up)."""
    self_attention: tuple[bool, ...] = (True, True)
    """Levels with self-attention, to which text keys and values are appended."""
    cross_attention: tuple[bool, ...] = (False, False)
    """Levels that attend to the text only."""
    attention_every_block: bool = True
    """Attention after every residual block of an attending level; false: only after the last one (down and up)."""
    head_dim: int = 64
    """Channels per attention head."""
    ff_mult: int = 0
    """Width factor of the feed-forward after each attention; 0: none."""
    patch: int = 1
    """Pixels per side folded into channels by the stem (pixel unshuffle)."""
    efficient: bool = False
    """Efficient U-Net (Imagen, appendix B): downsample before and upsample after the convolutions."""
    skip_scale: bool = True
    """Scale sums with the skip connections by 1/sqrt(2)."""
    text_dim: int = 384
    """Width of the text embeddings."""
    text_width: int = 0
    """Text embeddings are first projected to this width; 0: no projection."""
    null_text: str = "zero"
    """The token that represents no text and is always attended to: `zero` (constant) or `learned` (a parameter)."""
    cond_dim: int = 256
    """Width of the time + pooled-text embedding."""
    text_pool_heads: int = 4
    """Heads of the attention that pools the text embeddings."""
    low_res: bool = False
    """The network takes an upsampled low-res picture and its augmentation level as input."""
    size_condition: bool = False
    """The network is conditioned on the picture's original size, crop and size (`stage.diffusion.size_condition`)."""
    channels: int = 3
    """Channels of the pictures."""
    dropout: float = 0.0
    """Dropout in the residual blocks, 0 to below 1."""
    checkpoint_blocks: bool = False
    """Activation checkpointing per block."""

    def check(self) -> None:
        """Raise ValueError, naming the field, if the structure cannot be built."""
        where = "stage.model.overrides"
        for part in fields(self):
            kind, value = str(part.type), getattr(self, part.name)
            single, word = KINDS[kind.removeprefix("tuple[").partition(",")[0]]
            values = value if kind.startswith("tuple") else (value,)
            if not isinstance(values, tuple) or not all(single(item) for item in values):
                many = "a list, for each level " if kind.startswith("tuple") else ""
                raise ValueError(f"{where}.{part.name}={value}: it must be {many}{word}")
        for name in ("blocks", "self_attention", "cross_attention"):
            count = len(getattr(self, name))
            if count != len(self.widths):
                raise ValueError(f"{where}.{name}: {count} values for the {len(self.widths)} levels of {where}.widths")
        if not self.widths or min(self.widths) < 1 or min(self.blocks) < 1:
            raise ValueError(f"{where}.widths and {where}.blocks: every level needs a positive number")
        for name in ("patch", "text_dim", "cond_dim", "text_pool_heads", "head_dim", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: it must be at least 1")
        for level, width in enumerate(self.widths):
            attends = self.self_attention[level] or self.cross_attention[level]
            if attends and width % self.head_dim:
                raise ValueError(
                    f"{where}.head_dim={self.head_dim}: it must divide widths[{level}]={width} (attention there)"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}.dropout={self.dropout}: it must lie between 0 and 1")
        for name in ("ff_mult", "text_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{where}.{name}={getattr(self, name)}: it must be at least 0")
        if self.cond_dim % self.text_pool_heads:
            raise ValueError(
                f"{where}.text_pool_heads={self.text_pool_heads}: it must divide {where}.cond_dim={self.cond_dim}"
            )
        if self.null_text not in ("zero", "learned"):
            raise ValueError(f"{where}.null_text={self.null_text}: it must be zero or learned")

    @property
    def divisor(self) -> int:
        """The sides of pictures must be multiples of this number of pixels."""
        return self.patch * 2 ** (len(self.widths) - (0 if self.efficient else 1))


PRESETS: dict[str, UNetConfig] = {
    "tiny_base": UNetConfig(
        widths=(16, 32), blocks=(1, 1), self_attention=(False, True), head_dim=16, patch=2, cond_dim=32, text_dim=32
    ),
    "tiny_sr": UNetConfig(
        widths=(16, 32),
        blocks=(1, 1),
        self_attention=(False, True),
        head_dim=16,
        patch=2,
        cond_dim=32,
        text_dim=32,
        efficient=True,
        attention_every_block=False,
        low_res=True,
    ),
    "demo_base": UNetConfig(widths=(64, 128), blocks=(2, 2), patch=2, text_width=128),
    "demo_sr": UNetConfig(
        widths=(64, 128),
        blocks=(1, 1),
        self_attention=(False, False),
        patch=4,
        low_res=True,
        cond_dim=128,
        text_width=64,
    ),
    # 2.007e9 parameters: the widths, blocks and attention of the paper's appendix F; text and time widths chosen to
    # reach its 2B.
    "base64": UNetConfig(
        widths=(512, 1024, 1536, 2048),
        blocks=(3, 3, 3, 3),
        self_attention=(False, True, True, True),
        cross_attention=(False,) * 4,
        text_dim=4096,
        text_width=2560,
        cond_dim=2560,
        text_pool_heads=40,
    ),
    # 396e6 parameters, for one node.
    "base64_400m": UNetConfig(
        widths=(256, 512, 768, 768),
        blocks=(3, 3, 3, 3),
        self_attention=(False, True, True, True),
        cross_attention=(False,) * 4,
        text_dim=4096,
        text_width=1536,
        cond_dim=1024,
        text_pool_heads=16,
    ),
    # 106e6 parameters, for a first run.
    "base64_100m": UNetConfig(
        widths=(128, 256, 384, 512),
        blocks=(2, 2, 2, 3),
        self_attention=(False, True, True, True),
        cross_attention=(False,) * 4,
        text_dim=4096,
        text_width=512,
        cond_dim=512,
        text_pool_heads=8,
    ),
    # 599e6 parameters: the paper's list (128-1024; 2, 4, 8, 8) with one attention per level has 470e6, so the last
    # level attends after every block.
    "sr256": UNetConfig(
        widths=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 8),
        self_attention=(False, False, False, True),
        cross_attention=(False,) * 4,
        head_dim=128,
        ff_mult=2,
        efficient=True,
        low_res=True,
        text_dim=4096,
        text_width=512,
        cond_dim=512,
        text_pool_heads=8,
    ),
    # 108e6 parameters, to go with base64_100m: half the widths, fewer blocks at the coarse levels.
    "sr256_100m": UNetConfig(
        widths=(64, 128, 256, 512),
        blocks=(2, 4, 5, 5),
        self_attention=(False, False, False, True),
        cross_attention=(False,) * 4,
        head_dim=64,
        ff_mult=2,
        efficient=True,
        low_res=True,
        text_dim=4096,
        text_width=512,
        cond_dim=512,
        text_pool_heads=8,
    ),
    # 402e6 parameters: cross-attention only; the paper's list would have 468e6, so the last level has 6 blocks, not 8.
    "sr1024": UNetConfig(
        widths=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 6),
        self_attention=(False,) * 4,
        cross_attention=(False, False, False, True),
        attention_every_block=False,
        head_dim=128,
        ff_mult=2,
        efficient=True,
        low_res=True,
        text_dim=4096,
        text_width=1024,
        cond_dim=768,
        text_pool_heads=12,
    ),
}
"""U-Net structures by `stage.model.preset`."""


def resolve(preset: str, overrides: dict[str, Any]) -> UNetConfig:
    """Return the preset with individual fields overridden.

    Raises:
        ValueError: an unknown preset or field (the message lists the valid ones), or an invalid structure.
    """
    if preset not in PRESETS:
        raise ValueError(f"stage.model.preset={preset}: it must be one of {', '.join(PRESETS)}")
    known = {f.name for f in fields(UNetConfig)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"stage.model.overrides.{name}: no such field; the fields are {', '.join(sorted(known))}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in overrides.items()}
    config = replace(PRESETS[preset], **values)
    config.check()
    return config


def side_multiple(stage: Any, text_dim: int) -> int:
    """Return the number that the sides of a stage's pictures must be multiples of, for the U-Net's halvings and for
    whole low-res pixels."""
    factor = stage.image_size // stage.low_res_size if stage.low_res_size else 1
    return math.lcm(for_stage(stage, text_dim).divisor, factor)


def for_stage(stage: Any, text_dim: int) -> UNetConfig:
    """Return the U-Net structure of a stage (a `StageConfig`) for text embeddings of width `text_dim`.

    Raises:
        ValueError: a structure that cannot be built, or that does not fit the stage's picture size.
    """
    config = resolve(stage.model.preset, dict(stage.model.overrides))
    diffusion = stage.diffusion
    own = {"null_text": diffusion.null_text, "size_condition": diffusion.size_condition}
    config = replace(config, text_dim=text_dim, low_res=stage.low_res_size > 0, **own)
    for key, side in (("image_size", stage.image_size), ("crop_size", stage.crop_size)):
        if side % config.divisor:
            raise ValueError(
                f"stage.{key}={side}: it must be a multiple of {config.divisor} for {len(config.widths)} levels and "
                f"patch {config.patch} of stage.model.preset={stage.model.preset}"
            )
    return config
