"""`cascade plan`: memory, time and cost of a training, before an allocation is spent; `doctor=true` also tries it.

Parameters and FLOPs are counted, and activations are followed through a pass without data (memory.py). Assumptions
(utilisation, bandwidth, price, bytes per sample without an index) are settings or marked as such in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.common.errors import CascadeError
from data_pipeline.config import DataConfig, divisors
from data_pipeline.content.images import bucket_shape
from data_pipeline.storage import store
from training.config.commands import PlanCommand
from training.config.experiment import Experiment, ZeroConfig
from training.config.unet import for_stage, side_multiple
from training.engine.base import DTYPES
from training.optim.registry import optimizer_class
from training.plan.checks import check_heldout, check_shares, planned_world_size, training_problems
from training.plan.devices import Device, planned_device
from training.plan.features import FeatureCost, align_of, feature_cost
from training.plan.fits import remarks
from training.plan.flops import training_flops
from training.plan.memory import (
    DECODER_FLOOR,
    Passes,
    Setup,
    follow,
    largest_micro_batch,
    memory,
    setup_of,
)
from training.plan.table import gib, table
from training.processes.interval import best_interval, between_failures
from training.text.cost import TextCost, text_cost

DAY, HOUR = 86400.0, 3600.0
ASSUMED_SAMPLE_BYTES = 60_000
"""Bytes of a JPEG with its caption, without an index."""
FEW_SHARDS = 256
"""Maximum number of indexes to open if their summary lacks them."""
COPY_BYTES_PER_SECOND = 10e9
"""Copy rate from a GPU to pinned host memory; assumed. (On a CPU: from memory to memory, 2 threads.)"""
SHOWN_MICRO_BATCHES = 6
"""Number of micro-batches in the table of memory by ZeRO stage and micro-batch."""


def main(config: Experiment) -> dict[str, Any]:
    """Print one table and, with `doctor=true`, a line per check; return the numbers in bytes, seconds, FLOPs, dollars.

    Raises:
        ConfigError: an unknown GPU, or a stage that cannot be built.
        UserError: a check of `doctor=true` failed.
    """
    assert isinstance(config, PlanCommand)
    plan = make_plan(config)
    print(table(plan), flush=True)
    if config.doctor:
        from training.plan.doctor import examine

        plan["doctor"] = examine(config)
    return plan


TOLD = ("schedule", "parametrization", "weighting")
"""Settings of the diffusion process, changed by ingredients, that the plan shows."""


def make_plan(config: PlanCommand) -> dict[str, Any]:
    """Return all numbers of the table, under stable names for the JSON output."""
    unet = for_stage(config.stage, config.text.dim)
    size, tokens = config.stage.train_size, config.text.max_tokens
    device, world = planned_device(config), planned_world_size(config.cluster)
    dtype = DTYPES[config.precision.dtype]
    problems: list[str] = []
    features, align = FeatureCost(), None
    try:
        features, align = feature_cost(config, unet, dtype), align_of(config)
    except CascadeError as error:
        problems.append(str(error))
    setup = setup_of(config, world, device.on_gpu, align, features.bytes)
    passes = features.added_to(follow(unet, size, tokens, dtype, config.lora, align))
    taught = config.distill.teacher_passes
    training = training_flops(unet, size, tokens, frozen=bool(config.lora.rank), teacher_passes=taught)
    text = text_cost(config.text)
    precomputed = bool(config.data.embeddings)
    fits = {**batch_fits(config, world, problems), **data_fits(config, problems)}
    data = fits.pop("data")
    beside = features.flops_per_image + (0 if precomputed else text.flops_per_caption)
    rates = speed(config, device, world, training + beside)
    plan: dict[str, Any] = {
        "stage": config.stage.name,
        "preset": config.stage.model.preset,
        "parameters": setup.parameters,
        "trained_parameters": setup.trained,
        "flops_per_image": training,
        "teacher_passes": taught,
        "gpu": device.name,
        "peak_flops": device.peak,
        "peak_basis": device.basis,
        "world_size": world,
        "nodes": config.cluster.nodes if config.cluster.kind != "local" else 1,
        "zero_stage": config.zero.stage,
        "optimizer": config.optimizer.name,
        "precision": config.precision.dtype,
        "diffusion": {name: getattr(config.stage.diffusion, name) for name in TOLD},
        **memory_plan(config, setup, passes, device, 0 if precomputed else text.bytes, problems),
        **rates,
        **cost(config, device, world, rates["images_per_second"]),
        "text_encoder": text_plan(config, text, training + features.flops_per_image, data["samples"], device, world),
        "picture_encoder": features_plan(config, features, device),
        "data": data,
    }
    embedding_bytes = tokens * config.text.dim * 2 if precomputed else 0
    plan["store_bytes_per_second"] = (data["bytes_per_sample"] + embedding_bytes) * rates["images_per_second"]
    plan |= checkpoint_plan(config, setup, device, plan["nodes"], rates["seconds_per_step"])
    plan["fits"] = {"memory": plan.pop("fits_memory"), **fits}
    plan["problems"] = problems
    plan["remarks"] = remarks(config, "cuda" if device.on_gpu else "cpu")
    plan["ok"] = not problems
    return plan


# ------------------------------------------------------------------------------------------------------ the parts


def batch_fits(config: Experiment, world: int, problems: list[str]) -> dict[str, Any]:
    """Return whether `cascade train` would accept the world size, lanes and micro-batch; append everything that it
    would refuse to `problems`."""
    lanes, batch = config.data.lane_count, config.data.global_batch
    problems += training_problems(config, world)
    return {
        "world_size": batch % world == 0,
        "lanes": world in divisors(lanes),
        "micro_batch": config.data.micro_batch_of(world) in divisors(config.data.share_of(world)),
    }


def memory_plan(
    config: PlanCommand, setup: Setup, passes: Passes, device: Device, encoder: int, problems: list[str]
) -> dict[str, Any]:
    """Return the bytes by part at the configured micro-batch, the largest micro-batch that fits, and totals by ZeRO
    stage and micro-batch: of the configured stage as configured, of the others without offloading."""
    share = max(1, config.data.share_of(setup.world_size))
    micro_batch = config.data.micro_batch or share
    parts = memory(setup, passes, micro_batch, encoder)
    beside = DECODER_FLOOR if config.data.own_process and not device.on_gpu else 0
    available = device.memory - beside
    largest = largest_micro_batch(setup, passes, available, encoder)
    usable = max((n for n in divisors(share) if n <= largest), default=0)
    fits = parts["total"] <= available
    if not fits:
        remedy = f"set data.micro_batch={usable}" if usable else "use a higher zero.stage, offloading or more devices"
        problems.append(
            f"data.micro_batch={micro_batch} needs {gib(parts['total'])} of {gib(available)} per device: {remedy}"
        )
    sizes = sorted({*(n for n in range(1, share + 1) if share % n == 0), micro_batch})
    near = sorted(sizes, key=lambda n: abs(sizes.index(n) - sizes.index(micro_batch)))[:SHOWN_MICRO_BATCHES]
    stages = [s for s in (0, 1, 2, 3) if s or (setup.world_size == 1 and setup.weight_bytes == 4)]
    setups = {s: setup if s == setup.zero.stage else replace(setup, zero=ZeroConfig(stage=s)) for s in stages}
    return {
        "micro_batch": micro_batch,
        "memory": parts,
        "memory_available": int(available),
        "memory_beside": beside,
        "memory_by_zero_stage": {
            str(s): {str(n): memory(setups[s], passes, n, encoder)["total"] for n in sorted(near)} for s in stages
        },
        "largest_micro_batch": largest,
        "largest_usable_micro_batch": usable,
        "fits_memory": fits,
    }


def speed(config: PlanCommand, device: Device, world: int, flops: float) -> dict[str, float]:
    """Return images per second and seconds per step at the assumed utilisation of the peak; `flops`: per image."""
    rate = config.mfu * device.peak * world / flops
    return {
        "mfu": config.mfu,
        "images_per_second": rate,
        "images_per_second_per_gpu": rate / world,
        "seconds_per_step": config.data.global_batch / rate,
    }


def cost(config: PlanCommand, device: Device, world: int, rate: float) -> dict[str, float]:
    """Return the days, GPU hours and dollars of the whole training; a CPU costs nothing."""
    images = config.train.steps * config.data.global_batch
    hours = images / rate * world / HOUR
    price = config.price if device.on_gpu else 0.0
    return {
        "steps": config.train.steps,
        "images": images,
        "days": images / rate / DAY,
        "gpu_hours": hours,
        "price": price,
        "cost": hours * price,
    }


def text_plan(
    config: PlanCommand, text: TextCost, training: float, samples: int | None, device: Device, world: int
) -> dict[str, Any]:
    """Compare running the text encoder in every step with `cascade embed`: device hours, dollars, memory, images/s,
    bytes of files.

    Online, each device holds the encoder and runs it for every picture of the training. Precomputed, each caption is
    encoded once; this cost is only known if the number of samples is.
    """
    flops, rate = text.flops_per_caption, config.mfu * device.peak
    images = config.train.steps * config.data.global_batch
    price = config.price if device.on_gpu else 0.0

    def spent(captions: float) -> dict[str, float]:
        hours = captions * flops / rate / HOUR
        return {"gpu_hours": hours, "cost": hours * price}

    once: dict[str, Any] = {"gpu_hours": None, "cost": None, "bytes": None}
    if samples is not None:
        once = {**spent(samples), "bytes": samples * config.text.max_tokens * config.text.dim * 2}
    return {
        "kind": config.text.kind,
        "mode": "precomputed" if config.data.embeddings else "online",
        "parameters": text.parameters,
        "basis": text.basis,
        "flops_per_caption": flops,
        "online": {
            **spent(images),
            "memory": text.bytes,
            "images_per_second": speed(config, device, world, training + flops)["images_per_second"],
        },
        "precomputed": {
            **once,
            "memory": 0,
            "images_per_second": speed(config, device, world, training)["images_per_second"],
        },
    }


def features_plan(config: PlanCommand, features: FeatureCost, device: Device) -> dict[str, Any] | None:
    """Return the cost of losses on features in addition to the U-Net; None without any."""
    if not features.parameters:
        return None
    images = config.train.steps * config.data.global_batch
    return {
        "parameters": features.parameters,
        "repa": {"weight": config.repa.weight, "until": config.repa.until},
        "perceptual": {"weight": config.perceptual.weight, "log_snr_above": config.perceptual.log_snr_above},
        "flops_per_image": features.flops_per_image,
        "gpu_hours": images * features.flops_per_image / (config.mfu * device.peak) / HOUR,
    }


def checkpoint_plan(
    config: PlanCommand, setup: Setup, device: Device, nodes: int, seconds_per_step: float
) -> dict[str, Any]:
    """Return the size, duration and interval of checkpoints (fp32 weights, moments, averages), and the size of all that
    are kept."""
    states = optimizer_class(setup.optimizer).saved_bytes(setup.shapes, setup.trained)
    size = 4 * setup.trained * (1 + setup.averages) + states
    settings = config.checkpoint
    blocked = size / setup.world_size / COPY_BYTES_PER_SECOND
    written = size / (config.store_gb_s * 1e9 * nodes)
    every_s = (
        max(written, best_interval(blocked, between_failures(0, 0.0, nodes)))
        if settings.every == "auto"
        else settings.every * seconds_per_step
    )
    kept = settings.keep_last + (config.train.steps // settings.keep_every if settings.keep_every else 0)
    return {
        "checkpoint_bytes": size,
        "checkpoint_seconds": written,
        "checkpoint_blocked_seconds": blocked,
        "checkpoint_every_seconds": every_s,
        "checkpoints_kept": kept,
        "checkpoints_kept_bytes": kept * size,
    }


def data_fits(config: PlanCommand, problems: list[str]) -> dict[str, Any]:
    """Collect what is known of the shards without reading them: their number, their size and, if they are indexed, the
    number of samples.

    Returns:
        shards: whether they exist and have enough samples (None if data.shards is not set); data: the facts.
    """
    facts: dict[str, Any] = {"shards": None, "bytes": None, "samples": None, "epochs": None}
    facts |= {"bytes_per_sample": float(ASSUMED_SAMPLE_BYTES), "basis": "assumed", "lanes": config.data.lane_count}
    if config.data.shards is None:
        return {"shards": None, "data": facts}
    from data_pipeline.shards.mixture import entries_of

    try:
        shards = entries_of(config.data)
        entries = [entry for _, entry, _ in shards]
        facts["datasets"] = {name: None for name, _, _ in shards if name}
        samples: int | None = 0
        total = 0
        for name, own in config.data.parts().items():
            kept, whole = indexed_samples(own, [entry for dataset, entry, _ in shards if dataset == name])
            samples, total = (None if kept is None or samples is None else samples + kept), total + whole
            if name:
                facts["datasets"][name] = kept
        facts["buckets"] = bucket_facts(config, shards)
    except CascadeError as error:
        problems.append(str(error))
        return {"shards": False, "data": facts}
    for rule in (lambda: check_heldout(config, [entry.url for entry in entries]), lambda: check_shares(config)):
        try:
            rule()
        except CascadeError as error:
            problems.append(str(error))
    size = sum(entry.size for entry in entries)
    facts |= {"shards": len(entries), "bytes": size}
    if samples is None:
        return {"shards": True, "data": facts}
    images = config.train.steps * config.data.global_batch
    facts |= {"samples": samples, "epochs": images / max(samples, 1)}
    facts["dataset_epochs"] = {
        name: count / max(facts["datasets"][name], 1) for name, count in images_by_dataset(config.data, images).items()
    }
    facts |= {"bytes_per_sample": size / max(total, 1), "basis": "index"}
    enough = samples >= config.data.global_batch
    if not enough:
        problems.append(
            f"data.shards: {samples} samples are fewer than one batch (data.global_batch={config.data.global_batch}), "
            f"so every step would repeat pictures"
        )
    return {"shards": enough, "data": facts}


def images_by_dataset(data: DataConfig, images: int) -> dict[str, float]:
    """Return how many of a run's first `images` samples come from each data set of a mixture; empty without one."""
    names, rows = [dataset.name for dataset in data.datasets()], data.schedule()
    found = dict.fromkeys(names, 0.0)
    for number, (start, shares) in enumerate(rows if names else ()):
        end = rows[number + 1][0] if number + 1 < len(rows) else images
        for name, share in zip(names, shares, strict=True):
            found[name] += float(share) * max(min(end, images) - start, 0)
    return found


def bucket_facts(config: PlanCommand, shards: Sequence[tuple[str, store.Entry, DataConfig]]) -> dict[str, Any]:
    """Return the width, height and (if all shards have an index) number of samples of each of `data.buckets`."""
    multiple = side_multiple(config.stage, config.text.dim) if config.data.buckets else 1
    found: dict[str, Any] = {}
    for shape, ratio in config.data.ratios().items():
        width, height = bucket_shape(ratio, config.stage.image_size, multiple)
        found[shape] = {"width": width, "height": height, "samples": 0}
    for name, own in config.data.parts().items() if found else ():
        entries = [entry for dataset, entry, _ in shards if dataset == name]
        for shape, cut in own.bucket_parts().items():
            kept, before = indexed_samples(cut, entries)[0], found[shape]["samples"]
            found[shape]["samples"] = None if kept is None or before is None else before + kept
    return found


def indexed_samples(data: DataConfig, entries: list[store.Entry]) -> tuple[int | None, int]:
    """Return the number of samples that pass data.filter, and of all samples; None and 0 unless every shard has an
    index. Indexes nothing."""
    from data_pipeline.shards.dataset import patience_of, stored_index
    from data_pipeline.shards.summaries import read_summaries, summarize, summary_url

    patience = patience_of(data)
    known = read_summaries(summary_url(entries, data.filter, data.index_dir, data.members), entries, patience)
    for entry in entries if len(known) + FEW_SHARDS >= len(entries) else ():
        if entry.url not in known:
            index = stored_index(entry, data, patience)
            if index is None:
                return None, 0
            known[entry.url] = summarize(index, entry, "", data.filter)
    if len(known) < len(entries):
        return None, 0
    return sum(s.kept for s in known.values()), sum(s.samples for s in known.values())
