"""A training step of the U-Nets: milliseconds per counted GFLOP beside other implementations; MFU and what each trick
brings.

    python benchmarks/model_step.py                  # CPU, one thread, fp32; peers take part if they are installed:
                                                     #   pip install diffusers; pip install --no-deps imagen-pytorch
    python benchmarks/model_step.py cuda             # base64, sr256, sr1024 in bf16 on the GPU at hand
    python benchmarks/model_step.py cuda base64 64   # one preset at another batch
    python benchmarks/model_step.py dry              # the code of the GPU part on the CPU, with tiny networks

Prints JSON lines and, last, a Markdown table for docs/benchmarks.md. Work is counted with torch's flop counter (1 MAC =
2 FLOP) on one forward pass and taken three times; recomputation for activation checkpointing does not count, so MFU is
of useful work.

CPU: forward, backward and AdamW on noise, equal pictures, text tokens and (to 2 %) parameters for all. Rounds are
interleaved, so that all models see the same disturbances, and the median is reported.
GPU: what training does: the objective (`training.diffusion.objective.loss`), bf16 weights, AdamW on fp32 masters.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.diffusion.objective import loss
from training.diffusion.settings import DiffusionConfig
from training.flops import peak_tflops, training_flops
from training.model.presets import PRESETS, UNetConfig
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


# ------------------------------------------------------------------------------------ GPU, one trick at a time

GPU_JOBS = {"base64": (64, 32), "sr256": (256, 16), "sr1024": (256, 16)}
"""Preset -> side of the training pictures (sr1024: crops), batch."""
DRY_JOBS = {"tiny_base": (16, 4), "tiny_sr": (16, 4)}


@dataclass(frozen=True)
class Tricks:
    fused_attention: bool = False
    fused_optimizer: bool = False
    channels_last: bool = False
    compiled: bool = False
    checkpointed: bool = False
    """Activation checkpointing, and twice the batch."""


LADDER = {
    "bf16 alone": Tricks(),
    "+ fused attention": Tricks(True),
    "+ fused optimizer": Tricks(True, True),
    "+ channels last": Tricks(True, True, True),
    "+ compiled blocks": Tricks(True, True, True, True),
    "+ checkpointing, twice the batch": Tricks(True, True, True, True, True),
}


class Masters:
    """AdamW on fp32 copies of lower-precision weights, as ZeRO keeps them."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=fused, foreach=not fused)

    @torch.no_grad()
    def step(self) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)
        for master in self.masters:
            master.grad = None


class Training:
    """One network and one batch on a device, with some of the tricks."""

    def __init__(self, preset: str, side: int, batch: int, tricks: Tricks, device: str) -> None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        config = replace(PRESETS[preset], checkpoint_blocks=tricks.checkpointed)
        self.tricks, self.batch = tricks, batch
        self.flops = batch * training_flops(config, side, TOKENS)
        with torch.device(device):
            self.model = UNet(config).to(dtype).train()
            self.images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
            self.low = torch.randint(0, 256, (batch, 3, side // 4, side // 4), dtype=torch.uint8)
            self.text = torch.randn(batch, TOKENS, config.text_dim)
            self.mask = torch.ones(batch, TOKENS, dtype=torch.bool)
            self.positions = torch.arange(batch)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if tricks.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if tricks.compiled:
            self.model.compile_blocks("inductor" if device != "cpu" else "eager")
        self.masters = Masters(self.model, tricks.fused_optimizer)
        self.diffusion = DiffusionConfig(weighting="min_snr")

    def step(self) -> None:
        low = self.low if self.model.config.low_res else None
        with nullcontext() if self.tricks.fused_attention else sdpa_kernel(SDPBackend.MATH):
            mean, _ = loss(
                self.model, self.images, self.text, self.mask,
                config=self.diffusion, seed=0, positions=self.positions, low_res=low, global_batch=self.batch,
            )  # fmt: skip
            mean.backward()
        self.masters.step()


def host_syncs(training: Training) -> str:
    """What in a step makes the host wait for the GPU; `none` is wanted."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
        return "none"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(preset: str, side: int, batch: int, trick: str, peak: float, device: str) -> dict[str, Any]:
    """One row: the median of `ROUNDS` times some steps after a warm-up."""
    steps = 10 if device != "cpu" else 1
    training = Training(preset, side, batch, LADDER[trick], device)
    for _ in range(3):
        training.step()
    syncs = host_syncs(training) if device != "cpu" else "not looked at"
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()

    def some() -> None:
        for _ in range(steps):
            training.step()

    median = statistics.median(seconds(some, device) for _ in range(ROUNDS)) / steps
    return {
        "preset": preset,
        "trick": trick,
        "side": side,
        "batch": batch,
        "parameters_M": round(training.parameters / 1e6),
        "step_TFLOP": round(training.flops / 1e12, 3),
        "ms_per_step": round(1e3 * median, 1),
        "images_per_second": round(batch / median, 1),
        "MFU": round(training.flops / median / peak, 3),
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device != "cpu" else 0,
        "host_syncs": syncs,
    }


def ladder(jobs: dict[str, tuple[int, int]], device: str) -> None:
    """Every preset with one trick more each time; a batch that does not fit is halved."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    measured = matmul_rate(device, dtype, 8192 if device != "cpu" else 512)
    stated = (peak_tflops(name) or 0.0) * 1e12
    show(device=name, stated_dense_peak_TFLOPs=stated / 1e12, matmul_TFLOPs=round(measured / 1e12, 3))
    rows = []
    for preset, (side, batch) in jobs.items():
        for trick, tricks in LADDER.items():
            count = batch * 2 if tricks.checkpointed else batch
            while count:
                try:
                    rows.append(measure(preset, side, count, trick, stated or measured, device))
                    show(**rows[-1])
                    break
                except torch.cuda.OutOfMemoryError:
                    show(preset=preset, trick=trick, batch=count, left_out="out of memory")
                    count //= 2
                finally:
                    if device != "cpu":
                        torch.cuda.empty_cache()
            torch._dynamo.reset()
    table(rows)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["cuda"]:
        side, batch = GPU_JOBS[words[1]] if len(words) > 1 else (0, 0)
        ladder({words[1]: (side, int(words[2]) if len(words) > 2 else batch)} if len(words) > 1 else GPU_JOBS, "cuda")
    elif words[:1] == ["dry"]:
        torch.set_num_threads(1)
        ladder(DRY_JOBS, "cpu")
    else:
        on_cpu()


if __name__ == "__main__":
    main()
