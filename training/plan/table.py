"""The plan in readable form: one table from the numbers of plan.py."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import Any

from data_pipeline.common.terminal import width

PARTS = (
    "weights",
    "master_weights",
    "gradients",
    "moments",
    "ema",
    "teacher",
    "activations",
    "buffers",
    "text_encoder",
    "picture_encoder",
    "overhead",
)
LABEL = 24
"""Width of the first column."""


def gib(size: float) -> str:
    """Format bytes as GiB, or as MiB if below 0.1 GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def table(plan: dict[str, Any]) -> str:
    """Return the table: one line per quantity, then problems and remarks."""
    groups = (_network(plan), _memory(plan), _time(plan), _input_output(plan), _fits(plan))
    blocks = ["\n".join(_row(label, value) for label, value in rows) for rows in groups]
    problems = [f"problem: {problem}" for problem in plan["problems"]] or ["no problem found"]
    return "\n\n".join([*blocks, "\n".join([*problems, *(f"note: {remark}" for remark in plan["remarks"])])])


def _row(label: str, value: str) -> str:
    """Return `value` beside its label, wrapped to the width of the terminal."""
    lines = textwrap.wrap(value, width() - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(f"{name:<{LABEL}}{line}".rstrip() for name, line in zip_longest([label], lines, fillvalue=""))


def counted(number: int, thing: str) -> str:
    """Return the number with its noun in the singular or plural: 1 node, 2 nodes, 2 processes."""
    ending = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number:,} {thing}{ending}"


def _device(plan: dict[str, Any]) -> str:
    return "process" if plan["gpu"] == "cpu" else "GPU"


def _network(plan: dict[str, Any]) -> list[tuple[str, str]]:
    digits = 1 if plan["peak_flops"] >= 1e12 else 3
    frozen = plan["trained_parameters"] < plan["parameters"]
    trained = f", of which {plan['trained_parameters'] / 1e6:,.2f} M are trained (lora)" if frozen else ""
    taught = f"{plan['teacher_passes']} of them by the teacher, " if plan["teacher_passes"] else ""
    return [
        ("stage", f"{plan['stage']} (preset {plan['preset']}, {plan['precision']}, {plan['optimizer']})"),
        ("diffusion", ", ".join(f"{name} {value}" for name, value in plan["diffusion"].items())),
        ("parameters", f"{plan['parameters'] / 1e6:,.1f} M{trained}"),
        (
            "FLOPs per image",
            f"{plan['flops_per_image'] / 1e9:,.1f} GFLOP in training ({3 - frozen + plan['teacher_passes']} x forward, "
            f"{taught}counted)",
        ),
        (
            "devices",
            f"{plan['world_size']} x {plan['gpu']} on {counted(plan['nodes'], 'node')}, ZeRO {plan['zero_stage']}; "
            f"peak {plan['peak_flops'] / 1e12:,.{digits}f} TFLOP/s ({plan['peak_basis']})",
        ),
    ]


def _memory(plan: dict[str, Any]) -> list[tuple[str, str]]:
    parts = plan["memory"]
    rows = [
        (
            f"memory per {_device(plan)}",
            f"{gib(parts['total'])} of {gib(plan['memory_available'])} at micro-batch "
            f"{plan['micro_batch']}; highest in the {parts['moment']}",
        ),
    ]
    rows += [(f"  {name.replace('_', ' ')}", gib(parts[name])) for name in PARTS if parts.get(name)]
    if plan["memory_beside"]:
        rows.append(("  decoding process", f"{gib(plan['memory_beside'])}, already subtracted from what is available"))
    if parts["host"]:
        rows.append(("  in host memory", f"{gib(parts['host'])} (offloaded; copy for checkpoints)"))
    for stage, totals in plan["memory_by_zero_stage"].items():
        cells = ", ".join(f"{count}: {gib(total)}" for count, total in totals.items())
        rows.append((f"  ZeRO {stage}, micro-batch", cells))
    usable = plan["largest_usable_micro_batch"]
    rows.append(("largest micro-batch", f"{plan['largest_micro_batch']:,} fit; this global batch can use {usable}"))
    return rows


def _time(plan: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            "speed",
            f"{plan['images_per_second']:,.1f} images/s, {plan['seconds_per_step']:,.3f} s per step, assuming "
            f"{plan['mfu']:.0%} MFU",
        ),
        ("time", f"{_days(plan['days'])} for {counted(plan['steps'], 'step')}, {plan['images']:,} images"),
        (
            "cost",
            f"{plan['cost']:,.0f} dollars, {plan['gpu_hours']:,.1f} {_device(plan)} hours at {plan['price']:g}",
        ),
    ]


def _days(days: float) -> str:
    return (
        f"{days:,.2f} days" if days >= 2 else f"{days * 24:,.1f} hours" if days >= 1 / 24 else f"{days * 1440:,.0f} min"
    )


def _input_output(plan: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *_text(plan["text_encoder"]),
        *_features(plan["picture_encoder"]),
        ("data", _data(plan["data"])),
        *_buckets(plan["data"].get("buckets") or {}),
        (
            "store",
            f"{plan['store_bytes_per_second'] / 1e6:,.1f} MB/s to read (size of a sample: {plan['data']['basis']})",
        ),
        (
            "checkpoint",
            f"{gib(plan['checkpoint_bytes'])}, {plan['checkpoint_seconds']:,.1f} s in the background, "
            f"{plan['checkpoint_blocked_seconds']:,.2f} s of them blocking, every "
            f"{plan['checkpoint_every_seconds'] / 60:,.1f} min; {plan['checkpoints_kept']} kept: "
            f"{gib(plan['checkpoints_kept_bytes'])}",
        ),
    ]


def _text(text: dict[str, Any]) -> list[tuple[str, str]]:
    if not text["parameters"]:
        return [("text encoder", f"{text['kind']}: {text['basis']}, negligible cost")]
    online, once = text["online"], text["precomputed"]
    price = (
        "number of samples not known"
        if once["cost"] is None
        else (
            f"{once['gpu_hours']:,.1f} GPU hours ({once['cost']:,.0f} dollars) once, at most {gib(once['bytes'])} "
            "of files"
        )
    )
    return [
        (
            "text encoder",
            f"{text['kind']}, {text['parameters'] / 1e6:,.0f} M parameters ({text['basis']}); this plan: "
            f"{text['mode']}",
        ),
        (
            "  online",
            f"{online['gpu_hours']:,.1f} GPU hours ({online['cost']:,.0f} dollars), {gib(online['memory'])} "
            f"per GPU, {online['images_per_second']:,.1f} images/s",
        ),
        ("  precomputed", f"{price}, {once['images_per_second']:,.1f} images/s (cascade embed)"),
    ]


def _features(features: dict[str, Any] | None) -> list[tuple[str, str]]:
    if features is None:
        return []
    repa, perceptual = features["repa"], features["perceptual"]
    losses = [f"repa {repa['weight']:g} up to step {repa['until']:,}"] if repa["weight"] else []
    if perceptual["weight"]:
        losses.append(f"perceptual {perceptual['weight']:g} from log-SNR {perceptual['log_snr_above']:g} on")
    return [
        (
            "picture encoder",
            f"dinov2, {features['parameters'] / 1e6:,.0f} M parameters (counted); {', '.join(losses)}: "
            f"{features['flops_per_image'] / 1e9:,.1f} GFLOP per image on average, "
            f"{features['gpu_hours']:,.1f} GPU hours",
        )
    ]


def _data(data: dict[str, Any]) -> str:
    if data["shards"] is None:
        return "data.shards is not set or cannot be read"
    row = f"{counted(data['shards'], 'shard')}, {gib(data['bytes'])}"
    if data["samples"] is None:
        return f"{row}, no index yet (cascade index)"
    epochs = data.get("dataset_epochs", {})
    sets = ", ".join(
        f"{name} {samples:,} in {epochs[name]:,.2f} epochs" for name, samples in data.get("datasets", {}).items()
    )
    return f"{row}, {data['samples']:,} samples{f' ({sets})' if sets else ''}, {data['epochs']:,.2f} epochs"


def _buckets(buckets: dict[str, Any]) -> list[tuple[str, str]]:
    def told(shape: str, facts: dict[str, Any]) -> str:
        known = "" if facts["samples"] is None else f" {facts['samples']:,} pictures"
        return f"{shape} of {facts['width']} x {facts['height']} px{known}"

    return [("  shapes", ", ".join(told(*pair) for pair in buckets.items()))] if buckets else []


def _fits(plan: dict[str, Any]) -> list[tuple[str, str]]:
    words = {True: "yes", False: "no", None: "not known"}
    return [("fits", ", ".join(f"{name.replace('_', ' ')}: {words[fit]}" for name, fit in plan["fits"].items()))]
