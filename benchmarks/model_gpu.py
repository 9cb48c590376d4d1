"""A training step of the large U-Nets on a GPU in bf16: milliseconds, images/s, MFU, and what each optimisation gains.

    python -m benchmarks.model_gpu                        # base64, sr256, sr1024
    python -m benchmarks.model_gpu base64 batch=32        # one of them, with another batch size
    python -m benchmarks.model_gpu base64 rows=compiled,deepspeed profile=true    # two rows, and where their time goes
    python -m benchmarks.model_gpu dry                    # the same code on a CPU, with tiny networks

Each row adds one optimisation to the one above; the last rows are the training engine itself (DeepSpeed ZeRO 1 on one
device, with clipping and a moving average). The step is that of training: the objective
(`training.diffusion.objective.loss`) on uint8 pictures, and AdamW on fp32 masters.

MFU: FLOPs counted with torch's flop counter (1 MAC = 2 FLOP) on one forward pass, times three, over the data sheet's
dense bf16 peak. Recomputation for activation checkpointing does not count. Prints JSON lines and, at the end, a
Markdown table for docs/benchmarks.md; a batch that does not fit is halved.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.model_step import matmul_rate, seconds, show, table
from training.config.diffusion import DiffusionConfig
from training.config.experiment import Experiment
from training.config.unet import PRESETS, UNetConfig
from training.diffusion import random
from training.diffusion.objective import loss
from training.engine.start import build_engine, init_distributed
from training.model.unet import UNet
from training.plan.flops import peak_tflops, training_flops
from training.processes.launcher import free_port
from training.processes.ranks import Ranks

TOKENS, ROUNDS, STEPS = 128, 3, 5
JOBS = {"base64": (64, 64), "sr256": (256, 96), "sr1024": (256, 96)}
"""Preset -> side of the training pictures (of sr1024: of its crops), batch size."""
DRY_JOBS = {"tiny_base": (16, 4), "tiny_sr": (16, 4)}


@dataclass(frozen=True)
class Tricks:
    fused_attention: bool = False
    fused_optimizer: bool = False
    channels_last: bool = False
    autotuned: bool = False
    """cuDNN tries its convolution algorithms and keeps the fastest."""
    compiled: bool = False
    deepspeed: bool = False
    checkpointed: bool = False
    """Activation checkpointing, with twice the batch."""


LADDER = {
    "plain": Tricks(),
    "attention": Tricks(True),
    "optimizer": Tricks(True, True),
    "channels_last": Tricks(True, True, True),
    "autotuned": Tricks(True, True, True, True),
    "compiled": Tricks(True, True, True, True, True),
    "deepspeed": Tricks(True, True, True, True, True, True),
    "checkpointed": Tricks(True, True, True, True, True, True, True),
}
TITLES = {
    "plain": "bf16 alone",
    "attention": "+ fused attention",
    "optimizer": "+ fused optimizer",
    "channels_last": "+ channels last",
    "autotuned": "+ cuDNN autotuning",
    "compiled": "+ compiled blocks",
    "deepspeed": "the engine: DeepSpeed ZeRO 1, clipping, moving average",
    "checkpointed": "the engine with activation checkpointing, twice the batch",
}


class Masters:
    """AdamW on fp32 copies of lower-precision weights, like ZeRO's."""

    def __init__(self, model: UNet, tricks: Tricks) -> None:
        self.model, self.weights = model, list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.weights]
        fused = tricks.fused_optimizer
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=fused, foreach=not fused)

    def __call__(self, x: Tensor, log_snr: Tensor, text: Tensor, mask: Tensor, *low_res: Tensor | None) -> Tensor:
        return self.model(x, log_snr, text, mask, *low_res)

    def backward(self, mean: Tensor) -> None:
        mean.backward()

    @torch.no_grad()
    def step(self, _step: int) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        torch._foreach_copy_(list[Tensor](self.weights), self.masters)
        for master in self.masters:
            master.grad = None


def engine_of(model: nn.Module, batch: int, device: str) -> Any:
    """Return the engine of `cascade train`, on one device."""
    config = Experiment()
    config.data.global_batch, config.zero.stage = batch, 1
    config.precision.channels_last, config.ema.decays = True, [0.9999]
    config.precision.dtype = "fp32" if device == "cpu" else "bf16"
    if not torch.distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        init_distributed(Ranks(), config)
    return build_engine(model, config, Ranks(device="cpu" if device == "cpu" else "cuda:0"))


class Training:
    """One network and one batch on a device, with some of the optimisations."""

    def __init__(self, preset: str, side: int, batch: int, tricks: Tricks, device: str) -> None:
        config: UNetConfig = replace(PRESETS[preset], checkpoint_blocks=tricks.checkpointed)
        self.tricks, self.batch, self.done = tricks, batch, 0
        self.flops = batch * training_flops(config, side, TOKENS)
        torch.backends.cudnn.benchmark = tricks.autotuned
        with torch.device(device):
            model = UNet(config).train()
            self.images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
            self.low = torch.randint(0, 256, (batch, 3, side // 4, side // 4), dtype=torch.uint8)
            self.text = torch.randn(batch, TOKENS, config.text_dim)
            self.mask = torch.ones(batch, TOKENS, dtype=torch.bool)
            self.positions = torch.arange(batch)
        self.low_res = self.low if config.low_res else None
        self.parameters = sum(p.numel() for p in model.parameters())
        if tricks.compiled:
            model.compile_blocks("inductor" if device != "cpu" else "eager")
        self.normal = random.normal
        if tricks.compiled and device != "cpu":
            self.normal = torch.compile(random.normal, dynamic=False)
        self.engine: Any
        if tricks.deepspeed:
            self.engine = engine_of(model, batch, device)
        else:
            model.to(torch.float32 if device == "cpu" else torch.bfloat16)
            if tricks.channels_last:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.engine = Masters(model, tricks)
        self.diffusion = DiffusionConfig(weighting="min_snr")

    def forward_backward(self) -> None:
        with nullcontext() if self.tricks.fused_attention else sdpa_kernel(SDPBackend.MATH):
            mean, _ = loss(
                self.engine,
                self.images,
                self.text,
                self.mask,
                config=self.diffusion,
                seed=0,
                positions=self.positions,
                low_res=self.low_res,
                global_batch=self.batch,
                normal=self.normal,
            )
            self.engine.backward(mean)

    def step(self) -> None:
        self.forward_backward()
        self.engine.step(self.done)
        self.done += 1


def host_syncs(training: Training) -> str:
    """Return what makes the host wait for the GPU in forward and backward; it should be `none`.

    The engine's step waits once, because it must know whether the gradient is finite.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.forward_backward()
        return "none"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


KINDS = {
    "attention": r"fmha|flash|attention",
    "convolution": r"conv|cudnn|xmma|implicit|wgrad|dgrad",
    "matrix product": r"gemm|nvjet|cutlass|cublas",
    "layout": r"nchwToNhwc|nhwcToNchw|transpose",
    "optimizer": r"multi_tensor|[aA]dam|lerp",
    "copy": r"Memcpy|Memset|copy",
    "fused pointwise": r"triton_poi",
    "fused reduction": r"triton_(red|per)",
    "normalisation": r"[nN]orm|RowwiseMoments|ComputeFused",
    "reduction": r"reduce",
    "pointwise": r"elementwise|vectorized|Cat",
}
"""Kind of kernel -> pattern of its name; the first match is used."""


def profile(training: Training, top: int = 25) -> None:
    """Print the GPU time per step, over two steps, by kind of kernel, and the slowest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        training.step()
        training.step()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in kernels:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        kinds[kind] += event.self_device_time_total / 2e3
    show(profile_ms_per_step={kind: round(ms, 2) for kind, ms in kinds.most_common()})
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:top]:
        print(f"  {event.self_device_time_total / 2e3:9.2f} ms {event.count // 2:5d} x  {event.key[:130]}", flush=True)


def measure(preset: str, side: int, batch: int, row: str, peak: float, device: str, profiled: bool) -> dict[str, Any]:
    """Measure one row: the median over `ROUNDS` rounds of a few steps, after a warm-up."""
    on_gpu = device != "cpu"
    began = time.perf_counter()
    training = Training(preset, side, batch, LADDER[row], device)
    for _ in range(3):
        training.step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter() - began

    def some() -> None:
        for _ in range(STEPS if on_gpu else 1):
            training.step()

    median = statistics.median(seconds(some, device) for _ in range(ROUNDS)) / (STEPS if on_gpu else 1)
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
    if profiled and on_gpu:
        profile(training)
    syncs = host_syncs(training) if on_gpu else "not checked"
    return {
        "preset": preset,
        "trick": TITLES[row],
        "side": side,
        "batch": batch,
        "parameters_M": round(training.parameters / 1e6),
        "step_TFLOP": round(training.flops / 1e12, 3),
        "ms_per_step": round(1e3 * median, 1),
        "images_per_second": round(batch / median, 1),
        "MFU": round(training.flops / median / peak, 3),
        "peak_GB": round(peak_bytes / 1e9, 1),
        "host_syncs": syncs,
        "warm_up_s": round(began, 1),
    }


def ladder(jobs: dict[str, tuple[int, int]], rows: list[str], device: str, profiled: bool = False) -> None:
    """Measure every preset, with one more optimisation per row."""
    on_gpu = device != "cpu"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    measured = matmul_rate(device, torch.bfloat16 if on_gpu else torch.float32, 8192 if on_gpu else 512)
    stated = (peak_tflops(name) or 0.0) * 1e12
    show(device=name, torch=torch.__version__, dense_peak_TFLOPs=stated / 1e12, matmul_TFLOPs=round(measured / 1e12, 3))
    found = []
    for preset, (side, batch) in jobs.items():
        for row in rows:
            count = batch * 2 if LADDER[row].checkpointed else batch
            while count:
                try:
                    found.append(measure(preset, side, count, row, stated or measured, device, profiled))
                    show(**found[-1])
                    break
                except torch.cuda.OutOfMemoryError:
                    show(preset=preset, trick=row, batch=count, left_out="out of memory")
                    count //= 2
                finally:
                    gc.collect()
                    if on_gpu:
                        torch.cuda.empty_cache()
            torch._dynamo.reset()
    table(found)


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    dry = names == ["dry"]
    chosen: dict[str, tuple[int, int]] = DRY_JOBS if dry else {name: JOBS[name] for name in names or JOBS}
    jobs = {name: (side, int(options.get("batch", batch))) for name, (side, batch) in chosen.items()}
    if dry:
        torch.set_num_threads(1)
    rows = options["rows"].split(",") if "rows" in options else list(LADDER)
    ladder(jobs, rows, "cpu" if dry else "cuda", options.get("profile") == "true")


if __name__ == "__main__":
    main(sys.argv[1:])
