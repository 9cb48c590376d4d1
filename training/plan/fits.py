"""What a start warns about or refuses on this machine, before anything large is allocated."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.machine import free_memory
from data_pipeline.config import require
from training.config.experiment import Experiment
from training.config.unet import PRESETS
from training.plan.devices import has_bf16
from training.plan.features import align_of
from training.plan.memory import least, setup_of
from training.plan.table import gib
from training.processes.ranks import Ranks, process_count


def remarks(config: Experiment, device: str) -> list[str]:
    """Return remarks on settings that work, but probably not as intended; one sentence each."""
    found = []
    if config.precision.dtype == "bf16" and device == "cpu" and not has_bf16():
        found.append(
            "precision.dtype=bf16: this CPU has no bf16 arithmetic, so it is emulated, up to 25 times slower; use "
            "precision=fp32"
        )
    if config.dino.path and not config.compares_features:
        found.append(
            f"dino.path={config.dino.path}: no loss uses this encoder, so it is not loaded; use ingredient=repa or "
            "ingredient=perceptual"
        )
    stage = config.stage
    preset = PRESETS.get(stage.model.preset)
    if stage.is_super_resolution and preset is not None and not preset.low_res:
        found.append(
            f"stage.model.preset={stage.model.preset} is for a base stage, but {stage.name} is super-resolution: it "
            "gets three more input channels; presets for super-resolution train faster at this size"
        )
    return found


def check_memory(config: Experiment, ranks: Ranks) -> None:
    """Refuse a stage whose state alone does not fit: Linux would kill it minutes later without a message.

    Raises:
        ConfigError: it does not fit; the message states the needed and the available memory.
    """
    on_gpu = ranks.device != "cpu"
    setup = setup_of(config, ranks.world_size, on_gpu, align_of(config))
    needed = least(setup)
    if on_gpu:
        import torch

        available = torch.cuda.get_device_properties(torch.device(ranks.device)).total_memory
    else:
        available = free_memory() // process_count(config.cluster)
    stages = [Path(run).name for run in config.bundle.runs]
    foreign = stages and config.stage.name not in stages
    require(
        needed <= available,
        f"stage {config.stage.name} with {setup.parameters / 1e6:,.0f} M parameters needs at least {gib(needed)} per "
        f"process for weights, moments, averages and gradients, and each process here has {gib(available)}: use more "
        "devices, a higher zero.stage, zero=offload or a smaller stage (cascade plan shows what fits)"
        + (f"; the stages of this experiment are {', '.join(stages)}" if foreign else ""),
    )
