"""The optimizers by name, with what must be known about each before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import one_of
from training.config.experiment import OptimizerConfig


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer: its class and its settings."""

    module: str
    """Its module in `training.optim`."""
    name: str
    """Its class, a TrainOptimizer."""
    by_value: bool = False
    """The update is elementwise: any slice of the weights, in any memory layout, is updated exactly as within the whole
    tensor."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Settings that only this optimizer has, `optimizer.options.KEY`, and their defaults."""
    unused: tuple[str, ...] = ()
    """Fields of OptimizerConfig that this optimizer does not use; they are refused on the command line."""


OPTIMIZERS = {
    "adamw": OptimizerEntry("adamw", "AdamW", by_value=True),
    "adamw8bit": OptimizerEntry("adamw8bit", "AdamW8bit"),
    "adafactor": OptimizerEntry("adafactor", "Adafactor", unused=("betas", "eps")),
    "muon": OptimizerEntry("muon", "Muon", options={"momentum": 0.95, "iterations": 5}),
}
"""`optimizer.name` -> its entry. To add an optimizer: its file in training/optim, a line here, and
conf/optimizer/NAME.yaml."""


def optimizer_entry(name: str) -> OptimizerEntry:
    """Return the entry of `optimizer.name`. Raises ConfigError if there is none."""
    one_of("optimizer.name", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name]


def unused_settings(config: OptimizerConfig) -> set[str]:
    """Return the fields of `config` that have no effect with its `name` and `decay`."""
    constant = {"decay_from"} if config.decay == "constant" else set()
    return {*optimizer_entry(config.name).unused} | constant


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise ConfigError for an unknown optimizer, an option it does not have, or an invalid value of one."""
    known = optimizer_entry(config.name).options
    for key in config.options.keys() - known.keys():
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"optimizer.options.{key}: optimizer.name={config.name} has no such option; {has}")
    if config.name == "muon":
        momentum, iterations = (options_of(config)[key] for key in ("momentum", "iterations"))
        if not 0 <= momentum < 1:
            raise ConfigError(f"optimizer.options.momentum={momentum}: it must be at least 0 and less than 1")
        if iterations != int(iterations) or iterations < 1:
            raise ConfigError(f"optimizer.options.iterations={iterations}: it must be a whole number of at least 1")


def options_of(config: OptimizerConfig) -> dict[str, float]:
    """Return the optimizer's own settings, with defaults filled in."""
    return {**optimizer_entry(config.name).options, **config.options}
