"""A training step of the U-Nets: milliseconds per counted GFLOP beside other implementations, share of the matmul peak.

    python benchmarks/model_step.py                  # CPU, one thread, fp32; peers take part if they are installed:
                                                     #   pip install diffusers imagen-pytorch
    python benchmarks/model_step.py cuda             # base64, sr256, sr1024 in bf16: MFU, and what each trick brings
    python benchmarks/model_step.py cuda base64 64   # one preset at another batch

Prints JSON lines. A step is forward, backward and AdamW on noise. Work is counted with torch's flop counter (1 MAC = 2
FLOP) on one forward pass and taken three times; recomputation for activation checkpointing does not count. Rounds are
interleaved, so that all models see the same disturbances, and the median is reported.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.model.presets import PRESETS, UNetConfig
from training.model.unet import UNet

ROUNDS = 3
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 peaks, FLOP/s."""
SIDE, BATCH, TOKENS, TEXT = 64, 4, 32, 512
SMALL = UNetConfig(
    widths=(64, 128, 192),
    blocks=(2, 2, 2),
    self_attention=(False, True, True),
    cross_attention=(False, False, False),
    head_dim=32,
    text_dim=TEXT,
    cond_dim=256,
)
"""About the size of the peers' networks below: 64 px, three levels, attention at 32 and 16 px."""
CUDA_JOBS = {"base64": (64, 32), "sr256": (256, 16), "sr1024": (256, 16)}
"""Preset -> side of the training pictures, batch."""


@dataclass
class Job:
    """A model and one batch: `forward()` gives its output."""

    name: str
    model: nn.Module
    forward: Callable[[], Tensor]
    images: int

    def __post_init__(self) -> None:
        self.parameters = sum(p.numel() for p in self.model.parameters())
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            self.forward()
        self.flops = 3 * counter.get_total_flops()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        """Forward, backward and optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().float().square().mean().backward()
        self.optimizer.step()


def seconds(work: Callable[[], Any], device: str) -> float:
    """CPU seconds of this process, or wall seconds of the GPU."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product, best of five."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = min(seconds(lambda: a @ a, device) for _ in range(6))
    return 2 * side**3 / best


def show(**record: Any) -> None:
    print(json.dumps(record), flush=True)


# ------------------------------------------------------------------------------------------- CPU, beside peers


def ours(config: UNetConfig, side: int, batch: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Job:
    """The U-Net of this project."""
    with torch.device(device):
        model = UNet(config).to(dtype)
        x, text = torch.randn(batch, 3, side, side), torch.randn(batch, TOKENS, config.text_dim)
        given = [x, torch.zeros(batch), text, torch.ones(batch, TOKENS, dtype=torch.bool)]
        if config.low_res:
            given += [torch.randn_like(x), torch.zeros(batch)]
    return Job("cascade", model, lambda: model(*given), batch)


def diffusers_unet() -> Job:
    """UNet2DConditionModel with the same kind of blocks: scale-shift norm, added text keys and values."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(64, 128, 192),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=TEXT,
        attention_head_dim=32,
        resnet_time_scale_shift="scale_shift",
    )
    x, text, t = torch.randn(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, TEXT), torch.zeros(BATCH).long()
    return Job("diffusers", model, lambda: model(x, t, encoder_hidden_states=text).sample, BATCH)


def imagen_unet() -> Job:
    """imagen-pytorch's Unet of about the same size."""
    from imagen_pytorch import Unet

    model = Unet(
        dim=64,
        dim_mults=(1, 2, 3),
        num_resnet_blocks=2,
        layer_attns=(False, True, True),
        layer_cross_attns=(False, True, True),
        attn_heads=4,
        attn_dim_head=32,
        text_embed_dim=TEXT,
        cond_dim=128,
    )
    x, text = torch.randn(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, TEXT)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return Job("imagen-pytorch", model, lambda: model(x, torch.zeros(BATCH), text_embeds=text, text_mask=mask), BATCH)


def on_cpu() -> None:
    torch.set_num_threads(1)
    jobs = [ours(SMALL, SIDE, BATCH)]
    for package, build in (("diffusers", diffusers_unet), ("imagen_pytorch", imagen_unet)):
        if importlib.util.find_spec(package):
            jobs.append(build())
        else:
            show(model=package, left_out="not installed")
    times: dict[str, list[float]] = {job.name: [] for job in jobs}
    peaks = []
    for job in jobs:
        job.step()
    for _ in range(ROUNDS):
        peaks.append(matmul_rate("cpu", torch.float32, 1536))
        for job in jobs:
            times[job.name].append(seconds(job.step, "cpu"))
    peak = statistics.median(peaks)
    own = statistics.median(times["cascade"]) / jobs[0].flops
    for job in jobs:
        median = statistics.median(times[job.name])
        show(
            model=job.name,
            parameters_M=round(job.parameters / 1e6, 1),
            step_GFLOP=round(job.flops / 1e9, 1),
            ms_per_step=round(1e3 * median, 1),
            ms_per_GFLOP=round(1e12 * median / job.flops, 2),
            matmul_peak_GFLOPs=round(peak / 1e9, 1),
            share_of_peak=round(job.flops / median / peak, 3),
            times_slower_than_cascade=round(median / job.flops / own, 2),
        )


# ------------------------------------------------------------------------------------ GPU, one trick at a time


def on_cuda(presets: list[str], batch: int | None) -> None:
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    measured = matmul_rate("cuda", torch.bfloat16, 8192)
    show(device=name, stated_peak_TFLOPs=peak and peak / 1e12, matmul_TFLOPs=round(measured / 1e12, 1))
    for preset in presets:
        side, count = CUDA_JOBS[preset]
        count = batch or count
        tricks: list[tuple[str, dict[str, Any]]] = [
            ("bf16", {}),
            ("+ channels last", {"channels_last": True}),
            ("+ compiled blocks", {"channels_last": True, "compiled": True}),
            ("+ twice the batch, checkpointed", {"channels_last": True, "compiled": True, "checkpoint": True}),
        ]
        for trick, options in tricks:
            try:
                measure(preset, side, count * (2 if "checkpoint" in options else 1), trick, options, peak or measured)
            except torch.cuda.OutOfMemoryError:
                show(preset=preset, trick=trick, left_out="out of memory")
            torch.cuda.empty_cache()


def measure(preset: str, side: int, count: int, trick: str, options: dict[str, Any], peak: float) -> None:
    """One row: the median of `ROUNDS` times ten steps after a warm-up."""
    config = replace(PRESETS[preset], checkpoint_blocks=options.get("checkpoint", False))
    job = ours(config, side, count, device="cuda", dtype=torch.bfloat16)
    model = job.model.train()
    if options.get("channels_last"):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.get("compiled"):
        model.compile_blocks()  # type: ignore[operator]
    for _ in range(3):
        job.step()
    torch.cuda.reset_peak_memory_stats()

    def ten() -> None:
        for _ in range(10):
            job.step()

    median = statistics.median(seconds(ten, "cuda") for _ in range(ROUNDS)) / 10
    show(
        preset=preset,
        trick=trick,
        side=side,
        batch=count,
        parameters_M=round(job.parameters / 1e6),
        step_TFLOP=round(job.flops / 1e12, 2),
        ms_per_step=round(1e3 * median, 1),
        images_per_second=round(count / median, 1),
        MFU=round(job.flops / median / peak, 3),
        peak_GB=round(torch.cuda.max_memory_allocated() / 1e9, 1),
    )


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["cuda"]:
        on_cuda([words[1]] if len(words) > 1 else list(CUDA_JOBS), int(words[2]) if len(words) > 2 else None)
    else:
        on_cpu()


if __name__ == "__main__":
    main()
