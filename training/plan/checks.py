"""Combinations of settings that cannot work together, refused before torch is imported (one sentence each)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError, about
from data_pipeline.config import DataConfig, divisors, is_mixture, require
from training.config.commands import COMMANDS
from training.config.experiment import ClusterConfig, Experiment, StageConfig
from training.config.optimizers import OPTIMIZERS, check_optimizer
from training.config.unet import for_stage, resolve
from training.processes.ranks import process_count, read_ranks


def check(verb: str, config: Experiment) -> None:
    """Refuse invalid combinations of settings. Those about training only apply to commands that build a model for it.

    Raises:
        ConfigError, ValueError: the settings contradict each other; the message names the keys.
    """
    check_local(verb, config)
    require(
        verb != "distill" or config.distill.steps > 0,
        "distill.steps=0: set the number of sampling steps of the student",
    )
    if not COMMANDS[verb].trains:
        return
    check_model(config.stage, config.text.dim)
    if COMMANDS[verb].makes_run:  # plan and doctor list all problems
        for problem in training_problems(config, planned_world_size(config.cluster)):
            raise ConfigError(problem)


def training_problems(config: Experiment, world_size: int) -> list[str]:
    """Return everything that `cascade train` would refuse about these settings on `world_size` processes, one sentence
    each.

    `train` stops at the first problem; `plan` and its doctor report all. Reads no files.
    """
    problems = []
    for rule in RULES:
        try:
            rule(config, world_size)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def check_named(verb: str, config: Experiment) -> None:
    """Refuse a training without data, or with changed shares of data sets, before starting a process or submitting a
    job."""
    training = COMMANDS[verb].makes_run
    require(
        not training or bool(config.data.shards),
        "data.shards: it is not set; give a glob, brace pattern, directory or s3:// URL of .tar shards",
    )
    if training:
        check_shares(config)


def check_shares(config: Experiment) -> None:
    """Check that the shares of data sets (`data.shards`) up to a run's saved step are those that it has trained with.

    Raises:
        ConfigError: they changed without a position; the message explains how to write a change.
    """
    from data_pipeline.reading.state import check_past

    run = Path(config.run.dir)
    try:
        step = int(json.loads((run / "saved.json").read_text())["step"])
        before = yaml_data(run / "config.yaml")
    except (OSError, ValueError, KeyError, TypeError):
        return  # a new run, or damaged files, which the start itself will report
    check_past(config.data, before, step * before.global_batch)


def yaml_data(path: Path) -> DataConfig:
    """Read the settings that determine shares from a run's config.yaml. Raises OSError, ValueError or KeyError."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())["data"]
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return DataConfig(shards=settings["shards"], global_batch=settings["global_batch"])


def check_local(verb: str, config: Experiment) -> None:
    """Refuse remote paths for the verb's keys that must be local directories."""
    for key in COMMANDS[verb].local:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        more = "; checkpoints may go to checkpoint.dir=s3://..." if key == "run.dir" else ""
        require("://" not in str(value), f"{key}={value}: it must be a local directory{more}")


def planned_world_size(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes that will train: those that a launcher has started, otherwise those of the
    scheduler's job, otherwise those of this machine."""
    ranks = read_ranks(environ)
    if ranks is not None:
        return ranks.world_size
    if cluster.kind != "local":
        return cluster.nodes * max(1, cluster.processes)
    return process_count(cluster, environ)


def check_model(stage: StageConfig, text_dim: int) -> None:
    """Check that the U-Net fits the stage: its kind, its text width, and picture sizes that it can halve."""
    preset = resolve(stage.model.preset, dict(stage.model.overrides))
    require(
        stage.is_super_resolution or not preset.low_res,
        f"stage.model.preset={stage.model.preset} is for super-resolution but stage.low_res_size=0: choose the preset "
        "of a base stage, or set stage.low_res_size to the side of the picture it starts from",
    )
    require(
        stage.is_super_resolution or not stage.diffusion.residual,
        "stage.diffusion.residual=true: a base stage has no low-res picture to start from; it is for super-resolution",
    )
    given = stage.model.overrides.get("text_dim", text_dim)
    require(
        given == text_dim,
        f"stage.model.overrides.text_dim={given}: the U-Net reads text of width text.dim={text_dim}; leave it out",
    )
    for_stage(stage, text_dim)


def check_lanes(config: Experiment, world_size: int) -> None:
    """Check that every rank gets the same number of lanes."""
    data = config.data
    lanes = data.lane_count
    allowed = divisors(lanes)
    if data.global_batch % world_size:
        other = f"data.global_batch to a multiple of {world_size}"
    else:
        other = f"data.lanes to a multiple of {world_size}"
    require(
        world_size in allowed,
        f"{world_size} processes (cluster.nodes x cluster.processes) cannot share the {lanes} lanes of "
        f"data.global_batch={data.global_batch}: use {_or(allowed)} processes, or set {other}",
    )


def check_micro_batch(config: Experiment, world_size: int) -> None:
    """Check that a rank's share divides into equal micro-batches (if the ranks have equal shares)."""
    data = config.data
    if not data.micro_batch or data.global_batch % world_size:
        return
    share = data.share_of(world_size)
    require(
        data.micro_batch in divisors(share),
        f"data.micro_batch={data.micro_batch}: it must divide the {share} samples that each of {world_size} "
        f"processes gets of data.global_batch={data.global_batch}; use {_or(divisors(share))}",
    )


def check_zero(config: Experiment, world_size: int) -> None:
    """Check that zero.stage=0, the plain engine, has one process and fp32."""
    if config.zero.stage:
        return
    require(
        world_size == 1, f"zero.stage=0: it only works with one process, not {world_size}; use zero.stage=1, 2 or 3"
    )
    require(
        config.precision.dtype == "fp32",
        f"zero.stage=0 with precision.dtype={config.precision.dtype}: use zero.stage=1, or precision.dtype=fp32",
    )


def validation_shards(config: Experiment) -> tuple[str, Any]:
    """Return the key that names the held-out shards of the validation, and these shards."""
    if config.validation.shards or not config.evaluation.reference:
        return "validation.shards", config.validation.shards
    return "evaluation.reference", config.evaluation.reference


def check_heldout(config: Experiment, training: Sequence[str]) -> list[str]:
    """List the URLs of the validation's shards; empty without a validation.

    Args:
        training: URLs of the shards of data.shards.

    Raises:
        DataError: they are missing.
        ConfigError: training reads them as well, so the loss on them would not show overfitting.
    """
    return heldout_apart(config, training) if config.validation.every and validation_shards(config)[1] else []


def heldout_apart(config: Experiment, training: Sequence[str]) -> list[str]:
    """Like `check_heldout`, whether or not the training itself validates; held-out shards must be set."""
    key, shards = validation_shards(config)
    from data_pipeline.shards.dataset import patience_of
    from data_pipeline.storage import store

    require(
        not is_mixture(shards),
        f"{key}: only data.shards can be a mixture of data sets; give a pattern or a list of patterns",
    )
    with about(key):
        heldout = store.expand(shards, patience_of(config.data))
    both = sorted({*training} & {*heldout})
    named = f"{both[0]}{f' and {len(both) - 1} more' if len(both) > 1 else ''}" if both else ""
    require(not both, f"{key}: {named} is in data.shards as well; use shards that training does not read")
    return heldout


def check_validation(config: Experiment, world_size: int) -> None:
    """Check that the validation has held-out shards, and that every rank measures the same number of samples."""
    settings = config.validation
    if not settings.every:
        return
    require(
        bool(validation_shards(config)[1]),
        f"validation.shards: validation.every={settings.every}, but no held-out shards are set; set it, or use "
        "validation.every=0",
    )
    require(
        settings.samples % world_size == 0,
        f"validation.samples={settings.samples}: it must be a multiple of the {world_size} processes",
    )


def check_deterministic(config: Experiment, _world_size: int) -> None:
    """Check that `train.deterministic_reduction` can make the training independent of the number of processes."""
    if not config.train.deterministic_reduction:
        return
    key = "train.deterministic_reduction=true"
    require(config.data.micro_batch > 0, f"{key}: set data.micro_batch, which every number of processes must share")
    name, by_value = config.optimizer.name, [n for n, entry in OPTIMIZERS.items() if entry.by_value]
    require(name in by_value, f"{key}: optimizer.name={name} splits its states by process; use {' or '.join(by_value)}")
    require(not config.zero.offload_optimizer, f"{key}: zero.offload_optimizer=true sums gradients in its own order")


def check_the_optimizer(config: Experiment, _world_size: int) -> None:
    """Check that the optimizer exists, has the given options, and can be offloaded if requested."""
    check_optimizer(config.optimizer)
    require(
        not (config.optimizer.name == "muon" and config.zero.offload_optimizer),
        "zero.offload_optimizer=true: optimizer.name=muon would orthogonalise every matrix in host memory; set it to "
        "false, or use optimizer=adamw",
    )


def check_features(config: Experiment, _world_size: int) -> None:
    """Check that losses on features have an encoder and are not combined with LoRA in vain."""
    repa, path = config.repa, config.dino.path
    for name in ("repa", "perceptual"):
        weight = getattr(config, name).weight
        require(
            bool(path) or not weight,
            f"{name}.weight={weight}: it needs a frozen encoder; set dino.path to the directory of a DINOv2 model (hf "
            "download facebook/dinov2-base --local-dir DIR on a machine with internet access)",
        )
    require(
        not repa.weight or repa.until > 0,
        f"repa.weight={repa.weight}: set repa.until, the step at which to switch it off: late in training it hurts",
    )
    require(
        not (repa.weight and config.lora.rank),
        f"repa.weight={repa.weight}: it cannot be combined with adapters (lora.rank={config.lora.rank}); leave it out",
    )


def check_buckets(config: Experiment, _world_size: int) -> None:
    """Refuse aspect-ratio buckets together with crops, which are squares."""
    require(
        not (config.data.buckets and config.stage.crop_size),
        f"data.buckets: stage.crop_size={config.stage.crop_size} trains on square crops, which cover all shapes; "
        "leave data.buckets out",
    )


def check_distillation(config: Experiment, _world_size: int) -> None:
    """Check that a distillation has a teacher from another run, and no settings that contradict it."""
    if not config.distill.steps:
        return
    require(
        bool(config.distill.teacher), "distill.teacher: set it to the run, checkpoint or bundle of the trained stage"
    )
    require(
        config.distill.teacher != config.run.dir,
        f"run.dir={config.run.dir}: this is the teacher's run (distill.teacher); the student needs its own",
    )
    for name in ("repa", "perceptual"):
        weight = getattr(config, name).weight
        require(not weight, f"{name}.weight={weight}: a student only learns from its teacher; set it to 0")
    require(  # Salimans & Ho 2022, section 4
        config.stage.diffusion.parametrization != "eps",
        "stage.diffusion.parametrization=eps: a student of few steps starts from pure noise, where predicting eps "
        "tells nothing about the picture; distil a stage with x0, v or edm",
    )


def check_mixture(config: Experiment, _world_size: int) -> None:
    """Check that the shares of a mixture only change between two steps."""
    config.data.check_changes()


def check_sampler(config: Experiment, _world_size: int) -> None:
    """Check that sampling asks for no more noise on the low-res picture than the training has."""
    config.stage.check_aug_level(config.stage.sampler, "stage.sampler.aug_level")


RULES = (
    check_the_optimizer,
    check_lanes,
    check_mixture,
    check_buckets,
    check_micro_batch,
    check_features,
    check_zero,
    check_validation,
    check_deterministic,
    check_distillation,
    check_sampler,
)
"""Checks of the settings against a number of processes."""


def _or(numbers: list[int]) -> str:
    """Format numbers as "1, 2, 4 or 8", omitting the middle of more than eight."""
    words = [str(n) for n in numbers]
    if len(words) > 8:
        words = [*words[:4], "...", *words[-2:]]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
