"""Counted floating-point operations, and the device peaks that model FLOPs utilisation (MFU) refers to."""

from __future__ import annotations

import re

from training.config.unet import UNetConfig

PEAK_TFLOPS = {
    "GB200": 2450.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A10": 125.0,
    "L4": 121.0,
    "MI300X": 1307.4,
    "MI250X": 191.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
}
"""Dense bf16 matrix TFLOP/s from the vendors' data sheets (sparse figures halved), by words of the device's name. Each
of the two dies of an MI250X is a device, with half of the sheet's figure."""


def peak_tflops(device_name: str) -> float | None:
    """Return the data sheet's peak of a GPU (`torch.cuda.get_device_name`); None if it is not in the table."""
    words = set(re.findall(r"\w+", device_name))  # whole ones: an RTX A4000 is no A40, an A10G no A10
    fitting = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def forward_flops(config: UNetConfig, size: int, tokens: int) -> int:
    """Count the floating-point operations (2 per multiply-add) of one forward pass for one picture, on tensors without
    data.

    Args:
        size: side of the picture that the network sees, pixels (the crop, if it is trained on crops).
        tokens: length of the text in tokens.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from training.model.unet import UNet

    with torch.device("meta"):
        model = UNet(config)
        x, level = torch.empty(1, config.channels, size, size), torch.empty(1)
        text, mask = torch.empty(1, tokens, config.text_dim), torch.ones(1, tokens, dtype=torch.bool)
        low_res = (torch.empty_like(x), level) if config.low_res else (None, None)
        sizes = torch.empty(1, 6) if config.size_condition else None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, level, text, mask, *low_res, sizes)
    return int(counter.get_total_flops())


def training_flops(config: UNetConfig, size: int, tokens: int, frozen: bool = False, teacher_passes: int = 0) -> int:
    """Count the floating-point operations of training on one picture.

    The backward pass costs twice the forward pass, or as much if the weights are `frozen` (their gradients are not
    computed; adapters are not counted). Recomputed activations do not count either, so recomputing lowers MFU. A
    teacher with the same network adds its forward passes.
    """
    return ((2 if frozen else 3) + teacher_passes) * forward_flops(config, size, tokens)


def flops_and_peak(
    config: UNetConfig,
    size: int,
    tokens: int,
    device: str,
    stated_tflops: float,
    frozen: bool = False,
    teacher_passes: int = 0,
) -> tuple[float, float]:
    """Return the FLOPs of training on one picture (see `training_flops`), and the device's peak in FLOP/s:
    `stated_tflops`, otherwise the data sheet's. Both are zero if no peak is known."""
    import torch

    peak = stated_tflops or (device != "cpu" and peak_tflops(torch.cuda.get_device_name())) or 0.0
    flops = float(training_flops(config, size, tokens, frozen, teacher_passes)) if peak else 0.0
    return flops, peak * 1e12
