"""The U-Nets of the cascade: the base U-Net (ADM, Dhariwal & Nichol 2021) and the Efficient U-Net (Imagen, appendix B).

    B pictures   H, W pixels   p patch   T text tokens, after one null token   D text width   E cond_dim

Base: `blocks` residual blocks per level (each with a long skip, concatenated), BigGAN down / up blocks between levels,
a middle. Efficient: per level a strided convolution *before* the blocks on the way down and an up-convolution *after*
them on the way up, one long skip per level, no middle; most blocks are at the coarse levels.

Every forward pass uses every parameter (ZeRO-3 needs that), and control flow does not depend on data (for
torch.compile).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.config.unet import UNetConfig
from training.model.alignment import Alignment
from training.model.layers import (
    Attention,
    DownConv,
    LogSnrEmbedding,
    ResBlock,
    SizeEmbedding,
    TextPool,
    UpConv,
    folded,
    group_norm,
    zeroed,
)

RECOMPILE_LIMIT = 64
"""Number of shapes for which torch.compile may specialise one kind of block: the distinct blocks of a U-Net at a few
batch sizes."""


class UNetBlock(nn.Module):
    """One step through the U-Net: a residual block with its attention layers, or a change of resolution.

    `skip`: on the way down, the output is kept for a long skip; on the way up, a kept output is concatenated to the
    input.
    """

    def __init__(self, main: ResBlock | DownConv | UpConv, attentions: Sequence[Attention] = (), *, skip: bool = False):
        super().__init__()
        self.main = main
        self.attentions = nn.ModuleList(attentions)
        self.skip = skip

    def forward(self, h: Tensor, cond: Tensor, text: Tensor, text_mask: Tensor, *kept: Tensor) -> Tensor:
        """h (B, C, H, W), cond (B, E), text (B, 1 + T, D), text_mask bool (B, 1 + T) and optionally a kept output ->
        (B, C', H', W')."""
        h = self.main(h, cond, *kept)
        for attention in self.attentions:
            h = attention(h, text, text_mask)
        return h


def attentions(config: UNetConfig, level: int) -> list[Attention]:
    """Return the attention layers that follow a residual block of this level."""
    kinds = [True] * config.self_attention[level] + [False] * config.cross_attention[level]
    return [
        Attention(
            config.widths[level],
            config.text_width or config.text_dim,
            config.head_dim,
            self_attention=kind,
            ff_mult=config.ff_mult,
            skip_scale=config.skip_scale,
        )
        for kind in kinds
    ]


def residual(config: UNetConfig, channels: int, out_channels: int, resample: str = "none") -> ResBlock:
    """Return a residual block with the config's options."""
    return ResBlock(
        channels,
        out_channels,
        config.cond_dim,
        resample=resample,
        skip_scale=config.skip_scale,
        dropout=config.dropout,
    )


def level_blocks(config: UNetConfig, level: int, channels: int, skips: Sequence[int]) -> list[UNetBlock]:
    """Return the residual blocks of one level; `skips[j]` channels are concatenated before block j (0: none)."""
    width, blocks = config.widths[level], []
    for j, extra in enumerate(skips):
        attend = config.attention_every_block or j == len(skips) - 1
        main = residual(config, (channels if j == 0 else width) + extra, width)
        blocks.append(UNetBlock(main, attentions(config, level) if attend else (), skip=extra > 0))
    return blocks


def base_blocks(config: UNetConfig) -> tuple[list[UNetBlock], list[UNetBlock], list[UNetBlock]]:
    """Return the way down, the middle and the way up of the base U-Net."""
    widths, depth = config.widths, len(config.widths)
    down: list[UNetBlock] = []
    up: list[UNetBlock] = []
    for i, width in enumerate(widths):
        level = level_blocks(config, i, widths[max(i - 1, 0)], [0] * config.blocks[i])
        for block in level:
            block.skip = True
        down += level
        if i < depth - 1:
            down.append(UNetBlock(residual(config, width, width, "down")))
    last = widths[-1]
    middle = [
        UNetBlock(residual(config, last, last), attentions(config, depth - 1)),
        UNetBlock(residual(config, last, last)),
    ]
    for i in reversed(range(depth)):
        up += level_blocks(config, i, widths[i], [widths[i]] * config.blocks[i])
        if i > 0:
            up.append(UNetBlock(residual(config, widths[i], widths[i - 1], "up")))
    return down, middle, up


def efficient_blocks(config: UNetConfig) -> tuple[list[UNetBlock], list[UNetBlock], list[UNetBlock]]:
    """Return the way down, the (empty) middle and the way up of the Efficient U-Net."""
    widths = config.widths
    down: list[UNetBlock] = []
    up: list[UNetBlock] = []
    for i, width in enumerate(widths):
        down.append(UNetBlock(DownConv(widths[max(i - 1, 0)], width)))
        down += level_blocks(config, i, width, [0] * config.blocks[i])
        down[-1].skip = True
    for i in reversed(range(len(widths))):
        up += level_blocks(config, i, widths[i], [widths[i]] + [0] * (config.blocks[i] - 1))
        up.append(UNetBlock(UpConv(widths[i], widths[max(i - 1, 0)])))
    return down, [], up


class UNet(nn.Module):
    """The network of one stage; see `training/config/unet.py` for its structure."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        config.check()
        self.config = config
        top, width = config.widths[0], config.text_width or config.text_dim
        pixels = config.channels * config.patch**2

        self.time = LogSnrEmbedding(config.cond_dim)
        self.aug = LogSnrEmbedding(config.cond_dim) if config.low_res else None
        self.sizes = SizeEmbedding(config.cond_dim) if config.size_condition else None
        self.null_text: Tensor
        if config.null_text == "learned":
            self.null_text = nn.Parameter(torch.zeros(config.text_dim))
        else:
            self.register_buffer("null_text", torch.zeros(config.text_dim), persistent=False)
        self.text_in = nn.Linear(config.text_dim, width) if config.text_width else nn.Identity()
        self.text_pool = TextPool(width, config.cond_dim, config.text_pool_heads)

        self.stem = nn.Conv2d(pixels * (2 if config.low_res else 1), top, 3, padding=1)
        down, middle, up = efficient_blocks(config) if config.efficient else base_blocks(config)
        self.down, self.middle, self.up = nn.ModuleList(down), nn.ModuleList(middle), nn.ModuleList(up)
        end = 2 * top if config.efficient else top
        self.alignment: Alignment | None = None
        """Projection head, only while training with `repa`; sampling does not use it."""
        self.norm_out = group_norm(end)
        self.conv_out = zeroed(nn.Conv2d(end, pixels, 3, padding=1))

    def with_null_token(self, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Zero the padding and prepend the always visible token that represents no text; return text (B, 1 + T, D) and
        mask (B, 1 + T)."""
        text = text * text_mask[:, :, None].to(text.dtype)
        null = self.null_text.to(text.dtype).expand(len(text), 1, -1)
        return torch.cat([null, text], dim=1), F.pad(text_mask, (1, 0), value=True)

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Run one block, with activation checkpointing if the config asks for it."""
        if self.config.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(
        self,
        x: Tensor,
        log_snr: Tensor,
        text: Tensor,
        text_mask: Tensor,
        low_res: Tensor | None = None,
        aug_log_snr: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output, fp32 (B, 3, H, W).

        Args:
            x: (B, 3, H, W), the noised picture, H and W multiples of `UNetConfig.divisor`.
            log_snr: (B,) fp32.
            text: (B, T, D).
            text_mask: bool (B, T), True on tokens; an all-False row means no text.
            low_res: (B, 3, H, W), up-sampled and noised; super-resolution stages only.
            aug_log_snr: (B,) fp32, the log-SNR of `low_res`.
            sizes: (B, 6) fp32, pixels, see `SizeEmbedding`; with `size_condition` only.

        Raises:
            ValueError: an input that this network needs is missing.
        """
        dtype: torch.dtype = self.conv_out.weight.dtype  # type: ignore[assignment]
        words, mask = self.with_null_token(text.to(dtype), text_mask)
        words = self.text_in(words)
        cond = self.time(log_snr, dtype) + self.text_pool(words, mask)
        if self.aug is not None:
            if low_res is None or aug_log_snr is None:
                raise ValueError("a super-resolution U-Net needs low_res and aug_log_snr")
            cond = cond + self.aug(aug_log_snr, dtype)
            x = torch.cat([x, low_res.to(x.dtype)], dim=1)
        if self.sizes is not None:
            if sizes is None:
                raise ValueError("a U-Net with size_condition needs sizes")
            cond = cond + self.sizes(sizes, dtype)
        cond = F.silu(cond)

        h = first = self.stem(folded(x.to(dtype), self.config.patch))  # (B, C, H / p, W / p)
        skips: list[Tensor] = []
        for block in self.down:
            h = self.run(block, h, cond, words, mask)
            if block.skip:
                skips.append(h)
        for block in self.middle:
            h = self.run(block, h, cond, words, mask)
        if self.alignment is not None:
            self.alignment(h)
        for block in self.up:
            # Without a middle, h is itself the kept tensor, and concatenating it with itself would lose channels-last.
            kept = [skips.pop().view_as(h)] if block.skip else []
            h = self.run(block, h, cond, words, mask, *kept)
        return self.head(h, *([first] if self.config.efficient else []))

    def head(self, *parts: Tensor) -> Tensor:
        """Concatenate tensors (B, C, H / p, W / p) and map them to the output, fp32 (B, 3, H, W)."""
        h = torch.cat(parts, dim=1)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.config.patch).to(torch.float32)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block and the head in place, so that parameter names do not change.

        Each shape is compiled separately (`dynamic=False`); blocks of equal shape share the code. By default torch
        compiles a function for at most 8 shapes and silently runs the rest uncompiled; the base U-Net has 17. Without
        forced layouts, inductor runs strongly narrowing blocks as NCHW, so that convolutions convert back and forth.
        """
        warnings.filterwarnings("ignore", module="_distutils_hack")  # of setuptools, which the compiler imports late
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        options: dict[str, Any] = {"dynamic": False, "backend": backend}
        if backend == "inductor":
            options["options"] = {"force_layout_optimization": True}
        for module in self.modules():
            if isinstance(module, (ResBlock, Attention, UpConv)):
                module.compile(**options)
        self.head = torch.compile(self.head, **options)  # type: ignore[method-assign]


@contextmanager
def record_attention(unet: UNet) -> Iterator[list[list[Tensor]]]:
    """Record, per attention layer and call, the weights (B, 1 + T, H, W) with which pixels attend to the null token and
    to each text token, on the CPU; yields one list per layer."""
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.maps = []
    try:
        yield [layer.maps for layer in layers if layer.maps is not None]
    finally:
        for layer in layers:
            layer.maps = None
