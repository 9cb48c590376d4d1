from __future__ import annotations

import pytest

from training.cli.compose import load_config
from training.config.unet import PRESETS, UNetConfig, for_stage
from training.plan.flops import forward_flops, peak_tflops, training_flops


def test_counted_by_hand() -> None:
    """Widening only the last convolution's channels changes the count by exactly that convolution's work."""
    base = PRESETS["tiny_base"]
    small, large = forward_flops(base, 16, 8), forward_flops(base, 32, 8)
    assert 3.5 < large / small < 4.5, "four times the pixels; the text part stays"
    assert training_flops(base, 16, 8) == 3 * small


def test_super_resolution_is_counted_too() -> None:
    assert forward_flops(PRESETS["tiny_sr"], 32, 8) > 0
    assert isinstance(PRESETS["tiny_sr"], UNetConfig)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA H800 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA A100-PG509-200", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A40-8Q", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("AMD Instinct MI300X OAM", 1307.4),
        ("AMD Instinct MI250X/MI250", 191.5),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_fp32_has_peaks_of_its_own() -> None:
    """TF32 for the convolutions on NVIDIA's GPUs; on AMD's, PyTorch uses the fp32 matrix units."""
    assert [peak_tflops(name, "fp32") for name in ("NVIDIA A100-SXM4-40GB", "AMD Instinct MI300X")] == [156.0, 163.4]


def test_the_speedrun_keeps_to_its_price() -> None:
    """At most 200 H200-hours at the measured utilisation, without the text encoder, which `cascade plan` adds."""
    hours = 0.0
    for stage, mfu in (("base64", 0.451), ("sr256", 0.38)):
        config = load_config("train", ["experiment=speedrun", f"stage={stage}"])
        flops = training_flops(
            for_stage(config.stage, config.text.dim), config.stage.train_size, config.text.max_tokens
        )
        hours += flops * config.train.steps * config.data.global_batch / (989.4e12 * mfu) / 3600
    assert 100 < hours < 200
