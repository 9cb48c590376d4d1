"""Devices that a training may run on: their memory and their peak."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.machine import total_memory
from training.config.commands import PlanCommand
from training.plan.flops import FP32_MATRIX_TFLOPS, row_tflops
from training.processes.ranks import process_count, thread_count

GIB = 2**30
GPUS: dict[str, tuple[str, int]] = {
    "a10": ("A10", 24),
    "a100": ("A100", 80),
    "a100-40gb": ("A100", 40),
    "a40": ("A40", 48),
    "b200": ("B200", 180),
    "gb200": ("GB200", 186),
    "gh200": ("GH200", 96),
    "h100": ("H100", 80),
    "h100-nvl": ("H100 NVL", 94),
    "h100-pcie": ("H100 PCIe", 80),
    "h200": ("H200", 141),
    "h200-nvl": ("H200 NVL", 141),
    "l4": ("L4", 24),
    "l40s": ("L40S", 48),
    "mi250x": ("MI250X", 64),
    "mi300x": ("MI300X", 192),
    "rtx3090": ("RTX 3090", 24),
    "rtx3090-ti": ("RTX 3090 Ti", 24),
    "rtx4090": ("RTX 4090", 24),
}
"""Name on the command line -> (row of `PEAK_TFLOPS`, memory in GiB)."""


@dataclass(frozen=True)
class Device:
    """The device of one process. `peak` is the dense peak in FLOP/s at the precision of the plan; `memory` is in
    bytes."""

    name: str
    memory: float
    peak: float
    on_gpu: bool
    basis: str
    """Where `peak` comes from."""


def planned_device(config: PlanCommand) -> Device:
    """Return the device of the plan: `gpu=NAME`, or this machine's cores with gpu=cpu or cluster.gpus=false.

    Raises:
        ConfigError: an unknown GPU name.
    """
    name = config.gpu or ("h100" if config.cluster.gpus else "cpu")
    if name == "cpu":
        return this_machine(config)
    if name not in GPUS:
        raise ConfigError(
            f"gpu={name}: it must be cpu or one of {', '.join(GPUS)}; for another GPU, or part of "
            "one (MIG), give any of them with train.peak_tflops and memory_gib"
        )
    row, gigabytes = GPUS[name]
    dtype = config.precision.dtype
    peak, basis = row_tflops(row, dtype) * 1e12, "data sheet, dense bf16"
    if dtype == "fp32":
        tf32 = "data sheet, dense TF32 (half of bf16), of convolutions; matrix products run in full fp32, slower"
        basis = "data sheet, fp32 matrix" if row in FP32_MATRIX_TFLOPS else tf32
    if config.train.peak_tflops:
        peak, basis = config.train.peak_tflops * 1e12, "train.peak_tflops"
    return Device(name, (config.memory_gib or gigabytes) * GIB, peak, True, basis)


def this_machine(config: PlanCommand) -> Device:
    """Return a process's share of this machine: its memory, and the measured matrix-product rate of its threads."""
    processes = process_count(config.cluster)
    memory: float = total_memory() / processes
    if config.memory_gib:
        memory = config.memory_gib * GIB
    peak, basis = config.train.peak_tflops * 1e12, "train.peak_tflops"
    if not peak:
        threads = thread_count(config.cluster)
        peak, basis = measured_peak(threads), f"fp32 matrix product, measured now; threads: {threads}"
    return Device("cpu", memory, peak, False, basis)


def has_bf16() -> bool:
    """Return whether this machine's CPU has bf16 arithmetic; without it, PyTorch emulates it (25 times slower)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def measured_peak(threads: int, side: int = 1024, rounds: int = 5) -> float:
    """Return the FLOP/s of the fastest of a few fp32 matrix products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.randn(side, side)
        best = float("inf")
        for _ in range(rounds):
            began = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / best
