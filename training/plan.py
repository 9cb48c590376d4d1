"""`cascade plan`: parameters, memory, time and cost of a training, before an allocation is spent.

Parameters, FLOPs and activations are counted on tensors without data. Speed is an assumption, not a forecast: `mfu` of
the GPU's stated dense bf16 peak. `doctor=true` then tries the real things: shards, checkpoint store, text encoder, one
loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from data_pipeline.errors import CascadeError, ConfigError, UserError
from training.checks import planned_world_size
from training.commands import PlanCommand
from training.config import Experiment

GPUS = {"a100": ("A100", 80), "h100": ("H100", 80), "h200": ("H200", 141), "b200": ("B200", 180), "l40s": ("L40S", 48)}
"""Key of `gpu` -> (name in flops.PEAK_TFLOPS, memory in GB)."""
USABLE = 0.92
"""Share of a GPU's memory that a plan fills at most."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}


def main(config: Experiment) -> dict[str, Any]:
    """Prints one table and returns its numbers.

    Raises:
        ConfigError: an unknown GPU, or an MFU that is none.
        UserError: `doctor=true` found something that would stop the training.
    """
    assert isinstance(config, PlanCommand)
    plan = make_plan(config)
    print(table(plan), flush=True)
    if config.doctor:
        plan["doctor"] = examine(config)
        failed = [name for name, said in plan["doctor"].items() if not said.startswith("ok")]
        if failed:
            raise UserError(f"doctor: {', '.join(failed)} would stop this training; see the lines above")
    return plan


def make_plan(config: PlanCommand) -> dict[str, Any]:
    """The numbers; bytes, seconds and FLOPs, without units hidden in them."""
    import torch

    from training.flops import PEAK_TFLOPS, training_flops
    from training.memory import Setup, follow, largest_micro_batch, memory
    from training.model.presets import for_stage
    from training.model.unet import UNet

    if config.gpu not in GPUS:
        raise ConfigError(f"gpu={config.gpu}: it must be one of {', '.join(GPUS)}")
    if not 0 < config.mfu <= 1:
        raise ConfigError(f"mfu={config.mfu}: it must lie above 0 and at most at 1")
    name, gigabytes = GPUS[config.gpu]
    world_size = planned_world_size(config.cluster)
    unet = for_stage(config.stage, config.text.dim)
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in UNet(unet).parameters()]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.dtype]
    size, tokens = config.stage.train_size, config.text.max_tokens
    setup = Setup(
        shapes,
        config.zero,
        WEIGHT_BYTES[config.precision.dtype],
        world_size,
        len(config.ema.decays),
        config.optimizer.name,
        on_gpu=config.cluster.gpus,
    )
    passes = follow(unet, size, tokens, dtype)
    share = config.data.global_batch // world_size
    micro_batch = config.data.micro_batch or share
    parts = memory(setup, passes, micro_batch)
    largest = largest_micro_batch(setup, passes, USABLE * gigabytes * 1e9)
    flops = training_flops(unet, size, tokens)
    images_per_second = config.mfu * PEAK_TFLOPS[name] * 1e12 * world_size / flops
    images = config.train.steps * config.data.global_batch
    seconds = images / images_per_second
    return {
        "stage": config.stage.name,
        "parameters": setup.parameters,
        "flops_per_image": flops,
        "gpu": config.gpu,
        "world_size": world_size,
        "zero_stage": config.zero.stage,
        "micro_batch": micro_batch,
        "memory": parts,
        "fits": parts["total"] <= USABLE * gigabytes * 1e9,
        "largest_micro_batch": largest,
        "mfu": config.mfu,
        "images_per_second": images_per_second,
        "images": images,
        "days": seconds / 86400,
        "gpu_hours": seconds / 3600 * world_size,
        "cost": seconds / 3600 * world_size * config.price,
        "checkpoint_bytes": 4 * setup.parameters * (3 + len(config.ema.decays)),
    }


def table(plan: dict[str, Any]) -> str:
    """The plan for people."""
    parts = plan["memory"]
    rows = [
        ("stage", plan["stage"]),
        ("parameters", f"{plan['parameters'] / 1e6:,.1f} M"),
        ("training FLOPs per picture", f"{plan['flops_per_image'] / 1e9:,.1f} GFLOP (3 x forward, counted)"),
        ("processes", f"{plan['world_size']} x {plan['gpu']}, ZeRO {plan['zero_stage']}"),
        ("memory per process", f"{parts['total'] / 1e9:.2f} GB at micro-batch {plan['micro_batch']}"),
        *((f"  {part}", f"{value / 1e9:.2f} GB") for part, value in parts.items() if part not in ("total", "moment")),
        ("fits", "yes" if plan["fits"] else f"no: lower data.micro_batch to {plan['largest_micro_batch']} or less"),
        ("largest micro-batch", f"{plan['largest_micro_batch']}"),
        ("checkpoint", f"{plan['checkpoint_bytes'] / 1e9:.2f} GB"),
        ("speed", f"{plan['images_per_second']:,.0f} images/s, assuming {plan['mfu']:.0%} MFU"),
        ("pictures", f"{plan['images']:,}"),
        ("time", f"{plan['days']:,.2f} days, {plan['gpu_hours']:,.0f} GPU hours"),
        ("cost", f"{plan['cost']:,.0f} dollars"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


# ------------------------------------------------------------------------------------------------- the real things


def examine(config: Experiment) -> dict[str, str]:
    """Tries what the training will need; values begin with `ok` or say what is wrong."""
    found: dict[str, str] = {}
    checks: dict[str, Callable[[Experiment], str]] = {
        "shards": _shards,
        "checkpoint store": _checkpoint_store,
        "text encoder": _text_encoder,
        "one batch, one loss": _one_loss,
    }
    for name, attempt in checks.items():
        try:
            found[name] = "ok: " + attempt(config)
        except (CascadeError, OSError) as error:
            found[name] = str(error)
        print(f"doctor: {name}: {found[name]}", flush=True)
    return found


def _shards(config: Experiment) -> str:
    from data_pipeline import store
    from data_pipeline.dataset import load_or_build

    dataset = load_or_build(store.expand(config.data.shards), config.data)
    return f"{len(dataset.counts)} shards, {int(sum(dataset.counts)):,} samples"


def _checkpoint_store(config: Experiment) -> str:
    from data_pipeline import store

    folder = config.checkpoint.dir or f"{config.run.dir}/checkpoints"
    url, written = store.join(folder, f".doctor-{os.getpid()}"), os.urandom(4096)
    if not store.is_s3(folder):
        os.makedirs(folder, exist_ok=True)
    store.write_bytes(url, written)
    read = store.read_bytes(url)
    store.remove(url)
    if read != written:
        raise UserError(f"checkpoint.dir={folder}: what was written came back changed")
    return f"wrote, read and deleted 4 kB in {folder}"


def _text_encoder(config: Experiment) -> str:
    from training.model.text_encoder import build_text_encoder

    encoder = build_text_encoder(config.text)
    return f"{encoder.name}, width {encoder.dim}"


def _one_loss(config: Experiment) -> str:
    import torch

    from data_pipeline.loader import Loader
    from training.diffusion.objective import loss
    from training.model.presets import for_stage
    from training.model.text_encoder import build_text_encoder
    from training.model.unet import UNet

    stage = config.stage
    world_size = config.data.lane_count  # the smallest share there is: one sample per lane's rank
    loader = Loader(
        config.data,
        image_size=stage.image_size,
        low_res_size=stage.low_res_size,
        crop_size=stage.crop_size,
        seed=config.seed,
        rank=0,
        world_size=world_size,
    )
    try:
        batch = next(loader)[0]
    finally:
        loader.close()
    model = UNet(for_stage(stage, config.text.dim))
    text, mask = build_text_encoder(config.text).encode(batch.captions)
    with torch.no_grad():
        value, _ = loss(
            model,
            batch.images,
            text,
            mask,
            config=stage.diffusion,
            seed=config.seed,
            positions=torch.as_tensor(batch.positions),
            low_res=batch.low_res,
            image_size=stage.image_size,
        )
    if not math.isfinite(float(value)):
        raise UserError("the loss of the first batch is not finite")
    return f"{len(batch.captions)} pictures, loss {float(value):.3f}"
