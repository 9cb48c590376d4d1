"""`train.init_from`: a fresh run that begins with the weights of another one."""

from __future__ import annotations

import torch

from data_pipeline.errors import ConfigError
from training.bundle import INDEX, collect, read
from training.folder import open_folder


def load_weights(model: torch.nn.Module, path: str, stage: str) -> None:
    """The averaged weights of a bundle's stage, of a run, or of one checkpoint, into a fresh model.

    Raises:
        ConfigError: the bundle has no such stage, or the weights are another network's.
    """
    bundle = read(path) if open_folder(path).size(INDEX) is not None else collect([path])
    found = [weights for weights in bundle.stages if len(bundle.stages) == 1 or weights.config.name == stage]
    if not found:
        names = ", ".join(weights.config.name for weights in bundle.stages)
        raise ConfigError(f"train.init_from={path}: no stage {stage} in it; it has {names}")
    try:
        model.load_state_dict(found[0].tensors())
    except RuntimeError as error:
        raise ConfigError(
            f"train.init_from={path}: weights of another network ({str(error).splitlines()[-1].strip()})"
        ) from error
