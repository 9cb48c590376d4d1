"""Composes conf/base.yaml and the overrides with Hydra, and validates the result as the verb's dataclass.

Each verb's dataclass is registered with Hydra as `schema_VERB`, and a config named VERB lists it before base.yaml, so
that every key exists with its type before a value is set, and `--cfg job` and shell completion know all keys.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from data_pipeline.common.errors import ConfigError
from training.cli.explain import explain
from training.cli.hydra_work import spare_hydra_work
from training.cli.overrides import CONF_DIR, keys_given, normalise
from training.config.commands import COMMANDS
from training.config.experiment import Experiment
from training.config.plain import from_plain
from training.config.reads import refuse_unread
from training.plan.checks import check


@functools.cache
def read_times_as_written() -> None:
    """Let YAML read 12:00:00, and numbers that begin with 0, as texts, as its version 1.2 does. Version 1.1 reads the
    number 43200 in base 60, and Slurm would take cluster.time=43200 for minutes."""
    tag = "tag:yaml.org,2002:int"
    whole = re.compile(r"[-+]?(?:0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)\Z")
    yaml.SafeLoader.yaml_implicit_resolvers = {  # a copy: those that write YAML quote what others would misread
        first: [(name, whole if name == tag else pattern) for name, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@functools.cache
def register_schema(verb: str) -> None:
    """Register the verb with Hydra: its dataclass, and the config that the command starts from."""
    from hydra.core.config_store import ConfigStore

    spare_hydra_work()
    read_times_as_written()
    configs = ConfigStore.instance()
    configs.store(name=f"schema_{verb}", node=COMMANDS[verb].config)
    own = {"run": {"dir": place}} if (place := COMMANDS[verb].run_dir) else {}
    configs.store(name=verb, node={"defaults": [f"schema_{verb}", "base", "_self_"], **own})


def validate(verb: str, cfg: DictConfig, words: Sequence[str] = ()) -> Experiment:
    """Convert the composed config to the verb's dataclass, and validate it.

    Args:
        words: the overrides given, each of which the verb must read.

    Raises:
        ConfigError: a setting is invalid; one sentence that names the key and the valid values.
    """
    root = COMMANDS[verb].config
    try:
        plain = _at_home(OmegaConf.to_container(cfg, resolve=True))
        config = from_plain(root, plain)
        _check_finite(plain)
        beside_bundle(config)
        refuse_unread(verb, config, keys_given(verb, words))
        check(verb, config)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(explain(error, verb)) from error
    return config


def beside_bundle(config: Experiment) -> None:
    """Put the pictures and figures of a bundle that is not the run's own next to that bundle, unless a directory was
    given; otherwise those of all such bundles would end up in runs/default. A Pareto curve goes next to its results."""
    run = f"runs/{config.run.name}"
    if getattr(config, "action", "") == "pareto" and config.evaluation.output == f"{run}/evaluation":
        results = map(str, getattr(config, "results", ()))
        folders = [Path(path).parent if path.endswith(".json") else Path(path) for path in results]
        config.evaluation.output = str(Path(os.path.commonpath([one.absolute().parent for one in folders])) / "pareto")
        return
    bundle = getattr(config, "from_bundle", None) or config.bundle.dir
    if bundle == f"{run}/bundle":
        return
    home, _, name = bundle.rstrip("/").rpartition("/")
    if "://" in bundle:
        home = f"runs/{home.rpartition('/')[2] if name == 'bundle' else name}"
    for section, default in ((config.sampling, f"{run}/samples"), (config.evaluation, f"{run}/evaluation")):
        if section.output == default or section.output.startswith(f"{default}/"):
            section.output = f"{home or '.'}/{section.output.removeprefix(run + '/')}"


def _at_home(settings: Any) -> Any:
    """Return the settings with ~ expanded, which shells do not do in key=~/path."""
    if isinstance(settings, dict):
        return {name: _at_home(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_at_home(value) for value in settings]
    return str(Path(settings).expanduser()) if isinstance(settings, str) and settings.startswith("~/") else settings


def _check_finite(settings: object, key: str = "") -> None:
    """Raise ConfigError for a number that is infinite or NaN."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            _check_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list):
        for value in settings:
            _check_finite(value, key)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ConfigError(f"{key}={settings}: it must be a finite number")


@contextlib.contextmanager
def searching(folder: str | None) -> Iterator[None]:
    """Let `composed` also find the config files of this directory (--config-dir), inside the context.

    Raises:
        ConfigError: there is no such directory.
    """
    if folder is None:
        yield
        return
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir={folder}: there is no such directory")
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    path = create_config_search_path(str(CONF_DIR))
    path.prepend("command-line", f"file://{Path(folder).absolute()}", SearchPathQuery(provider="schema", path=None))
    Hydra.create_main_hydra2(task_name="cascade", config_search_path=path)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def load_config(verb: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return the validated config that `cascade VERB OVERRIDES...` would run with.

    Raises:
        ConfigError: a setting is invalid; one sentence that names the key and the valid values.
    """
    if verb not in COMMANDS:
        raise ConfigError(f"{verb}: no such command; the commands are {', '.join(COMMANDS)}")
    if not isinstance(overrides, (list, tuple)) or not all(isinstance(word, str) for word in overrides):
        raise ConfigError(f'overrides={overrides!r}: give a list of settings, for example ["experiment=demo"]')
    return validate(verb, composed(verb, overrides), overrides)


def composed(verb: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose conf/base.yaml and the overrides with Hydra, leaving references (`${...}`) unresolved.

    Inside a running command, its search path (--config-dir) is used.

    Raises:
        ConfigError: a setting is invalid; one sentence that names the key and the valid values.
    """
    from hydra import compose

    with _hydra_for(verb):
        return compose(verb, overrides=normalise(verb, overrides))


def ingredients_of(verb: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the ingredients that `composed` would use, in order, whether the command line, the recipe or the
    experiment names them.

    Raises:
        ConfigError: a setting is invalid; one sentence that names the key and the valid values.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with _hydra_for(verb):
        found = (
            GlobalHydra.instance().config_loader().compute_defaults_list(verb, normalise(verb, overrides), RunMode.RUN)
        )
    paths = [str(one.config_path) for one in found.defaults]
    names = [path.removeprefix("ingredient/") for path in paths if path.startswith("ingredient/")]
    return list(dict.fromkeys(names))  # the command line replaces the recipe's and the experiment's


@contextlib.contextmanager
def _hydra_for(verb: str) -> Iterator[None]:
    """Initialise Hydra for the command, unless a running command has; convert its errors to ConfigError."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema(verb)
    try:
        if GlobalHydra.instance().is_initialized():
            yield
        else:
            with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(explain(error, verb)) from error
