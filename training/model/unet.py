"""The U-Nets of the cascade: the base one (ADM, Dhariwal & Nichol 2021) and the Efficient U-Net (Imagen, appendix B).

    B pictures   H, W pixels   p patch   T text tokens, one null token in front   D text width   E cond_dim

Base: per level `blocks` residual blocks (each with a long skip, concatenated), BigGAN down / up blocks between levels,
    a middle.
Efficient: per level a strided convolution *before* the blocks on the way down and an up-convolution *after* them on the
    way up, one long skip per level, no middle; most blocks sit at the coarse levels.

Every parameter takes part in every forward pass (ZeRO-3, no unused parameters), and nothing branches on data
(torch.compile).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.model.layers import (
    Attention,
    DownConv,
    LogSnrEmbedding,
    ResBlock,
    TextPool,
    UpConv,
    group_norm,
    zeroed,
)
from training.model.presets import UNetConfig


class Level(nn.Module):
    """The residual blocks of one level on one way, with their attention."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int], attend: Callable[[int], nn.ModuleList]):
        super().__init__()
        width = config.widths[level]
        self.blocks = nn.ModuleList(
            ResBlock(channels, width, config.cond_dim, skip_scale=config.skip_scale, dropout=config.dropout)
            for channels in inputs
        )
        last = len(inputs) - 1
        self.attentions = nn.ModuleList(
            attend(level) if config.attention_every_block or i == last else nn.ModuleList() for i in range(len(inputs))
        )


class UNet(nn.Module):
    """The network of one stage; see `training/model/presets.py` for its structure."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        config.check()
        self.config = config
        widths, depth = config.widths, len(config.widths)
        top, bottom = widths[0], widths[-1]
        pixels = config.channels * config.patch**2

        self.time = LogSnrEmbedding(config.cond_dim)
        self.aug = LogSnrEmbedding(config.cond_dim) if config.low_res else None
        width = config.text_width or config.text_dim
        null = torch.zeros(config.text_dim)
        if config.null_text == "learned":
            self.null_text = nn.Parameter(null)
        else:
            self.register_buffer("null_text", null, persistent=False)
        self.text_in = nn.Linear(config.text_dim, width) if config.text_width else nn.Identity()
        self.text_pool = TextPool(width, config.cond_dim, config.text_pool_heads)
        self.stem = nn.Conv2d(pixels * (2 if config.low_res else 1), top, 3, padding=1)

        def attend(level: int) -> nn.ModuleList:
            kinds = [
                kind for kind in (True, False) if (config.self_attention if kind else config.cross_attention)[level]
            ]
            return nn.ModuleList(
                Attention(
                    widths[level],
                    width,
                    config.head_dim,
                    self_attention=kind,
                    ff_mult=config.ff_mult,
                    skip_scale=config.skip_scale,
                )
                for kind in kinds
            )

        def resample(channels: int, out_channels: int, way: str) -> nn.Module:
            if config.efficient:
                return DownConv(channels, out_channels) if way == "down" else UpConv(channels, out_channels)
            return ResBlock(channels, out_channels, config.cond_dim, resample=way, skip_scale=config.skip_scale)

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        before = top
        for i in range(depth):
            if config.efficient:
                self.shrink.append(resample(before, widths[i], "down"))
                before = widths[i]
            self.down.append(Level(config, i, [before] + [widths[i]] * (config.blocks[i] - 1), attend))
            before = widths[i]
            if not config.efficient and i < depth - 1:
                self.shrink.append(resample(before, before, "down"))
        self.middle = nn.ModuleList()
        if not config.efficient:
            for _ in range(2):
                self.middle.append(ResBlock(bottom, bottom, config.cond_dim, skip_scale=config.skip_scale))
            self.middle.append(attend(depth - 1))
        for i in reversed(range(depth)):
            skips = [widths[i]] + [0 if config.efficient else widths[i]] * (config.blocks[i] - 1)
            inputs = [(before if j == 0 else widths[i]) + skip for j, skip in enumerate(skips)]
            self.up.append(Level(config, i, inputs, attend))
            before = widths[i]
            if config.efficient:
                self.grow.append(resample(before, widths[max(i - 1, 0)], "up"))
                before = widths[max(i - 1, 0)]
            elif i > 0:
                self.grow.append(resample(before, widths[i - 1], "up"))
                before = widths[i - 1]
        end = 2 * top if config.efficient else top
        self.norm_out = group_norm(end)
        self.conv_out = zeroed(nn.Conv2d(end, pixels, 3, padding=1))

    def run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """One block, recomputed in the backward pass if the config says so."""
        if self.config.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def attend(self, attentions: nn.ModuleList, h: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        for attention in attentions:
            h = self.run(attention, h, text, text_mask)
        return h

    def with_null_token(self, text: Tensor, text_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Masked tokens zeroed, and the always visible token that stands for "no text" put in front: (B, 1 + T,
        ...)."""
        text = text.to(dtype) * text_mask[:, :, None].to(dtype)
        null = self.null_text.to(dtype).expand(len(text), 1, -1)
        return torch.cat([null, text], dim=1), F.pad(text_mask, (1, 0), value=True)

    def forward(
        self,
        x: Tensor,
        log_snr: Tensor,
        text: Tensor,
        text_mask: Tensor,
        low_res: Tensor | None = None,
        aug_log_snr: Tensor | None = None,
    ) -> Tensor:
        """The network's output, fp32.

        Args:
            x: (B, 3, H, W), the noised picture.
            log_snr: (B,) fp32.
            text: (B, T, D).
            text_mask: bool (B, T), True = a token; an all-False row means no text.
            low_res: (B, 3, H, W), up-sampled and noised; super-resolution stages only.
            aug_log_snr: (B,) fp32, the log-SNR of `low_res`.
        """
        config, dtype = self.config, self.conv_out.weight.dtype
        text, text_mask = self.with_null_token(text, text_mask, dtype)
        text = self.text_in(text)
        cond = self.time(log_snr, dtype) + self.text_pool(text, text_mask)
        if self.aug is not None:
            if low_res is None or aug_log_snr is None:
                raise ValueError("this U-Net up-samples: it needs low_res and aug_log_snr")
            cond = cond + self.aug(aug_log_snr, dtype)
            x = torch.cat([x, low_res.to(x.dtype)], dim=1)
        cond = F.silu(cond)

        h = self.stem(F.pixel_unshuffle(x.to(dtype), config.patch))
        first, skips = h, []
        for i, level in enumerate(self.down):
            if config.efficient:
                h = self.run(self.shrink[i], h)
            for block, attentions in zip(level.blocks, level.attentions, strict=True):
                h = self.attend(attentions, self.run(block, h, cond), text, text_mask)
                if not config.efficient:
                    skips.append(h)
            if config.efficient:
                skips.append(h)
            elif i < len(self.shrink):
                h = self.run(self.shrink[i], h, cond)
        if not config.efficient:
            block_in, block_out, attentions = self.middle
            h = self.attend(attentions, self.run(block_in, h, cond), text, text_mask)
            h = self.run(block_out, h, cond)
        for i, level in enumerate(self.up):
            for j, (block, attentions) in enumerate(zip(level.blocks, level.attentions, strict=True)):
                if j == 0 or not config.efficient:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = self.attend(attentions, self.run(block, h, cond), text, text_mask)
            if config.efficient:
                h = self.run(self.grow[i], h)
            elif i < len(self.grow):
                h = self.run(self.grow[i], h, cond)
        if config.efficient:
            h = torch.cat([h, first], dim=1)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, config.patch).to(torch.float32)

    def compile_blocks(self) -> None:
        """torch.compile each residual and attention block in place: parameter names stay free of wrappers."""
        for module in self.modules():
            if isinstance(module, (ResBlock, Attention)):
                module.compile()


@contextmanager
def record_attention(unet: UNet) -> Iterator[list[list[Tensor]]]:
    """Collects, per attention layer and call, the weights (B, 1 + T, H, W) that pixels give the null token and each
    text token."""
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.maps = []
    try:
        yield [layer.maps for layer in layers if layer.maps is not None]
    finally:
        for layer in layers:
            layer.maps = None
