"""Weights from other runs: those that a new run starts from (`train.init_from`; with `lora` they stay frozen), and
those of a distillation's teacher."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError, DataError
from training.cascade.bundle import StageWeights, check_base, load_unet, stage_weights
from training.cascade.requests import check_distilled
from training.config.diffusion import DiffusionConfig
from training.config.experiment import Experiment, StageConfig
from training.model.alignment import BESIDE
from training.model.lora import add_adapters, weights_sha256
from training.model.unet import UNet

TEACHING = {
    "name": "distill.solver",
    "steps": "distill.teacher_steps",
    "guidance": "distill.guidance",
    "spacing": "stage.sampler.spacing",
}
"""Sampler settings that are fixed if the teacher is itself distilled: field of `SamplerConfig` -> key."""
MEANING = ("parametrization", "residual", "sigma_data")
"""Settings that define what a network's output means."""

log = logging.getLogger("cascade")


def begin_with(model: torch.nn.Module, config: Experiment, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Load the averaged weights of a bundle's stage, of a run, or of one checkpoint into a new model, and add adapters
    with `lora`.

    Args:
        base: the record that this function returned at the first start of the run; the weights must be the same, even
            if they have moved.

    Returns:
        With `lora`, the record of the frozen weights for the run's checkpoints: `path` (of the particular checkpoint if
        init_from is a run), `sha256` of the weights, and the `scale` of the adapters. Otherwise None.

    Raises:
        ConfigError: no such stage, weights of a different network, or no layers to adapt.
        DataError: there are no such weights, or they are not those of `base`.
    """
    lora, path = config.lora, _absolute(str(config.starts_from))
    key = "train.init_from" if config.train.init_from else "distill.teacher"
    found = stage_weights(path, config.stage.name, key)
    _check_meaning(found.config.diffusion, config.stage.diffusion, f"{key}={path}")
    tensors = found.tensors()
    if base:
        check_base(tensors, base)
    try:
        own = {name: value for name, value in model.state_dict().items() if name.startswith(BESIDE)}
        model.load_state_dict({**tensors, **own})
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={path}: its weights are of a different network ({str(error).splitlines()[-1].strip()})"
        ) from error
    log.info("starting from the weights of %s", path)
    if found.origin.get("text") not in (None, config.text.sha):
        log.warning("they were trained with a different text encoder (text.sha=%s)", found.origin["text"])
    if (taught := found.origin.get("distilled")) and not config.distill.steps:
        log.warning("they are distilled to %d steps; this training makes an ordinary stage of them", taught["steps"])
    if not lora.rank:
        return None
    count = add_adapters(model, lora)
    log.info("these weights are frozen; adapters of rank %d have %d parameters", lora.rank, count)
    return {**(base or {"sha256": weights_sha256(tensors), "scale": lora.scale}), "path": _place_of(found, path)}


@dataclass
class Teacher:
    """A frozen network that a student learns from.

    Attributes:
        unet: the network with its averaged weights, in evaluation mode.
        config: the settings of its stage.
        record: for the run's checkpoints: `path` (of the particular checkpoint if distill.teacher is a run) and
            `sha256` of the weights.
    """

    unet: UNet
    config: StageConfig
    record: dict[str, Any]


def open_teacher(config: Experiment, known: dict[str, Any] | None) -> Teacher:
    """Load the teacher of a distillation, on the CPU.

    Args:
        known: its record at the first start of the run; the weights must be the same, even if they have moved.

    Raises:
        ConfigError: no such stage, one with other picture sizes, one trained with a different text encoder, or a
            distilled one that would have to teach other steps than its own.
        DataError: there are no weights, or they are not those of `known`.
    """
    stage, path = config.stage, _absolute(str(config.distill.teacher))
    key = f"distill.teacher={path}"
    found = stage_weights(path, stage.name, "distill.teacher")
    for name in ("image_size", "low_res_size"):
        theirs, own = getattr(found.config, name), getattr(stage, name)
        if theirs != own:
            raise ConfigError(f"{key}: its stage has stage.{name}={theirs}, not {own}; use a teacher for this stage")
    if found.origin.get("text") not in (None, config.text.sha):
        raise ConfigError(
            f"{key}: it was trained with a different text encoder (text.sha={found.origin['text']}); use that encoder"
        )
    if known is None:
        sampler = config.distill.teacher_sampler(stage.sampler)
        remedy = "set it, or use that student's own teacher"
        check_distilled(found.config, found.origin, sampler, keys=TEACHING, remedy=remedy)
    unet = load_unet(found)
    sha256 = weights_sha256(unet.state_dict())
    if known and known["sha256"] != sha256:
        raise DataError(f"{key}: its weights are not those of this run's teacher so far, {known['path']}; use these")
    return Teacher(unet, found.config, {"path": _place_of(found, path), "sha256": sha256})


def _place_of(found: StageWeights, path: str) -> str:
    """Return where weights can be found again: the bundle, or the particular checkpoint of a run."""
    return path if found.sha256 else _absolute(found.origin["checkpoint"])


def _absolute(path: str) -> str:
    """Return an absolute path, since the run may be resumed from another directory; names that are not files (s3://,
    the Hugging Face cache) are unchanged."""
    return os.path.abspath(path) if "://" not in path and os.path.exists(path) else path


def _check_meaning(before: DiffusionConfig, now: DiffusionConfig, where: str) -> None:
    """Refuse weights whose output means something else than this run's."""
    for name in MEANING:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ConfigError(f"stage.diffusion.{name}={new}: the weights of {where} were trained with {old}; use that")
