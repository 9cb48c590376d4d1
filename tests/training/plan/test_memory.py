"""The memory model against measured processes, and against sums done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.memory_probe import Case, experiment, peaks
from tests.training.ranks import run_ranks
from training.config.unet import for_stage
from training.plan.memory import Setup, follow, memory, parameter_count, parameter_shapes

WIDE = {"widths": [128, 256], "cond_dim": 512, "head_dim": 64}
"""13 M parameters on small pictures: the state dominates."""
FINE = {"widths": [32, 64]}
"""Few parameters on large pictures: the activations dominate."""
TWO_PROCESSES: list[Case] = [("tiny_base", WIDE, 16, 4, stage, 0) for stage in (2, 3)]
ONE_PROCESS: list[Case] = [
    ("tiny_base", WIDE, 16, 4, 0, 0),
    ("tiny_base", FINE, 96, 12, 1, 0),
    ("tiny_sr", FINE, 128, 12, 0, 0),
    ("tiny_base", FINE, 96, 12, 1, 8),
]


def predicted(
    preset: str, overrides: dict[str, Any], size: int, micro_batch: int, stage: int, rank: int, world_size: int
) -> int:
    config = experiment(preset, overrides, size, micro_batch, stage, rank, world_size)
    unet, averages = for_stage(config.stage, config.text.dim), len(config.ema.decays)
    frozen = parameter_count(config.stage, config.text.dim) if rank else 0
    shapes = parameter_shapes(unet, config.lora)
    setup = Setup(shapes, config.zero, 4, world_size, averages, on_gpu=False, frozen=frozen)
    parts = memory(setup, follow(unet, size, config.text.max_tokens, torch.float32, config.lora), micro_batch)
    return parts["total"] - parts["overhead"]


@pytest.mark.parametrize(("cases", "processes"), [(ONE_PROCESS, 1), (TWO_PROCESSES, 2)], ids=["one", "two"])
def test_measured_peaks(cases: list[Case], processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth of what the kernel counted."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    measured = run_ranks(peaks, processes, tmp_path, cases)
    for case, found in zip(cases, zip(*measured, strict=True), strict=True):
        assert max(found) == pytest.approx(predicted(*case, processes), rel=0.1), case
