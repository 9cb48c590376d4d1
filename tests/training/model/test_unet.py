"""The U-Nets as a whole: every parameter is used, pads have no effect, batch invariance, precision, checkpointing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.config.unet import PRESETS, UNetConfig
from training.model.layers import Attention, DownConv, ResBlock
from training.model.unet import UNet, UNetBlock, record_attention

BASE = replace(
    PRESETS["tiny_base"], text_width=24, self_attention=(True, True), cross_attention=(False, True), ff_mult=1
)
SR = replace(PRESETS["tiny_sr"], null_text="learned", cross_attention=(True, False))
KINDS = {"base": BASE, "learned": replace(BASE, null_text="learned"), "sr": SR, "tiny": PRESETS["tiny_base"]}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def build(config: UNetConfig, trained: bool = True) -> UNet:
    """The U-Net; `trained`: with random numbers in place of its initial zeros."""
    net = UNet(config)
    if trained:
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return net


def inputs(config: UNetConfig, count: int = 3) -> dict[str, Any]:
    side = config.divisor * 2
    mask = torch.ones(count, 5, dtype=torch.bool)
    mask[0, 2:] = False
    mask[-1] = False
    given: dict[str, Any] = {
        "x": torch.randn(count, 3, side, side),
        "log_snr": torch.linspace(-6, 6, count),
        "text": torch.randn(count, 5, config.text_dim),
        "text_mask": mask,
    }
    if config.low_res:
        given |= {"low_res": torch.randn(count, 3, side, side), "aug_log_snr": torch.linspace(-1, 9, count)}
    return given


def channels_last(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for name, tensor in given.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_after_two_steps(kind: str) -> None:
    net, given = build(KINDS[kind], trained=False), inputs(KINDS[kind])
    assert not net(**given).any()  # zero-initialised output
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (net(**given) - given["x"]).square().mean().backward()
        optimizer.step()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pads_change_nothing(kind: str) -> None:
    net, given = build(KINDS[kind]), inputs(KINDS[kind])
    wanted = net(**given)
    noise = torch.randn_like(given["text"]) * 100
    given["text"] = torch.where(given["text_mask"][:, :, None], given["text"], noise)
    assert torch.equal(net(**given), wanted)
    given["text"] = torch.cat([given["text"], torch.randn(3, 4, net.config.text_dim)], dim=1)
    given["text_mask"] = torch.cat([given["text_mask"], torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(net(**given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_matters_and_no_text_is_finite(kind: str) -> None:
    net, given = build(KINDS[kind]), inputs(KINDS[kind])
    wanted = net(**given)
    assert wanted.isfinite().all() and wanted.shape == given["x"].shape and wanted.dtype == torch.float32
    for name in set(given) - {"text_mask"}:
        assert not torch.allclose(net(**{**given, name: given[name] + 0.5 * torch.randn_like(given[name])}), wanted)
    unmasked = {**given, "text_mask": torch.ones_like(given["text_mask"])}
    assert not torch.allclose(net(**unmasked), wanted)


def test_without_text_the_output_is_the_same_for_every_prompt() -> None:
    net, given = build(BASE), inputs(BASE)
    given["text_mask"] = torch.zeros_like(given["text_mask"])
    assert torch.equal(net(**given), net(**{**given, "text": torch.randn_like(given["text"])}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_does_not_depend_on_its_batch(kind: str) -> None:
    net, given = build(KINDS[kind]), inputs(KINDS[kind])
    alone = net(**{name: value[1:2] for name, value in given.items()})
    torch.testing.assert_close(net(**given)[1:2], alone, atol=1e-5, rtol=1e-5)


def test_learned_null_is_a_parameter_that_the_checkpoint_holds_and_zero_is_not() -> None:
    assert "null_text" in build(KINDS["learned"]).state_dict()
    assert "null_text" not in build(KINDS["base"]).state_dict()


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_bf16_forward_is_near_fp32(kind: str) -> None:
    net, given = build(KINDS[kind]), inputs(KINDS[kind])
    wanted = net(**given)
    got = net.bfloat16()(**given)
    assert got.dtype == torch.float32
    assert (got - wanted).square().mean().sqrt() < 0.03 * wanted.square().mean().sqrt()


@pytest.mark.parametrize("kind", ["base", "sr"])
def test_activation_checkpointing_changes_no_number(kind: str) -> None:
    def gradients(config: UNetConfig) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = build(config).train()
        torch.manual_seed(1)
        net(**inputs(config)).square().mean().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    plain, again = (gradients(replace(KINDS[kind], checkpoint_blocks=flag)) for flag in (False, True))
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], msg=name)


def test_efficient_unet_shrinks_before_its_blocks_and_grows_after_them() -> None:
    net, given = build(SR), inputs(SR)
    sides: list[tuple[str, int]] = []
    for name, unit in [*net.down.named_children(), *net.up.named_children()]:
        unit.register_forward_hook(
            lambda module, args, out, name=name: sides.append((type(module.main).__name__, out.shape[-1]))
        )
    net(**given)
    stem = given["x"].shape[-1] // SR.patch
    assert sides[:2] == [("DownConv", stem // 2), ("ResBlock", stem // 2)]
    assert sides[-2:] == [("ResBlock", stem // 2), ("UpConv", stem)]


def test_super_resolution_without_its_low_res_picture_is_refused() -> None:
    given = inputs(SR)
    del given["low_res"]
    with pytest.raises(ValueError, match="low_res"):
        build(SR)(**given)


def test_attention_maps_are_the_weights_of_the_text() -> None:
    net, given = build(BASE), inputs(BASE)
    with record_attention(net) as layers:
        net(**given)
    assert len(layers) == sum(isinstance(module, Attention) for module in net.modules())
    for (weights,) in layers:
        assert weights.shape[:2] == (3, 6) and weights.min() >= 0
        total = weights.sum(1)
        assert total.max() <= 1 + 1e-5 and total.min() > 0
        assert not weights[0, 3:].any() and not weights[2, 1:].any()  # pads draw nothing
    assert all(module.maps is None for module in net.modules() if isinstance(module, Attention))


def test_recording_attention_changes_no_picture() -> None:
    net, given = build(BASE), inputs(BASE)
    wanted = net(**given)
    with record_attention(net):
        assert torch.equal(net(**given), wanted)


def test_compiled_blocks_keep_the_names_and_the_numbers() -> None:
    net, given = build(SR), inputs(SR)
    wanted, names = net(**given), list(net.state_dict())
    net.compile_blocks(backend="eager")
    torch.testing.assert_close(net(**given), wanted, atol=1e-5, rtol=1e-5)
    assert list(net.state_dict()) == names and not any("_orig_mod" in name for name in names)
    build(SR).load_state_dict(net.state_dict())


def test_every_shape_of_block_is_compiled_separately() -> None:
    """torch by itself gives up after 8 shapes of one function, and makes sizes variable after two."""
    config = replace(
        PRESETS["base64"],
        widths=(16, 32, 48, 64),
        text_dim=16,
        text_width=16,
        cond_dim=16,
        text_pool_heads=2,
        head_dim=8,
    )
    net, given = build(config), channels_last(inputs(config))
    sizes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        sizes.extend(x.shape if isinstance(x, Tensor) else x for x in examples)
        shapes.append(graph)
        return graph

    shapes: list[torch.fx.GraphModule] = []
    net(**given).square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch._dynamo.reset()
    net.compile_blocks(backend=backend)
    net(**given).square().mean().backward()
    assert len(shapes) == 17 + 3 + 1, "residual blocks, attentions, the head"
    assert not any(
        isinstance(n, torch.SymInt) for size in sizes for n in (size if isinstance(size, torch.Size) else [size])
    )
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


def test_ends_and_strides_are_those_of_the_paper() -> None:
    net = build(SR, trained=False)
    assert [m.conv.kernel_size + m.conv.stride for m in net.modules() if isinstance(m, DownConv)] == [(3, 3, 2, 2)] * 2
    assert isinstance(net.norm_out, nn.GroupNorm) and net.conv_out.kernel_size == (3, 3)  # not a bare 1x1 convolution
    assert not any(p.any() for p in net.conv_out.parameters())
    for block in (m for m in net.modules() if isinstance(m, ResBlock)):
        assert not any(p.any() for p in block.conv_out.parameters()) and block.conv_in.weight.any()
    for layer in (m for m in net.modules() if isinstance(m, Attention)):
        assert not any(p.any() for p in layer.out.parameters())


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", ["base", "sr"])
def test_tensors_stay_channels_last(kind: str, patch: int) -> None:
    """Every tensor on the way has the layout of the first; a GPU would convert any other layout in each convolution."""
    config = replace(KINDS[kind], patch=patch)
    net, given = build(config), inputs(config)
    found: dict[str, Any] = {}
    for name, module in net.named_modules():
        if isinstance(module, (UNetBlock, nn.Conv2d)):
            module.register_forward_hook(lambda *args, name=name: found.setdefault(name, args[-1]))
    net(**channels_last(given))
    astray = [name for name, h in found.items() if not h.is_contiguous(memory_format=torch.channels_last)]
    assert len(found) > 10 and not astray
