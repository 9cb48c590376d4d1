"""The memory model compared with measured processes, and with sums done by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.commands import prepare
from tests.training.memory_probe import Case, experiment, peaks
from tests.training.ranks import run_ranks
from training.cli.compose import load_config
from training.config.commands import PlanCommand
from training.config.unet import for_stage
from training.plan.memory import Passes, Setup, follow, kept, parameter_count, parameter_shapes, phases
from training.plan.plan import make_plan

WIDE = {"widths": [128, 256], "cond_dim": 512, "head_dim": 64}
"""13 M parameters on small pictures: the state dominates."""
FINE = {"widths": [32, 64]}
"""Few parameters on large pictures: the activations dominate."""
TWO_PROCESSES: list[Case] = [("tiny_base", WIDE, 16, 4, stage, 0) for stage in (2, 3)]
ONE_PROCESS: list[Case] = [
    ("tiny_base", WIDE, 16, 4, 0, 0),
    ("tiny_base", FINE, 96, 6, 1, 0),
    ("tiny_sr", FINE, 128, 6, 0, 0),
    ("tiny_base", FINE, 96, 6, 1, 8),
]


@cache
def passes_of(preset: str, overrides: str, size: int, rank: int) -> Passes:
    """They depend neither on ZeRO nor on the micro-batch."""
    config = experiment(preset, json.loads(overrides), size, 1, 0, rank, 1)
    unet = for_stage(config.stage, config.text.dim)
    return follow(unet, size, config.text.max_tokens, torch.float32, config.lora)


def predicted(
    preset: str, overrides: dict[str, Any], size: int, micro_batch: int, stage: int, rank: int, world_size: int
) -> int:
    config = experiment(preset, overrides, size, micro_batch, stage, rank, world_size)
    unet, averages = for_stage(config.stage, config.text.dim), len(config.ema.decays)
    frozen = parameter_count(config.stage, config.text.dim) if rank else 0
    shapes = parameter_shapes(unet, config.lora)
    setup = Setup(shapes, config.zero, 4, world_size, averages, on_gpu=False, frozen=frozen)
    passes = passes_of(preset, json.dumps(overrides), size, rank)
    resting = sum(size for name, size in kept(setup).items() if name != "host")
    return resting + max(sum(parts.values()) for parts in phases(setup, passes.at(micro_batch)).values())


@pytest.mark.parametrize(("cases", "processes"), [(ONE_PROCESS, 1), (TWO_PROCESSES, 2)], ids=["one", "two"])
def test_measured_peaks(cases: list[Case], processes: int, tmp_path: Path) -> None:
    """Within a tenth of what the kernel counted."""
    measured = run_ranks(peaks, processes, tmp_path, cases)
    for case, found in zip(cases, zip(*measured, strict=True), strict=True):
        assert max(found) == pytest.approx(predicted(*case, processes), rel=0.1), case


MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "training.cli", "train", *sys.argv[1:]], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process in between: otherwise the figure would include the process that forks."""


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero.stage=1", "data.global_batch=32"],
        ["zero.stage=3", "data.global_batch=16", "stage.model.preset=tiny_base"],
    ],
    ids=["small", "tiny"],
)
def test_a_whole_training_with_its_checkpoint(overrides: list[str], tmp_path: Path) -> None:
    """Interpreter, libraries, text encoder, allocator and the copy for the checkpoint included."""
    draw = ["count=16", "heldout=0", "size=16", "samples_per_shard=16"]
    prepare.main(load_config("prepare", [f"prepare.output={tmp_path}", *(f"prepare.draw.{word}" for word in draw)]))
    words = [f"data.shards={tmp_path}/train", f"run.dir={tmp_path}/run", "train.steps=4", "tracking=disabled"]
    words += ["text.dim=32", "cluster.processes=1", "cluster.threads=1", "train.sample_every=0", *overrides]
    plan = load_config("plan", ["gpu=cpu", *words])
    assert isinstance(plan, PlanCommand)
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert int(done.stdout) == pytest.approx(make_plan(plan)["memory"]["total"], rel=0.1)
