"""Which keys each command reads with the settings given; overrides that it would ignore are refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any

from data_pipeline.common.errors import ConfigError
from training.config.cluster import KINDS
from training.config.commands import ACTIONS, COMMANDS, EVERYTHING, SAMPLER_KEYS
from training.config.experiment import OptimizerConfig
from training.config.optimizers import OPTIMIZERS, unused_settings

ALWAYS = ("json", "debug")
SHARDS = ("data.shards", "data.members", "data.index_dir", "data.deadline_s", "data.stall_s")
CAPTIONING = ("data.max_pixels", "data.background", "data.srgb")
DECODING = (*SHARDS, "data.threads", "data.captions", "data.max_pixels", "data.background", "data.srgb")
HELDOUT = (
    *(key for key in DECODING if key != "data.shards"),
    "data.window",
    "data.own_process",
    "data.prefetch_mb",
    "data.cache_dir",
    "data.cache_gb",
)
"""Data settings for reading reference pictures; the evaluation itself decides their shards, crop and scale."""
PLACE = ("run.dir", "run.name", "stage.name")
"""Keys that determine the run directory: runs/RUN.NAME/STAGE.NAME unless run.dir is given."""
PROCESSES = ("cluster.kind", "cluster.processes", "cluster.threads", "cluster.gpus")
"""Keys of `cluster` that a running program uses; `launch` uses the others for what it submits."""
DEVICES = (*PROCESSES, "precision.dtype")
TRAINING = (
    *(section for section in EVERYTHING if section not in ("evaluation", "optimizer", "cluster")),
    *PROCESSES,
    "cluster.preflight",
    "cluster.preflight_exclude",
    "evaluation.every",
    "evaluation.reference",
    "evaluation.samples",
    "evaluation.extractors",
    "evaluation.batch",
)


def _sections(without: str) -> Iterable[str]:
    return (section for section in TRAINING if section != without)


def _optimizer(config: Any) -> Iterable[str]:
    """Yield the settings that the chosen optimizer and decay use."""
    unused = unused_settings(config.optimizer)
    return (f"optimizer.{one.name}" for one in fields(OptimizerConfig) if one.name not in unused)


def _nodes(config: Any) -> Iterable[str]:
    """Return the key of the number of nodes, which has no effect with cluster=local."""
    return () if config.cluster.kind == "local" else ("cluster.nodes",)


def _train(config: Any) -> Iterable[str]:
    return (*TRAINING, *_nodes(config), *_optimizer(config))


def _distill(config: Any) -> Iterable[str]:
    """Like training, but most of stage.sampler is fixed by what the student is taught."""
    stage = [f"stage.{field.name}" for field in fields(config.stage) if field.name != "sampler"]
    shared = ("spacing", "threshold", "threshold_percentile", "aug_level", "original_side")
    sampler = (f"stage.sampler.{name}" for name in shared)
    return (*_sections("stage"), *_nodes(config), *_optimizer(config), *stage, *sampler, "distill")


def _ablate(config: Any) -> Iterable[str]:
    """Return the keys of a training; with `dry_run`, which prints commands to launch, all of `cluster`."""
    return (*_train(config), "ablate", *(("cluster",) if config.ablate.dry_run else ()))


def _plan(config: Any) -> Iterable[str]:
    own = ("doctor", "mfu", "gpu", "memory_gib", "price", "store_gb_s", "distill")
    return (*(_distill(config) if config.distill.steps else _train(config)), *own)


SUBMITTING = ("cluster", "run.")
"""What `launch` reads itself, to write the scripts and decide where they go."""
Reads = Callable[[Any], Iterable[str]]


def _prepare(config: Any) -> Iterable[str]:
    if config.prepare.kind == "draw":
        return ("prepare.kind", "prepare.output", "prepare.draw", "seed")
    settings = (
        "kind",
        "source",
        "output",
        "max_side",
        "quality",
        "samples_per_shard",
        "heldout",
        "deduplicate",
        "images",
        "captions",
    )
    shards = (*SHARDS[2:], "data.filter", "data.cache_dir", "data.cache_gb") if config.prepare.kind == "shards" else ()
    captions = ("data.captions.encoding", "data.captions.sources")
    own = ("data.members", *captions, "data.max_pixels", "data.threads")
    return (*(f"prepare.{name}" for name in settings), *shards, *own)


def _sample(config: Any) -> Iterable[str]:
    own = ["from_bundle", "output", "num_images", "layout", "size", "stages", "low_res", "image", "mask", "batch"]
    keys = [
        *own,
        *SAMPLER_KEYS,
        *DEVICES,
        "explain",
        "prompts",
        "negative_prompts",
        "seed",
        "run.name",
        "bundle.text_path",
        "sampling.columns",
        "sampling.certificate",
        "sampling.key",
        "sampling.prompts",
    ]
    keys += [] if config.from_bundle else ["bundle.dir"]
    keys += [] if config.output else ["sampling.output"]
    return keys + (["strength"] if config.image is not None else [])


def _evaluate(config: Any) -> Iterable[str]:
    keys = ["action", "run.name"]
    if config.action == "compare":
        return [*keys, "results"]
    keys.append("evaluation.output")
    if config.action == "pareto":
        return [*keys, "results", "record", *(("bundle.dir",) if config.record else ())]
    settings, shapes = config.evaluation, config.evaluation.kind == "shapes"
    keys += ["seed", *PROCESSES, *HELDOUT, "evaluation.reference", "evaluation.extractors"]
    if config.action == "reference":
        return [*keys, "bundle.dir", "evaluation.reference_samples"]
    keys += ["precision.dtype", "bundle.text_path", "watch", *SAMPLER_KEYS]
    keys += [
        f"evaluation.{name}" for name in ("kind", "samples", "images_per_prompt", "from_stage", "batch", "training")
    ]
    keys += ["evaluation.training_samples"] if settings.training else []
    keys += ["evaluation.psnr_samples"] if shapes else ["evaluation.prompts", "evaluation.reference_samples"]
    keys += ["prepare.draw.objects"] if shapes and not settings.reference else []
    if config.action == "bisect":
        return [*keys, *PLACE, "bundle.runs", "figure", "steps_between"]
    watching = (*PLACE, "bundle.runs", "figure", "wait_s", "stop_after")
    return [*keys, *(watching if config.watch else ("bundle.dir", "record"))]


def _checkpoints(config: Any) -> Iterable[str]:
    export = ("output", "average", "sigma_rel") if config.action == "export" else ()
    return (*PLACE, "action", *(() if config.action == "list" else ("steps",)), *export)


def _fixed(*keys: str) -> Reads:
    return lambda config: keys


READS: dict[str, Reads] = {
    "prepare": _prepare,
    "index": _fixed(*SHARDS, "data.filter", "rebuild"),
    "verify": _fixed(
        *DECODING, "data.filter", "data.crop", "data.flip", "data.decode_margin", "stage", "seed", "report", "output"
    ),
    "order": _fixed(
        *SHARDS,
        "data.filter",
        "data.global_batch",
        "data.lanes",
        "data.window",
        "data.buckets",
        "data.micro_batch",
        "seed",
        "world_size",
        "workers",
        "position",
        "batches",
        "quality",
    ),
    "embed": _fixed(*SHARDS, "data.captions", "text", *PROCESSES, "output", "part", "parts", "dtype", "batch"),
    "caption": _fixed(*SHARDS, *CAPTIONING, "data.filter", *PROCESSES, "vlm", "output", "part", "parts", "batch"),
    "train": _train,
    "ablate": _ablate,
    "distill": _distill,
    "bundle": _fixed("bundle.runs", "bundle.dir", "run.name"),
    "sample": _sample,
    "evaluate": _evaluate,
    "checkpoints": _checkpoints,
    "plan": _plan,
    "launch": _fixed(""),
    "status": _fixed(*PLACE, "sort", "watch", "price", "html"),
    "logs": _fixed(*PLACE, "rank", "lines", "follow"),
    "compare": _fixed("runs", "curves", "output"),
    "resume": _fixed(*PLACE, "at_once"),
    "stop": _fixed(*PLACE),
}
"""For each command, a function from its settings to the keys it reads, each including all keys below it (`launch`: all
keys; each job reads its own)."""
_OF_TRAININGS: dict[str, Sequence[Any]] = {
    "cluster.kind": KINDS,
    "optimizer.name": tuple(OPTIMIZERS),
    "optimizer.decay": ("cosine", "linear", "constant"),
}
MODES: dict[str, dict[str, Sequence[Any]]] = {
    **dict.fromkeys(("train", "plan", "ablate", "distill"), _OF_TRAININGS),
    "sample": {"from_bundle": (None,), "output": (None,), "image": ("FILE",)},
    "evaluate": {
        "watch": (False, True),
        "evaluation.kind": ("shapes", "pictures"),
        "evaluation.training": ("SHARDS",),
        "action": ACTIONS,
    },
    "checkpoints": {"action": ("list", "verify", "diff", "export")},
    "prepare": {"prepare.kind": ("draw", "folder", "table", "shards")},
}
"""Keys whose value decides which other keys a command reads, with the values to try."""


def is_read(verb: str, config: Any, key: str) -> bool:
    """Return whether the command reads this key, or one below it, with these settings."""
    read = (*ALWAYS, *READS[verb](config))
    return _covers(read, key)


def may_read(verb: str, key: str) -> bool:
    """Return whether the command reads this key, or one below it, with any settings. An empty key stands for all."""
    return not key or _covers(_ever_read(verb), key)


def _covers(read: Iterable[str], key: str) -> bool:
    return any(not name or f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in read)


@functools.cache
def _ever_read(verb: str) -> frozenset[str]:
    """Return the keys that the command reads in any of its modes, each including all keys below it."""
    config = unchecked(verb)
    modes = [_with(config, key, value) for key, values in MODES.get(verb, {}).items() for value in values]
    return frozenset((*ALWAYS, *(key for one in (config, *modes) for key in READS[verb](one))))


def refuse_unread(verb: str, config: Any, keys: Iterable[str]) -> None:
    """Refuse overrides that would have no effect.

    Args:
        keys: the keys that the user has set.

    Raises:
        ConfigError: one has no effect; the message names the first such key and what does read it.
    """
    for key in keys:
        if not is_read(verb, config, key):
            raise ConfigError(f"{key}: cascade {verb} would not use it; {reader(verb, config, key)}")


def refuse_unread_by_all(verbs: Sequence[tuple[str, Any]], keys: Iterable[str]) -> None:
    """Refuse overrides shared by several commands that neither any of them nor the submission itself would read.

    Args:
        verbs: commands with their settings.

    Raises:
        ConfigError: one has no effect; the message names the first such key.
    """
    for key in keys:
        if not key.startswith(SUBMITTING) and not any(is_read(verb, config, key) for verb, config in verbs):
            refuse_unread(*verbs[0], [key])


def reader(verb: str, config: Any, key: str) -> str:
    """Return what reads the key instead, as the end of a sentence."""
    for mode, values in MODES.get(verb, {}).items():
        found = [value for value in values if is_read(verb, _with(config, mode, value), key)]
        if found:
            said = " or ".join(f"{mode}={_said(value)}" for value in found)
            now = _get(config, mode)
            default = ", the default" if now == _get(unchecked(verb), mode) else ""
            return f"it belongs to {said}, not {mode}={_said(now)}{default}"
    own = key.removeprefix("stage.sampler.")
    if COMMANDS[verb].draws and own in SAMPLER_KEYS:
        return f"give {own}=..."
    others = [name for name in COMMANDS if name not in (verb, "launch") and _takes(name, key)]
    others += ["launch"] if key.startswith("cluster.") else []
    others += ["launch verb=all"] if key == "bundle.students" else []
    if others:
        return f"it is a setting of {', '.join(others)}"
    return "other settings given here take its place; leave it out"


def unchecked(verb: str) -> Any:
    """Return the command's default settings without validating them: they only serve to ask what it would read."""
    kind: Any = COMMANDS[verb].config
    config = kind.__new__(kind)
    for field in fields(kind):
        made = field.default_factory
        setattr(config, field.name, field.default if made is MISSING else made())
    return config


def _takes(verb: str, key: str) -> bool:
    """Return whether the command reads the key with its default settings."""
    config = unchecked(verb)
    return hasattr(config, key.partition(".")[0]) and is_read(verb, config, key)


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _with(config: Any, key: str, value: Any) -> Any:
    """Return a copy with one value changed, without validation: it only serves to ask what a command would read."""
    head, _, rest = key.partition(".")
    changed = copy.copy(config)
    setattr(changed, head, _with(getattr(config, head), rest, value) if rest else value)
    return changed
