"""Layers of the U-Nets.

    B pictures   C channels   H, W pixels   T text tokens   D text width   E width of the time-and-text embedding `cond`

With bf16 inputs, torch's kernels still compute normalisation statistics and softmax in fp32; sinusoids are computed in
fp32 here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIP = 1 / math.sqrt(2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with up to 32 groups of at least 4 channels."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels)


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters of the module to zero, so that its branch starts as a no-op; return the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def folded(x: Tensor, patch: int) -> Tensor:
    """Fold patch x patch pixels into channels, (B, C, H, W) -> (B, C patch^2, H / patch, W / patch), keeping x's memory
    format (`pixel_unshuffle` loses it, and the whole network follows the layout of its first tensor)."""
    if patch == 1:
        return x
    last = x.is_contiguous(memory_format=torch.channels_last)
    return F.pixel_unshuffle(x, patch).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )


def scaled_sum(x: Tensor, h: Tensor, scale: float) -> Tensor:
    """Return (x + h) scale; the product is in place, since the gradient needs neither operand."""
    return (x + h).mul_(scale) if scale != 1.0 else x + h


def doubled(x: Tensor) -> Tensor:
    """Up-sample to twice the side by nearest neighbour, (B, C, H, W) -> (B, C, 2 H, 2 W); keeps channels-last.

    When compiled, it is a broadcast, whose gradient is a sum over 2x2 pixels: the compiler would scatter the gradient
    of `interpolate` with atomic additions, which are slow and not deterministic.
    """
    if torch.compiler.is_compiling():
        wide = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        return wide.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class LogSnrEmbedding(nn.Module):
    """Embeds a log-SNR, (B,) fp32 -> (B, E): sinusoids of 0.05 to 10 radians per unit in fp32, then an MLP in the model
    dtype."""

    def __init__(self, width: int, sinusoids: int = 64):
        super().__init__()
        self.sinusoids = sinusoids
        self.mlp = nn.Sequential(nn.Linear(2 * sinusoids, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, log_snr: Tensor, dtype: torch.dtype) -> Tensor:
        """log_snr (B,) fp32 -> (B, E) in `dtype`."""
        share = torch.arange(self.sinusoids, device=log_snr.device, dtype=torch.float32) / (self.sinusoids - 1)
        angle = log_snr.to(torch.float32)[:, None] * (10.0 * (0.05 / 10.0) ** share)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype))


def sinusoids(values: Tensor, count: int) -> Tensor:
    """Embed each value v as cos(v w_i), then sin(v w_i), with w_i = 10000^(-i / count) for i = 0 .. count - 1 (Vaswani
    et al. 2017, section 3.5); (B, N) -> fp32 (B, N, 2 count)."""
    rates = 10000.0 ** (-torch.arange(count, device=values.device, dtype=torch.float32) / count)
    angle = values.to(torch.float32)[:, :, None] * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class SizeEmbedding(nn.Module):
    """Embeds original height and width, crop top and left, and target height and width, (B, 6) pixels -> (B, E):
    sinusoids of each number, concatenated (SDXL, Podell et al. 2023, section 2.2), then an MLP whose last layer starts
    at zero."""

    def __init__(self, width: int, count: int = 128):
        super().__init__()
        self.count = count
        last = zeroed(nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(6 * 2 * count, width), nn.SiLU(), last)

    def forward(self, sizes: Tensor, dtype: torch.dtype) -> Tensor:
        """sizes (B, 6) fp32 -> (B, E) in `dtype`."""
        return self.mlp(sinusoids(sizes, self.count).flatten(1).to(dtype))


class ResBlock(nn.Module):
    """Residual block of BigGAN and ADM: GroupNorm, SiLU, conv, scale-shift norm from `cond`, SiLU, conv (initialised to
    zero), added to the shortcut.

    `resample` is `none`, `down` (2x2 mean) or `up` (nearest) and applies to both branches. With `skip_scale` the sum is
    multiplied by 1/sqrt(2), as in SR3 and DeepFloyd IF.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        cond_dim: int,
        *,
        resample: str = "none",
        skip_scale: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.resample = resample
        self.scale = SKIP if skip_scale else 1.0
        self.norm_in = group_norm(channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.cond = nn.Linear(cond_dim, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def resampled(self, x: Tensor) -> Tensor:
        """Resample x (B, C, H, W) to the resolution of the block's output."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return doubled(x) if self.resample == "up" else x

    def forward(self, x: Tensor, cond: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C1, H, W), cond (B, E), skip (B, C2, H, W) -> (B, C', H', W'); `skip` is concatenated to x."""
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.conv_in(self.resampled(F.silu(self.norm_in(x))))
        scale, shift = self.cond(cond)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        h = self.conv_out(self.dropout(F.silu(h)))
        return scaled_sum(self.shortcut(self.resampled(x)), h, self.scale)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Pixels attend to the text and, with `self_attention`, to each other: text keys and values are concatenated with
    those of the pixels.

    LayerNorm is applied to the text (Imagen, section 2.5). The first token, which represents no text, must be visible
    in `text_mask`, so that every pixel has something to attend to.
    """

    def __init__(
        self,
        channels: int,
        text_width: int,
        head_dim: int,
        *,
        self_attention: bool = True,
        ff_mult: int = 0,
        skip_scale: bool = True,
    ):
        super().__init__()
        self.heads = channels // head_dim
        self.scale = SKIP if skip_scale else 1.0
        self.norm = group_norm(channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels) if self_attention else None
        self.text_norm = nn.LayerNorm(text_width)
        self.text_key_value = nn.Linear(text_width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.feed_forward = FeedForward(channels, ff_mult, skip_scale) if ff_mult else None
        self.maps: list[Tensor] | None = None
        """Attention weights on the text tokens, (B, T, H, W) per call, while `record_attention` is active."""

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """x (B, C, H, W), text (B, T, D), text_mask bool (B, T) -> (B, C, H, W)."""
        height, width = x.shape[2:]
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        query = split_heads(self.query(pixels), self.heads)
        both, mask = self.text_key_value(self.text_norm(text)), text_mask
        if self.key_value is not None:
            both = torch.cat([both, self.key_value(pixels)], dim=1)
            mask = F.pad(text_mask, (0, pixels.shape[1]), value=True)
        key, value = (split_heads(part, self.heads) for part in both.chunk(2, dim=-1))
        mask = mask[:, None, None, :]
        if self.maps is not None:
            scores = (query.float() @ key.float().transpose(-1, -2)) / math.sqrt(query.shape[-1])
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)[..., : text.shape[1]].mean(1)
            self.maps.append(weights.transpose(1, 2).unflatten(-1, (height, width)).cpu())
        h = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        h = self.out(h.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(-1, (height, width))
        x = scaled_sum(x, h, self.scale)
        return x if self.feed_forward is None else self.feed_forward(x)


class FeedForward(nn.Module):
    """GroupNorm, 1x1 conv to `mult` times the channels, GELU, 1x1 conv back (initialised to zero), added to the
    input."""

    def __init__(self, channels: int, mult: int, skip_scale: bool):
        super().__init__()
        self.scale = SKIP if skip_scale else 1.0
        self.norm = group_norm(channels)
        self.widen = nn.Conv2d(channels, mult * channels, 1)
        self.narrow = zeroed(nn.Conv2d(mult * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        return scaled_sum(x, self.narrow(F.gelu(self.widen(self.norm(x)))), self.scale)


class TextPool(nn.Module):
    """Attention pooling of the text into one vector (B, E): LayerNorm, attention with the mean of the visible tokens as
    query, MLP."""

    def __init__(self, text_width: int, cond_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(text_width)
        self.query = nn.Linear(text_width, cond_dim)
        self.key_value = nn.Linear(text_width, 2 * cond_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(cond_dim), nn.Linear(cond_dim, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """text (B, T, D), text_mask bool (B, T) with at least one True per row -> (B, E)."""
        tokens = self.norm(text)
        visible = text_mask[:, :, None].to(tokens.dtype)
        mean = (tokens * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
        key, value = (split_heads(part, self.heads) for part in self.key_value(tokens).chunk(2, dim=-1))
        query = split_heads(self.query(mean), self.heads)
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=text_mask[:, None, None, :])
        return self.mlp(pooled.transpose(1, 2).flatten(1))


class DownConv(nn.Module):
    """3x3 convolution with stride 2; in the Efficient U-Net it comes before the level's blocks."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H / 2, W / 2); `cond` is not used."""
        return self.conv(x)


class UpConv(nn.Module):
    """Nearest up-sampling to twice the side, then a 3x3 convolution; in the Efficient U-Net it comes after the level's
    blocks."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', 2 H, 2 W); `cond` is not used."""
        return self.conv(doubled(x))
