"""Counted floating-point operations, and the peaks that a share of them is stated of (MFU)."""

from __future__ import annotations

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
    "MI250X": 383.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
}
"""Dense bf16 matrix TFLOP/s from the makers' data sheets (their sparse figures halved), by a part of the device's
name."""


def peak_tflops(device_name: str) -> float | None:
    """The stated peak of a GPU (`torch.cuda.get_device_name`); None when it is not in the table."""
    fitting = [name for name in PEAK_TFLOPS if all(word in device_name for word in name.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def forward_flops(config: UNetConfig, size: int, tokens: int) -> int:
    """Floating-point operations (2 per multiply-add) of one forward pass for one picture, counted on tensors without
    data.

    Args:
        size: side of the picture that the network sees, pixels (the crop where it is trained on crops).
        tokens: length of the text.
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
    """Of one picture's share of a step: the backward pass costs twice the forward one, once where the weights are
    `frozen` (their gradients are not computed; adapters beside them are not counted). Recomputed activations do not
    count either (the work is the same, so MFU falls when they are recomputed). A teacher of the same network adds its
    forward passes."""
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
    """FLOPs of training on one picture (see `training_flops`), and the peak of the device per second: the stated one,
    else the data sheet's. Zeros where no peak is known."""
    import torch

    peak = stated_tflops or (device != "cpu" and peak_tflops(torch.cuda.get_device_name())) or 0.0
    flops = float(training_flops(config, size, tokens, frozen, teacher_passes)) if peak else 0.0
    return flops, peak * 1e12
