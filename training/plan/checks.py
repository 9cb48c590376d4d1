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
    """Refuses what cannot be trained.

    Only the commands that build a model for training are held to it: `cascade prepare` does not care about processes.

    Raises:
        ConfigError, ValueError: the sentence names the keys.
    """
    check_local(verb, config)
    require(
        verb != "distill" or config.distill.steps > 0,
        "distill.steps=0: give the number of steps that the student is to draw in",
    )
    if not COMMANDS[verb].trains:
        return
    check_model(config.stage, config.text.dim)
    if COMMANDS[verb].makes_run:  # plan and doctor list them all
        for problem in training_problems(config, planned_world_size(config.cluster)):
            raise ConfigError(problem)


def training_problems(config: Experiment, world_size: int) -> list[str]:
    """Everything that `cascade train` would refuse about these settings on `world_size` processes, one sentence each.

    `train` stops at the first; `plan` and its doctor name them all. Nothing is read and nothing is imported for it.
    """
    problems = []
    for rule in RULES:
        try:
            rule(config, world_size)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def check_named(verb: str, config: Experiment) -> None:
    """Refuses a training that names no data, before a process is started or a job submitted for it."""
    training = COMMANDS[verb].makes_run
    require(
        not training or bool(config.data.shards),
        "data.shards: it is not set; give a glob, brace pattern, directory or s3:// URL of .tar shards",
    )
    if training:
        check_shares(config)


def check_shares(config: Experiment) -> None:
    """A run that has saved a step goes on with the shares of the data sets (`data.shards`) that it has had so far.

    Raises:
        ConfigError: they changed without a position; it says how a change is written.
    """
    from data_pipeline.reading.state import check_past

    run = Path(config.run.dir)
    try:
        step = int(json.loads((run / "saved.json").read_text())["step"])
        before = yaml_data(run / "config.yaml")
    except (OSError, ValueError, KeyError, TypeError):
        return  # no such run yet, or one whose files a start will judge
    check_past(config.data, before, step * before.global_batch)


def yaml_data(path: Path) -> DataConfig:
    """The `data` section of a run's config.yaml, as far as it decides shares. Raises OSError, ValueError, KeyError."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())["data"]
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return DataConfig(shards=settings["shards"], global_batch=settings["global_batch"])


def check_local(verb: str, config: Experiment) -> None:
    """What is written file by file, and read by people, lies on a disk."""
    for key in COMMANDS[verb].local:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        more = "; checkpoints may go to checkpoint.dir=s3://..." if key == "run.dir" else ""
        require("://" not in str(value), f"{key}={value}: it must be a local directory{more}")


def planned_world_size(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> int:
    """Processes that will train: those a launcher has started, else the Slurm job's, else those of this machine."""
    ranks = read_ranks(environ)
    if ranks is not None:
        return ranks.world_size
    if cluster.kind != "local":
        return cluster.nodes * max(1, cluster.processes)
    return process_count(cluster, environ)


def check_model(stage: StageConfig, text_dim: int) -> None:
    """The U-Net fits the stage: its kind, its text width, and the picture sizes it can halve."""
    preset = resolve(stage.model.preset, dict(stage.model.overrides))
    require(
        stage.is_super_resolution or not preset.low_res,
        f"stage.model.preset={stage.model.preset} is for super-resolution but stage.low_res_size=0: choose the preset "
        "of a base stage, or set stage.low_res_size to the side of the picture it starts from",
    )
    given = stage.model.overrides.get("text_dim", text_dim)
    require(
        given == text_dim,
        f"stage.model.overrides.text_dim={given}: the U-Net reads text of width text.dim={text_dim}; leave it out",
    )
    for_stage(stage, text_dim)


def check_lanes(config: Experiment, world_size: int) -> None:
    """Every rank gets the same number of lanes."""
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
    """The share of a rank divides into equal micro-batches (asked only where the ranks have equal shares)."""
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
    """ZeRO 0 is the plain engine: one process, fp32."""
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
    """The held-out shards of the validation, and the key that names them."""
    if config.validation.shards or not config.evaluation.reference:
        return "validation.shards", config.validation.shards
    return "evaluation.reference", config.evaluation.reference


def check_heldout(config: Experiment, training: Sequence[str]) -> list[str]:
    """The shards of the validation, listed where they lie; empty without a validation.

    Args:
        training: URLs of the shards of data.shards.

    Raises:
        DataError: they are missing; ConfigError: training reads them as well, so the loss on them would fall while the
            model learns by heart.
    """
    return heldout_apart(config, training) if config.validation.every and validation_shards(config)[1] else []


def heldout_apart(config: Experiment, training: Sequence[str]) -> list[str]:
    """The same, whether or not the training itself validates; some are named."""
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
    """Held-out shards are named, and every rank measures as many of the samples."""
    settings = config.validation
    if not settings.every:
        return
    require(
        bool(validation_shards(config)[1]),
        f"validation.shards: validation.every={settings.every}, but no held-out shards are named; set it, or "
        "validation.every=0",
    )
    require(
        settings.samples % world_size == 0,
        f"validation.samples={settings.samples}: it must be a multiple of the {world_size} processes",
    )


def check_deterministic(config: Experiment, _world_size: int) -> None:
    """What `train.deterministic_reduction` can keep independent of the number of processes."""
    if not config.train.deterministic_reduction:
        return
    key = "train.deterministic_reduction=true"
    require(config.data.micro_batch > 0, f"{key}: set data.micro_batch, which every number of processes must share")
    name, by_value = config.optimizer.name, [n for n, entry in OPTIMIZERS.items() if entry.by_value]
    require(name in by_value, f"{key}: optimizer.name={name} splits its states by process; use {' or '.join(by_value)}")
    require(not config.zero.offload_optimizer, f"{key}: zero.offload_optimizer=true adds gradients up by itself")


def check_the_optimizer(config: Experiment, _world_size: int) -> None:
    """It exists, and has the options that are given."""
    check_optimizer(config.optimizer)
    require(
        not (config.optimizer.name == "muon" and config.zero.offload_optimizer),
        "zero.offload_optimizer=true: optimizer.name=muon would orthogonalise every matrix in host memory; set it to "
        "false, or use optimizer=adamw",
    )


def check_features(config: Experiment, _world_size: int) -> None:
    """Losses on features have their encoder."""
    repa, path = config.repa, config.dino.path
    for name in ("repa", "perceptual"):
        weight = getattr(config, name).weight
        require(
            bool(path) or not weight,
            f"{name}.weight={weight}: it compares by a frozen encoder; set dino.path to the directory of a DINOv2 "
            "model (hf download facebook/dinov2-base --local-dir DIR on a machine with internet)",
        )
    require(
        not repa.weight or repa.until > 0,
        f"repa.weight={repa.weight}: set repa.until, the step from which it no longer counts: late it hurts",
    )
    require(
        not (repa.weight and config.lora.rank),
        f"repa.weight={repa.weight}: adapters (lora.rank={config.lora.rank}) train nothing that could be aligned; "
        "leave it out",
    )


def check_buckets(config: Experiment, _world_size: int) -> None:
    """Crops are squares."""
    require(
        not (config.data.buckets and config.stage.crop_size),
        f"data.buckets: stage.crop_size={config.stage.crop_size} trains on square crops, which cover all shapes; "
        "leave data.buckets out",
    )


def check_distillation(config: Experiment, _world_size: int) -> None:
    """It has a teacher, of another run."""
    if not config.distill.steps:
        return
    require(
        bool(config.distill.teacher), "distill.teacher: name the run, checkpoint or bundle of the stage that teaches"
    )
    require(
        config.distill.teacher != config.run.dir,
        f"run.dir={config.run.dir}: it is the teacher's (distill.teacher); the student needs a run of its own",
    )
    for name in ("repa", "perceptual"):
        weight = getattr(config, name).weight
        require(not weight, f"{name}.weight={weight}: a student learns from its teacher alone; set it to 0")
    require(  # Salimans & Ho 2022, section 4
        config.stage.diffusion.parametrization != "eps",
        "stage.diffusion.parametrization=eps: where a student of few steps begins, in pure noise, noise says nothing "
        "of the picture; distil a stage of x0, v or edm",
    )


def check_mixture(config: Experiment, _world_size: int) -> None:
    """The shares of a mixture change between two steps."""
    config.data.check_changes()


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
)
"""What settings and a number of processes must agree in."""


def _or(numbers: list[int]) -> str:
    """1, 2, 4 or 8 (the middle left out when there are many)."""
    words = [str(n) for n in numbers]
    if len(words) > 8:
        words = [*words[:4], "...", *words[-2:]]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
