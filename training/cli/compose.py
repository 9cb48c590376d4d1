"""Hydra composes conf/base.yaml and the overrides; this file turns the result into the checked dataclass of the verb.

Each verb's dataclass is registered with Hydra as `schema_VERB`, and a config named VERB that lists it before base.yaml.
So every key exists with its type before a value is set, and `--cfg job` and shell completion know all of them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

import conf
from data_pipeline.common.errors import ConfigError
from training.cli.explain import explain
from training.cli.fields import keys_of
from training.config.commands import COMMANDS
from training.config.experiment import Experiment
from training.plan.checks import check

CONF_DIR = Path(conf.__file__).parent
ALIASES = {"run": "run.dir", "init_from": "train.init_from"}
"""Short names that read well on the command line."""
OVERRIDE = re.compile(r"(?P<prefix>\+{0,2})(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)


@functools.cache
def register_schema(verb: str) -> None:
    """Makes the verb known to Hydra: its dataclass, and the config that the command starts from."""
    from hydra.core.config_store import ConfigStore

    configs = ConfigStore.instance()
    configs.store(name=f"schema_{verb}", node=COMMANDS[verb].config)
    configs.store(name=verb, node={"defaults": [f"schema_{verb}", "base", "_self_"]})


def groups() -> dict[str, list[str]]:
    """Config groups and their options: the directories of conf/ (without recipe, whose files Hydra chooses)."""
    found = {}
    for folder in sorted(p for p in CONF_DIR.iterdir() if p.is_dir() and p.name not in ("__pycache__", "recipe")):
        found[folder.name] = sorted(p.stem for p in folder.glob("*.yaml"))
    return found


def normalise(verb: str, overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra's grammar wants them.

    * short names: `run=DIR`, `init_from=PATH`
    * `debug=true`: the option `true` of the group `debug` (Hydra would read a truth value and refuse)
    * values that are no Hydra expression are taken as text: s3://bucket/{0000..0099}.tar, [a=1,b=2], odd paths
    * keys of free mappings (cluster.sbatch.qos=high) need no `+`

    Raises:
        ConfigError: a word that is not `key=value`.
    """
    return [_normalise_one(verb, word) for word in overrides]


def _normalise_one(verb: str, word: str) -> str:
    if word.startswith("~"):
        return word
    match = OVERRIDE.fullmatch(word)
    if match is None:
        raise ConfigError(f"'{word}': a setting is key=value, for example train.steps=100")
    prefix, key, value = match["prefix"], match["key"], match["value"]
    key = ALIASES.get(key, key)
    if key in groups():
        if value in ("", "null", "none", "None"):
            raise ConfigError(f"{word}: {_options(key)}; to leave a group at its default, do not name it")
        if re.fullmatch(r"true|false|on|off|yes|no|\d+", value, re.IGNORECASE):
            value = f"'{value}'"
    known = keys_of(COMMANDS[verb].config)
    opened = next((known[p] for p in [key, *_parents(key)] if p in known and known[p].is_open), None)
    if opened is not None:
        prefix, value = "++", _mapping(value, numbers=typing.get_args(opened.type)[1] is float)
    fixed = f"{prefix}{key}={value}"
    return fixed if _is_expression(fixed) else f"{prefix}{key}={_as_text(value)}"


def _options(group: str) -> str:
    return f"the options of {group} are {', '.join(groups()[group])}"


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _mapping(value: str, numbers: bool) -> str:
    """A YAML or JSON mapping for Hydra, which wants a colon inside a name escaped: {json:caption: 1} becomes
    {json\\:caption: 1}.

    Args:
        numbers: its values are numbers, so that what follows the last colon is the value: {json:caption:1}.
    """
    if not re.fullmatch(r"\{.*:.*\}" if numbers else r"\{.*: .*\}", value):
        return value
    with contextlib.suppress(yaml.YAMLError):
        pairs = yaml.safe_load(value)
        if numbers:
            pairs = dict(_split_number(str(k), v) for k, v in pairs.items())
        if all(isinstance(v, (str, int, float)) for v in pairs.values()):
            escaped = {re.sub(r"([^\w.-])", r"\\\1", str(k)): v for k, v in pairs.items()}
            return "{" + ",".join(f"{k}:{v}" for k, v in escaped.items()) + "}"
    return value


def _split_number(key: str, value: object) -> tuple[str, object]:
    """YAML takes `json:caption:1`, without a space, for a name without a value."""
    name, colon, last = key.rpartition(":")
    return (name, yaml.safe_load(last)) if value is None and colon else (key, value)


def _is_expression(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _as_text(value: str) -> str:
    """A value that Hydra cannot read, quoted; of [a=1,{0..9}.tar], each element."""
    if value.startswith("[") and value.endswith("]"):
        elements = re.findall(r"(?:'[^']*'|\"[^\"]*\"|\{[^}]*\}|[^,])+", value[1:-1])
        return "[" + ",".join(e if e[:1] in "'\"" else _quote(e.strip()) for e in elements) + "]"
    return _quote(value)


def _quote(value: str) -> str:
    return "'" + value.replace("'", "\\'") + "'"


def validate(verb: str, cfg: DictConfig) -> Experiment:
    """The composed config as the verb's dataclass, checked.

    Raises:
        ConfigError: one sentence that names the key and what would be valid.
    """
    root = COMMANDS[verb].config
    try:
        plain = _at_home(OmegaConf.to_container(cfg, resolve=True))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(root), plain))
        assert isinstance(config, Experiment)
        _check_finite(plain)
        check(verb, config)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(explain(error, root)) from error
    return config


def _at_home(settings: Any) -> Any:
    """With ~ spelled out: shells leave it as it is in key=~/path."""
    if isinstance(settings, dict):
        return {name: _at_home(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_at_home(value) for value in settings]
    return str(Path(settings).expanduser()) if isinstance(settings, str) and settings.startswith("~/") else settings


def _check_finite(settings: object, key: str = "") -> None:
    """Raises ConfigError for a number that is infinite or none."""
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
    """`composed` also finds the files of this directory (--config-dir).

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
    """The config that `cascade VERB OVERRIDES...` would run with.

    Raises:
        ConfigError: one sentence that names the key and what would be valid.
    """
    return validate(verb, composed(verb, overrides))


def composed(verb: str, overrides: Sequence[str] = ()) -> DictConfig:
    """What Hydra makes of conf/base.yaml and the overrides, references not yet filled in.

    Inside a running command, its search path (--config-dir) is used.

    Raises:
        ConfigError: one sentence that names the key and what would be valid.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema(verb)
    words = normalise(verb, overrides)
    try:
        if GlobalHydra.instance().is_initialized():
            return compose(verb, overrides=words)
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(verb, overrides=words)
    except Exception as error:
        raise ConfigError(explain(error, COMMANDS[verb].config)) from error
