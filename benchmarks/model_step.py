"""A training step of the U-Nets on a CPU (one thread, fp32): milliseconds per counted GFLOP beside other
implementations.

    python -m benchmarks.model_step     # peers take part if they are installed:
                                        #   pip install diffusers; pip install --no-deps imagen-pytorch

Prints JSON lines and, last, a Markdown table for docs/benchmarks.md. Work is counted with torch's flop counter (1 MAC =
2 FLOP) on one forward pass and taken three times.

Forward, backward and AdamW on noise, equal pictures, text tokens and (to 2 %) parameters for all. Rounds are
interleaved, so that all models see the same disturbances, and the median is reported. GPUs: benchmarks/model_gpu.py.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.model.presets import UNetConfig
from training.model.unet import UNet

ROUNDS = 5
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
"""64 px, three levels, attention at 32 and 16 px: 11.8e6 parameters, as the peers' networks below."""


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
    """FLOP/s of a square matrix product, best of six."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = min(seconds(lambda: a @ a, device) for _ in range(6))
    return 2 * side**3 / best


def show(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def table(rows: list[dict[str, Any]]) -> None:
    """Markdown, one column per key of the first row."""
    if rows:
        keys = list(rows[0])
        print("\n| " + " | ".join(keys) + " |\n" + "|---" * len(keys) + "|")
        for row in rows:
            print("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |")


# ------------------------------------------------------------------------------------------- CPU, beside peers


@dataclass
class Job:
    """A model and one batch: `forward()` gives its output."""

    name: str
    model: nn.Module
    forward: Callable[[], Tensor]

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


def own_unet() -> Job:
    """The base U-Net of this project."""
    model = UNet(SMALL)
    x, text = torch.randn(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, TEXT)
    mask, level = torch.ones(BATCH, TOKENS, dtype=torch.bool), torch.zeros(BATCH)
    return Job("cascade", model, lambda: model(x, level, text, mask))


def diffusers_unet() -> Job:
    """UNet2DConditionModel with the same kind of blocks: scale-shift norm, text keys and values appended."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(64, 112, 176),
        norm_num_groups=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=TEXT,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
    )
    x, text, t = torch.randn(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, TEXT), torch.zeros(BATCH).long()
    return Job("diffusers", model, lambda: model(x, t, encoder_hidden_states=text).sample)


def imagen_unet() -> Job:
    """imagen-pytorch's Unet; its attention sees the `TOKENS` text tokens themselves, not 256 padded or pooled ones."""
    model = imagen_class()(
        dim=64,
        dim_mults=(1, 2, 3),
        num_resnet_blocks=2,
        layer_attns=(False, True, True),
        layer_cross_attns=(False, True, True),
        attn_heads=6,
        attn_dim_head=32,
        text_embed_dim=TEXT,
        cond_dim=256,
        max_text_len=TOKENS,
        attn_pool_text=False,
    )
    x, text = torch.randn(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, TOKENS, TEXT)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return Job("imagen-pytorch", model, lambda: model(x, torch.zeros(BATCH), text_embeds=text, text_mask=mask))


def imagen_class() -> Any:
    """The `Unet` of imagen-pytorch without the rest of its package, which wants torchvision, datasets and the hub."""
    import transformers

    spec = importlib.util.find_spec("imagen_pytorch")
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType("imagen_pytorch")
    package.__path__ = list(spec.submodule_search_locations)
    vision, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    vision.transforms = transforms  # type: ignore[attr-defined]
    for name in ("Compose", "Resize", "CenterCrop", "Lambda", "RandomHorizontalFlip", "ToTensor", "Normalize"):
        setattr(transforms, name, object)
    with _replaced_modules({"torchvision": vision, "torchvision.transforms": transforms, "imagen_pytorch": package}):
        ask = transformers.T5Config.from_pretrained
        transformers.T5Config.from_pretrained = classmethod(lambda cls, *_, **__: cls())  # type: ignore[assignment]
        try:
            return importlib.import_module("imagen_pytorch.imagen_pytorch").Unet
        finally:
            transformers.T5Config.from_pretrained = ask  # type: ignore[method-assign]


@contextmanager
def _replaced_modules(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    missing = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)


def on_cpu() -> None:
    torch.set_num_threads(1)
    jobs = [own_unet()]
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
    rows = []
    for job in jobs:
        ratios = [
            (theirs / job.flops) / (ours / jobs[0].flops)
            for theirs, ours in zip(times[job.name], times[jobs[0].name], strict=True)
        ]
        median = statistics.median(times[job.name])
        rows.append(
            {
                "model": job.name,
                "parameters_M": round(job.parameters / 1e6, 2),
                "step_GFLOP": round(job.flops / 1e9, 1),
                "ms_per_step": round(1e3 * median),
                "ms_per_GFLOP": round(1e12 * median / job.flops, 2),
                "of_matmul_peak": round(job.flops / median / peak, 3),
                "times_ours_median": round(statistics.median(ratios), 2),
                "times_ours_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
        show(**rows[-1])
    show(matmul_peak_GFLOPs=round(peak / 1e9, 1), measured=[round(p / 1e9, 1) for p in peaks])
    table(rows)


if __name__ == "__main__":
    on_cpu()
