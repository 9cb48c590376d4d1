"""A training step of the U-Nets: milliseconds per counted GFLOP, compared with other implementations.

    python -m benchmarks.model_step          # one CPU thread, fp32, 12 M parameters
    python -m benchmarks.model_step gpu      # a GPU, bf16, 190 M parameters, uncompiled and compiled
    python -m benchmarks.model_step gpu dry  # the GPU code on a CPU, with the small networks

Peers are included if they are installed: `pip install diffusers einops beartype kornia einops-exts` and
`pip install --no-deps imagen-pytorch`.

Prints JSON lines and, at the end, a Markdown table for docs/benchmarks.md. Work is counted with torch's flop counter
(1 MAC = 2 FLOP) on one forward pass, times three.

A step is forward, backward and fused AdamW on noise, with the same picture size, number of text tokens and (to 2 %)
parameters for all models. Rounds are interleaved, so that all models see the same disturbances, and the median is
reported. On a GPU all weights are bf16; compiled means `compile_blocks` for ours and `torch.compile` of the whole
network for the others, with channels last for all. For the large U-Nets, and what each optimisation gains, see
benchmarks/model_gpu.py.
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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.config.unet import UNetConfig
from training.model.unet import UNet

ROUNDS = 5
SIDE, TOKENS = 64, 32


@dataclass(frozen=True)
class Scale:
    """The size of all networks: 64 px, three levels, attention at 32 and 16 px."""

    batch: int
    width: int
    """Channels of the first level."""
    head_dim: int

    @property
    def text(self) -> int:
        return 8 * self.width


CPU, GPU = Scale(4, 64, 32), Scale(64, 256, 64)


def seconds(work: Callable[[], Any], device: str) -> float:
    """Return the CPU seconds of this process or, on a GPU, wall-clock seconds."""
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
    """Return the FLOP/s of a square matrix product, best of six."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = min(seconds(lambda: a @ a, device) for _ in range(6))
    return 2 * side**3 / best


def show(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def table(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table with one column per key of the first row."""
    if rows:
        keys = list(rows[0])
        print("\n| " + " | ".join(keys) + " |\n" + "|---" * len(keys) + "|")
        for row in rows:
            print("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |")


# ------------------------------------------------------------------------------------------- CPU, beside peers


@dataclass
class Job:
    """A model and one batch; `forward()` returns its output."""

    name: str
    model: nn.Module
    forward: Callable[[], Tensor]

    def __post_init__(self) -> None:
        self.step_seconds: list[float] = []
        self.parameters = sum(p.numel() for p in self.model.parameters())
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            self.forward()
        self.flops = 3 * counter.get_total_flops()
        self.new_optimizer()

    def new_optimizer(self) -> None:
        """Create the optimizer, with moments in the current layout of the parameters."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        """Do a forward pass, a backward pass and an optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().float().square().mean().backward()
        self.optimizer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def own_unet(scale: Scale) -> Job:
    """Return the base U-Net of this project."""
    config = UNetConfig(
        widths=(scale.width, 2 * scale.width, 3 * scale.width),
        blocks=(2, 2, 2),
        self_attention=(False, True, True),
        cross_attention=(False, False, False),
        head_dim=scale.head_dim,
        text_dim=scale.text,
        cond_dim=4 * scale.width,
    )
    model = UNet(config)
    x, text = torch.randn(scale.batch, 3, SIDE, SIDE), torch.randn(scale.batch, TOKENS, scale.text)
    mask, level = torch.ones(scale.batch, TOKENS, dtype=torch.bool), torch.zeros(scale.batch)
    return Job("cascade", model, lambda: model(x, level, text, mask))


def diffusers_unet(scale: Scale) -> Job:
    """Return a UNet2DConditionModel with the same kind of blocks: scale-shift norm, text keys and values appended."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(scale.width, scale.width * 7 // 4, scale.width * 11 // 4),
        norm_num_groups=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=scale.text,
        attention_head_dim=scale.width // 4,
        resnet_time_scale_shift="scale_shift",
    )
    x, text = torch.randn(scale.batch, 3, SIDE, SIDE), torch.randn(scale.batch, TOKENS, scale.text)
    t = torch.zeros(scale.batch).long()
    return Job("diffusers", model, lambda: model(x, t, encoder_hidden_states=text).sample)


def imagen_unet(scale: Scale) -> Job:
    """Return imagen-pytorch's Unet; it attends to the `TOKENS` text tokens themselves, not to 256 padded or pooled."""
    model = imagen_class()(
        dim=scale.width,
        dim_mults=(1, 2, 3),
        num_resnet_blocks=2,
        layer_attns=(False, True, True),
        layer_cross_attns=(False, True, True),
        attn_heads=3 * scale.width // scale.head_dim,
        attn_dim_head=scale.head_dim,
        text_embed_dim=scale.text,
        cond_dim=4 * scale.width,
        max_text_len=TOKENS,
        attn_pool_text=False,
    )
    x, text = torch.randn(scale.batch, 3, SIDE, SIDE), torch.randn(scale.batch, TOKENS, scale.text)
    mask, times = torch.ones(scale.batch, TOKENS, dtype=torch.bool), torch.zeros(scale.batch)
    return Job("imagen-pytorch", model, lambda: model(x, times, text_embeds=text, text_mask=mask))


def imagen_class() -> Any:
    """Import `Unet` of imagen-pytorch without the rest of its package, which needs torchvision and datasets."""
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


NETWORKS = {"cascade": own_unet, "diffusers": diffusers_unet, "imagen_pytorch": imagen_unet}
"""Package -> its network; the others are compared with the first."""


def built(scale: Scale) -> list[Job]:
    """Return the networks whose packages are installed, after a first step."""
    jobs = []
    for package, build in NETWORKS.items():
        if package != "cascade" and not importlib.util.find_spec(package):
            show(model=package, left_out="not installed")
            continue
        jobs.append(build(scale))
        jobs[-1].step()
    return jobs


def compare(jobs: list[Job], peak: Callable[[], float], device: str, steps: int = 1) -> list[dict[str, Any]]:
    """Measure interleaved rounds of `steps` steps; return a row per network, relative to the first's time per GFLOP."""
    peaks = []
    for job in jobs:
        job.step_seconds.clear()
    for _ in range(ROUNDS):
        peaks.append(peak())
        for job in jobs:
            job.step_seconds.append(seconds(partial(job.steps, steps), device) / steps)
    rows = []
    for job in jobs:
        ratios = [
            (theirs / job.flops) / (ours / jobs[0].flops)
            for theirs, ours in zip(job.step_seconds, jobs[0].step_seconds, strict=True)
        ]
        median = statistics.median(job.step_seconds)
        rows.append(
            {
                "model": job.name,
                "parameters_M": round(job.parameters / 1e6, 2),
                "step_GFLOP": round(job.flops / 1e9, 1),
                "ms_per_step": round(1e3 * median, 1),
                "ms_per_GFLOP": float(f"{1e12 * median / job.flops:.3g}"),
                "of_matmul_peak": round(job.flops / median / statistics.median(peaks), 3),
                "times_ours_median": round(statistics.median(ratios), 2),
                "times_ours_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
        show(**rows[-1])
    show(matmul_peak_GFLOPs=round(statistics.median(peaks) / 1e9, 1), measured=[round(p / 1e9, 1) for p in peaks])
    return rows


def on_cpu() -> None:
    torch.set_num_threads(1)
    table(compare(built(CPU), lambda: matmul_rate("cpu", torch.float32, 1536), "cpu"))


def on_gpu(device: str = "cuda", scale: Scale = GPU) -> None:
    """Measure uncompiled and compiled networks; peers that do not compile are omitted from the latter."""
    backend = "inductor" if device == "cuda" else "eager"
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(device)
    torch.backends.cudnn.benchmark = True

    def peak() -> float:
        return matmul_rate(device, torch.bfloat16, 8192 if device == "cuda" else 512)

    if device == "cuda":
        show(device=torch.cuda.get_device_name(), torch=torch.__version__)
    jobs = built(scale)
    rows = [row | {"compiled": "no"} for row in compare(jobs, peak, device, steps=5)]
    for job in list(jobs):
        job.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        job.new_optimizer()
        if isinstance(job.model, UNet):
            job.model.compile_blocks(backend)
        else:
            job.model.compile(dynamic=False, backend=backend)
        try:
            job.step()
            job.step()
        except Exception as error:  # another package's code may fail to compile in any way
            show(model=job.name, left_out=str(error).splitlines()[0])
            jobs.remove(job)
    rows += [row | {"compiled": "yes"} for row in compare(jobs, peak, device, steps=5)]
    table(rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["gpu"]:
        on_gpu()
    elif sys.argv[1:] == ["gpu", "dry"]:
        on_gpu("cpu", CPU)
    else:
        on_cpu()
