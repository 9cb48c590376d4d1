"""Single layers compared with slow, plain computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.layers import Attention, LogSnrEmbedding, ResBlock, SizeEmbedding, TextPool, sinusoids


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> nn.Module:
    """All parameters drawn at random, including those that start at zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def plain_group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[1] // norm.num_groups
    for b in range(len(x)):
        for g in range(norm.num_groups):
            part = x[b, g * width : (g + 1) * width]
            out[b, g * width : (g + 1) * width] = (part - part.mean()) / (part.var(unbiased=False) + norm.eps).sqrt()
    return out * norm.weight[:, None, None] + norm.bias[:, None, None]


def plain_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    reach = conv.kernel_size[0] // 2
    padded = F.pad(x, (reach,) * 4)
    out = conv.bias.view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:]).clone()
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            window = padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
            out += torch.einsum("bchw,oc->bohw", window, conv.weight[:, :, dy, dx])
    return out


@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("channels", [8, 16])
def test_residual_block_against_a_plain_computation(resample: str, channels: int) -> None:
    block = ResBlock(channels, 16, 10, resample=resample)
    randomised(block)
    x, cond = torch.randn(2, channels, 6, 6).double(), torch.randn(2, 10).double()

    def resized(y: Tensor) -> Tensor:
        if resample == "down":
            return (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else y

    def silu(y: Tensor) -> Tensor:
        return y / (1 + torch.exp(-y))

    h = plain_conv(resized(silu(plain_group_norm(x, block.norm_in))), block.conv_in)
    scale, shift = (cond @ block.cond.weight.T + block.cond.bias)[:, :, None, None].chunk(2, dim=1)
    h = plain_conv(silu(plain_group_norm(h, block.norm_out) * (1 + scale) + shift), block.conv_out)
    shortcut = resized(x)
    if isinstance(block.shortcut, nn.Conv2d):
        shortcut = plain_conv(shortcut, block.shortcut)
    torch.testing.assert_close(block(x, cond), (shortcut + h) / math.sqrt(2), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("self_attention", [True, False])
def test_attention_against_loops_over_pixels_and_tokens(self_attention: bool) -> None:
    layer = Attention(8, 6, 4, self_attention=self_attention)
    randomised(layer)
    x, text = torch.randn(2, 8, 3, 3).double(), torch.randn(2, 5, 6).double()
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    pixels = plain_group_norm(x, layer.norm).flatten(2).transpose(1, 2)
    query = layer.query(pixels)
    wanted = torch.zeros_like(pixels)
    for b in range(2):
        rows = [layer.text_key_value(layer.text_norm(text[b, t])) for t in range(5) if mask[b, t]]
        if layer.key_value is not None:
            rows += [layer.key_value(pixels[b, n]) for n in range(9)]
        key, value = torch.stack(rows).chunk(2, dim=-1)
        for n in range(9):
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                scores = torch.exp(key[:, head] @ query[b, n, head] / 2)
                heads.append((scores / scores.sum()) @ value[:, head])
            wanted[b, n] = layer.out(torch.cat(heads))
    wanted = (x + wanted.transpose(1, 2).unflatten(-1, (3, 3))) / math.sqrt(2)
    torch.testing.assert_close(layer(x, text, mask), wanted, atol=1e-10, rtol=1e-8)


def test_branches_start_at_zero() -> None:
    x, cond, text = torch.randn(2, 8, 4, 4), torch.randn(2, 10), torch.randn(2, 3, 6)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(ResBlock(8, 8, 10, skip_scale=False)(x, cond), x)
    assert torch.equal(Attention(8, 6, 4, ff_mult=2, skip_scale=False)(x, text, mask), x)


def test_pooling_ignores_pads_and_normalises_the_text() -> None:
    pool = TextPool(6, 8, 2)
    text = torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    other = text.clone()
    other[0, 2:] = 100.0
    torch.testing.assert_close(pool(text, mask), pool(other, mask))
    torch.testing.assert_close(pool(text, mask), pool(50 * text + 3, mask), atol=1e-3, rtol=1e-3)  # LayerNorm first
    assert not torch.allclose(pool(text, mask)[1], pool(text.flip(0), mask.flip(0))[1])


def test_log_snr_embedding_keeps_fp32_until_after_the_sinusoids() -> None:
    embed = LogSnrEmbedding(16).bfloat16()
    near = torch.tensor([10.0, 10.03])  # the same number in bf16
    assert near[0].bfloat16() == near[1].bfloat16()
    out = embed(near, torch.bfloat16)
    assert out.dtype == torch.bfloat16 and not torch.equal(out[0], out[1])


def test_sizes_are_embedded_number_by_number_as_in_the_paper() -> None:
    """SDXL, section 2.2: sinusoids of each number (Vaswani et al. 2017: angle v / 10000^(i / 128)), concatenated."""
    values = torch.tensor([[1024.0, 768.0, 0.0, 13.5, 64.0, 64.0]])
    found = sinusoids(values, 128)
    assert found.shape == (1, 6, 256)
    for number, value in enumerate(values[0].tolist()):
        for i in (0, 1, 64, 127):
            angle = value / 10000 ** (i / 128)
            assert found[0, number, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert found[0, number, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)
    layer = SizeEmbedding(8)
    assert not layer(values, torch.float32).any(), "a stage begins as it would without"
    wanted = layer.mlp[1](layer.mlp[0](found.flatten(1))) @ torch.ones(8, 1)
    layer.mlp[2].weight.data.fill_(1.0)
    torch.testing.assert_close(layer(values, torch.float32), wanted.expand(1, 8))
