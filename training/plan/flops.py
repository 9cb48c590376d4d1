"""Counted floating-point operations, and the device peaks that model FLOPs utilisation (MFU) refers to."""

from __future__ import annotations

import functools
import re

from training.config.unet import UNetConfig

PEAK_TFLOPS = {
    "GB200": 2450.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800 PCIe": 756.0,
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
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.2,
}
"""Dense bf16 matrix TFLOP/s from the vendors' data sheets (sparse figures halved), by words of the device's name. Each
of the two dies of an MI250X is a device, with half of the sheet's figure."""
FP32_MATRIX_TFLOPS = {"MI300X": 163.4, "MI250X": 47.9}
"""Matrix TFLOP/s in fp32 of devices for which PyTorch does not use TF32 on its own."""
NOT_TOLD_APART = re.compile(
    r"NVIDIA|AMD|Tesla|GeForce|Instinct|OAM|Active|PCIE?|SXM\d?|HBM\d?e?|\d+GB?|PG\d+|\d+|MI250", re.I
)
"""Words of a device's name that do not change its peak: vendor, form factor and memory. Rows of the table name the
form factors that do."""


def peak_tflops(device_name: str, dtype: str = "bf16") -> float | None:
    """Return the dense peak of a GPU (`torch.cuda.get_device_name`) in a format of `precision.dtype`; None if it is not
    in the table. A name with any other word is another device: a part (MIG), a laptop's, a Ti, an A10G."""
    words = set(re.findall(r"\w+", device_name))
    fitting = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    if not fitting:
        return None
    row = max(fitting, key=len)
    others = words.difference(row.split())
    return row_tflops(row, dtype) if all(NOT_TOLD_APART.fullmatch(word) for word in others) else None


def row_tflops(row: str, dtype: str) -> float:
    """Return the dense peak of a row of `PEAK_TFLOPS`, in TFLOP/s. In fp32, PyTorch runs convolutions in TF32, whose
    peak is half of that of bf16; its matrix products run in full fp32 and do not reach it."""
    return PEAK_TFLOPS[row] if dtype != "fp32" else FP32_MATRIX_TFLOPS.get(row, PEAK_TFLOPS[row] / 2)


@functools.cache
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
    dtype: str,
    stated_tflops: float,
    frozen: bool = False,
    teacher_passes: int = 0,
) -> tuple[float, float]:
    """Return the FLOPs of training on one picture (see `training_flops`), and the device's peak in FLOP/s
    for `precision.dtype`: `stated_tflops`, otherwise the data sheet's. Both are zero if no peak is known."""
    import torch

    peak = stated_tflops or (device != "cpu" and peak_tflops(torch.cuda.get_device_name(), dtype)) or 0.0
    flops = float(training_flops(config, size, tokens, frozen, teacher_passes)) if peak else 0.0
    return flops, peak * 1e12
