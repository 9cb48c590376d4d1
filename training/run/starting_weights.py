"""`train.init_from`: a fresh run that begins with the weights of another one; under `lora` they stay as they are."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from data_pipeline.common.errors import ConfigError
from training.cascade.bundle import check_base, stage_weights
from training.config.diffusion import DiffusionConfig
from training.config.experiment import Experiment
from training.model.lora import add_adapters, weights_sha256

MEANING = ("parametrization", "residual", "sigma_data")
"""Settings that say what a network's output is."""

log = logging.getLogger("cascade")


def begin_with(model: torch.nn.Module, config: Experiment, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Puts the averaged weights of a bundle's stage, of a run, or of one checkpoint into a fresh model; adapters too.

    Args:
        base: what this function returned at the first start of the run; the weights must be those again, wherever they
            lie now.

    Returns:
        Under `lora`, what adapters are worth nothing without, for the run's checkpoints: `path` (of the one checkpoint,
        where init_from is a run), `sha256` of the weights, and the `scale` of the adapters. Otherwise None.

    Raises:
        ConfigError: no such stage, weights of another network, no layers to adapt.
        DataError: the weights are not those of `base`.
    """
    lora, path = config.lora, _absolute(str(config.train.init_from))
    found = stage_weights(path, config.stage.name)
    _check_meaning(found.config.diffusion, config.stage.diffusion, path)
    tensors = found.tensors()
    if base:
        check_base(tensors, base)
    try:
        own = {name: value for name, value in model.state_dict().items() if name.startswith("alignment.")}
        model.load_state_dict({**tensors, **own})
    except RuntimeError as error:
        raise ConfigError(
            f"train.init_from={path}: weights of another network ({str(error).splitlines()[-1].strip()})"
        ) from error
    log.info("weights taken from %s", path)
    if found.origin.get("text") not in (None, config.text.sha):
        log.warning("they were trained with another text encoder (text.sha=%s) than this run's", found.origin["text"])
    if not lora.rank:
        return None
    count = add_adapters(model, lora)
    log.info("they stay as they are; adapters of rank %d hold %d numbers", lora.rank, count)
    where = path if found.sha256 else _absolute(found.origin["checkpoint"])
    return {**(base or {"sha256": weights_sha256(tensors), "scale": lora.scale}), "path": where}


def _absolute(path: str) -> str:
    """Adapters outlive the directory that a command is given in; names that are no files (s3://, a cache) stay."""
    return os.path.abspath(path) if "://" not in path and os.path.exists(path) else path


def _check_meaning(before: DiffusionConfig, now: DiffusionConfig, path: str) -> None:
    """Refuses weights whose output would be taken for something else."""
    for name in MEANING:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ConfigError(
                f"stage.diffusion.{name}={new}: the weights of train.init_from={path} were trained with {old}; set that"
            )
