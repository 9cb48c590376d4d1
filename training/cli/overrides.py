"""Converts words as people type them to Hydra's override grammar, so that texts and unusual paths need no quoting.

A key is free text if its field is marked `metadata=SENTENCES` (prompts): its value is taken as typed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import yaml

import conf
from data_pipeline.common.errors import ConfigError
from training.cli.fields import Key, keys_of
from training.config.commands import COMMANDS, SAMPLER_KEYS
from training.config.experiment import WandbConfig
from training.config.plain import escaped
from training.config.reads import may_read

CONF_DIR = Path(conf.__file__).parent
ALIASES = {"run": "run.dir", "init_from": "train.init_from"}
"""Short names of keys on the command line."""
OVERRIDE = re.compile(r"(?P<prefix>\+{0,2})(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)


@functools.cache
def groups() -> dict[str, list[str]]:
    """Return the config groups and their options: the directories of conf/, without recipe, which users do not choose
    from."""
    found = {}
    for folder in sorted(p for p in CONF_DIR.iterdir() if p.is_dir() and p.name not in ("__pycache__", "recipe")):
        found[folder.name] = sorted(p.stem for p in folder.glob("*.yaml"))
    return found


def normalise(verb: str, overrides: Sequence[str]) -> list[str]:
    """Convert overrides to Hydra's grammar.

    * `run=DIR` and `init_from=PATH` are short names
    * `debug=true` selects the option `true` of the group `debug` (Hydra would read a boolean and refuse it)
    * prompts and notes are one text, including commas, brackets and `${`; a list needs quotation marks, or elements
      without a blank next to their commas
    * values of other text keys stay text: run.name=007
    * values that are not Hydra expressions are taken as text: s3://bucket/{0000..0099}.tar, [a=1,b=2], unusual paths
    * keys of open mappings (cluster.sbatch.qos=high) need no `+`; before any other known key or group, `+` is dropped
    * words without `=` are the list that some commands take (cascade compare RUN RUN)

    Raises:
        ConfigError: a word that is not `key=value`, or a key of a stage for a command that draws with a bundle.
    """
    key = COMMANDS[verb].bare
    bare = [word for word in overrides if key and "=" not in word and not word.startswith("~")]
    rest = [word for word in overrides if word not in bare]
    if bare:
        rest.append(f"{key}=[{','.join(_quote(word) for word in bare)}]")
    _check_quoted(verb, rest)
    return [_normalise_one(verb, word) for word in [*from_environment(verb, rest), *rest]]


def _check_quoted(verb: str, words: Sequence[str]) -> None:
    """Raise ConfigError for a plain word after a setting: most probably the rest of a value with blanks."""
    for index, (before, word) in enumerate(pairwise(words)):
        if "=" in before and "=" not in word and re.match(r"\w", word):
            value = takewhile(lambda one: "=" not in one, words[index + 1 :])
            whole = shlex.quote(" ".join([before, *value]))
            raise ConfigError(f"{_no_setting(verb, word)}; if it belongs to the value before it, quote both: {whole}")


def typed_words() -> list[str]:
    """Return the overrides of the running command as `normalise` returned them; an empty list outside a command."""
    from hydra.core.hydra_config import HydraConfig

    return [str(word) for word in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


ENVIRONMENT = {
    "WANDB_MODE": "wandb.mode",
    "WANDB_PROJECT": "wandb.project",
    "WANDB_ENTITY": "wandb.entity",
    "WANDB_NAME": "wandb.name",
    "WANDB_RUN_GROUP": "wandb.group",
    "WANDB_NOTES": "wandb.notes",
    "WANDB_TAGS": "wandb.tags",
}
"""W&B's environment variables -> the keys they set, for commands that train; WANDB_DISABLED=true sets the mode too."""
MODES = {"dryrun": "offline", "run": "online"}
"""W&B's older names of modes."""


def from_environment(verb: str, words: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the settings from W&B's environment variables that the command line does not set itself."""
    if not (COMMANDS[verb].trains or verb == "launch"):
        return []
    typed = {word.partition("=")[0].lstrip("+~") for word in words}
    found = []
    for variable, key in ENVIRONMENT.items():
        value = environ.get(variable)
        if key == "wandb.mode" and environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            value = "disabled"
        if not value or key in typed or (key == "wandb.mode" and "tracking" in typed):
            continue
        if key == "wandb.mode":
            value = MODES.get(value.lower(), value.lower())
        tags = [tag.strip() for tag in value.split(",") if tag.strip()]
        try:
            checked: dict[str, Any] = {key.removeprefix("wandb."): tags if key == "wandb.tags" else value}
            WandbConfig(**checked)
        except ConfigError as error:
            raise ConfigError(f"{variable}, in the environment, sets {error}") from error
        if key == "wandb.tags":
            value = "[" + ",".join(map(_quote, tags)) + "]"
        found.append(f"{key}={value if key in ('wandb.tags', 'wandb.notes') else _quote(value)}")
    return found


SECTIONS = {"tracking": "wandb", "extractor": "evaluation.extractors", "ingredient": "stage.diffusion"}
"""Groups that fill a section with a different name."""
SEVERAL = ("experiment", "stage", "debug")
"""Groups that fill several sections (a stage loads the experiment's recipe for it)."""


def section_of(group: str) -> str:
    """Return the section that a group fills; an empty string: several."""
    return "" if group in SEVERAL else SECTIONS.get(group, group)


def keys_given(verb: str, words: Sequence[str]) -> list[str]:
    """Return the settings that the words set, in order: keys, and the sections that groups fill."""
    known, found = keys_of(COMMANDS[verb].config), []
    for word in words:
        name = word.partition("=")[0].lstrip("+~")
        key = ALIASES.get(name, name)
        if key in groups():
            found += [] if key in SEVERAL else [section_of(key)]
        elif key in known or any(known[parent].is_open for parent in _parents(key) if parent in known):
            found.append(key)
    return found


def _normalise_one(verb: str, word: str) -> str:
    if word.startswith("~"):
        return _removal(verb, word)
    match = OVERRIDE.fullmatch(word)
    if match is None:
        raise ConfigError(_no_setting(verb, word))
    prefix, key, value = match["prefix"], match["key"], match["value"]
    key = ALIASES.get(key, key)
    group, _, place = key.partition("@")
    if place and group in groups():
        raise ConfigError(f"{word}: a group has its own section and cannot be put elsewhere; write {group}={value}")
    if key in UNUSED_BY_HYDRA:
        raise ConfigError(f"{word}: {UNUSED_BY_HYDRA[key]}")
    if key.startswith("stage.") and COMMANDS[verb].draws:
        own = key.removeprefix("stage.sampler.")
        own = {"name": "sampler"}.get(own, own)
        instead = f"{own}={value}" if own in SAMPLER_KEYS else "another bundle"
        raise ConfigError(
            f"{word}: cascade {verb} uses the settings stored in the bundle and would ignore it; give {instead}"
        )
    if key in groups():
        if value in ("", "null", "none", "None"):
            raise ConfigError(f"{word}: {_options(key)}; to use a group's default, leave it out")
        if re.search(r"\s[\w.]+=", value):
            raise ConfigError(
                f"{word}: these are several settings in one pair of quotation marks; quote each on its own"
            )
        if re.search(r",[\w.]+=", value):
            raise ConfigError(f"{word}: settings are separated by blanks, not by commas")
        if re.fullmatch(r"true|false|on|off|yes|no|\d+", value, re.IGNORECASE):
            value = f"'{value}'"
    known = keys_of(COMMANDS[verb].config)
    if key in groups() or key in known:
        prefix = ""
    if key in known and known[key].is_sentence:
        return f"{prefix}{key}={_sentence(value, known[key])}"
    opened = next((known[p] for p in [key, *_parents(key)] if p in known and known[p].is_open), None)
    if opened is not None:
        names = opened.name == "cluster.sbatch"
        prefix, value = "++", _mapping(value, numbers=typing.get_args(opened.type)[1] is float, names=names)
        if names and key not in known and re.fullmatch(NAME_OF_DIGITS, value):
            value = _quote(value)
    if key in known and known[key].is_text and re.fullmatch(NUMBER_OR_TRUTH, value, re.IGNORECASE):
        value = _quote(value)
    if re.match(r"\[\s*\{", value):
        value = _entries(value)
    fixed = f"{prefix}{key}={value}"
    return fixed if _is_expression(fixed) else f"{prefix}{key}={_as_text(value)}"


UNUSED_BY_HYDRA = {
    "hydra.run.dir": "nothing would be written there; a run's directory is run.dir=...",
    "hydra.output_subdir": "nothing would be written there; a run's directory is run.dir=...",
    "hydra.sweep.subdir": "nothing would be written there; each job of a sweep has its own run.dir or output",
    "hydra.job.chdir": "cascade stays in the current directory; a run's directory is run.dir=...",
    "hydra.job.name": "nothing would get this name; the name of a run is run.name=...",
    "hydra.verbose": "nothing more would be shown; debug=true shows tracebacks",
    "hydra.launcher": "a launcher is chosen with hydra/launcher=NAME",
    "hydra.sweeper": "a sweeper is chosen with hydra/sweeper=NAME",
}
"""Settings of Hydra that would have no effect here, and what to write instead."""


PLACES = {
    **dict.fromkeys(("status", "logs", "stop", "resume", "checkpoints"), "run"),
    **dict.fromkeys(("verify", "index", "order", "embed", "caption", "train"), "data.shards"),
    "prepare": "prepare.source",
    "sample": "from_bundle",
    "evaluate": "bundle.dir",
}
"""The key of each command that a path alone most probably stands for."""


def _no_setting(verb: str, word: str) -> str:
    """Return the sentence about a word that is not `key=value`, with the setting that was probably meant."""
    key, known = word.partition("=")[0], keys_of(COMMANDS[verb].config)
    if word[0] in "\u2010\u2011\u2012\u2013\u2014\u2212":
        return f"'{word}': it starts with a typographic dash; type the dashes of options as - or --"
    if re.match(r"[\w.]+\[", key):
        return f"'{word}': a list is given as a whole: {key.partition('[')[0]}=[...]"
    mine = [group for group, options in groups().items() if word in options and may_read(verb, section_of(group))]
    group = next(iter(mine), None)
    text = next((key.name for key in known.values() if key.is_sentence and "." not in key.name), None)
    if group:
        meant = f"{group}={word}"
    elif word in known or word in groups():
        meant = f"{word}=VALUE"
    elif "=" not in word and verb in PLACES and ("/" in word or Path(word).exists() or PLACES[verb] == "run"):
        meant = f"{PLACES[verb]}={word}"
    elif text and "=" not in word:
        meant = f"{text}={_quote(word)}"
    elif "=" not in word and verb in PLACES and not may_read(verb, "train.steps"):
        meant = f"{PLACES[verb]}={word}"
    else:
        meant = "train.steps=100" if may_read(verb, "train.steps") else "experiment=demo"
    return f"'{word}': a setting is key=value, without blanks around =, for example {meant}"


def _removal(verb: str, word: str) -> str:
    """Check `~key`, which removes a key from an open mapping; all other keys always exist."""
    key = word[1:].partition("=")[0]
    if not key:
        raise ConfigError(_no_setting(verb, word))
    if key in groups():
        raise ConfigError(f"{word}: a group always has an option; choose another one, or leave {key}=... out")
    known = keys_of(COMMANDS[verb].config)
    if key in known:
        raise ConfigError(f"{word}: a setting cannot be removed; change its value with: {key}=...")
    return word


def _options(group: str) -> str:
    return f"the options of {group} are {', '.join(groups()[group])}"


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _mapping(value: str, numbers: bool, names: bool) -> str:
    """Convert a YAML or JSON mapping to Hydra's grammar, which requires colons inside a name to be escaped:
    {json:caption: 1} becomes {json\\:caption: 1}.

    Args:
        numbers: the values are numbers, so that the last colon separates name and value: {json:caption:1}.
        names: values may be names and times that look like numbers.
    """
    if not re.fullmatch(r"\{.*:.*\}" if numbers else r"\{.*: .*\}", value):
        return value
    with contextlib.suppress(yaml.YAMLError):
        pairs = yaml.safe_load(value)
        if numbers:
            pairs = dict(_split_number(str(k), v) for k, v in pairs.items())
        if names:
            typed = yaml.load(value, yaml.BaseLoader)  # all values as texts
            pairs = {
                name: typed[name] if re.fullmatch(NAME_OF_DIGITS, str(typed.get(name))) else pairs[name]
                for name in pairs
            }
        if all(isinstance(v, (str, int, float)) for v in pairs.values()):
            plain = re.compile(rf"(?!(?:{NAME_OF_DIGITS})$)[\w./:@-]+")
            values = {k: v if not isinstance(v, str) or plain.fullmatch(v) else _quote(v) for k, v in pairs.items()}
            escaped = {re.sub(r"([^\w.-])", r"\\\1", str(k)): v for k, v in values.items()}
            return "{" + ",".join(f"{k}:{v}" for k, v in escaped.items()) + "}"
    return value


_PATTERN = re.compile(r"""(\bshards["']?\s*:\s*)([^'"\[{\s][^'"]*?)(?=\s*(?:,\s*[a-z_]+\s*:|\}\s*(?:,|\])))""")
"""The unquoted shards of an entry, up to its next key or its end; they may contain braces and commas."""


def _entries(value: str) -> str:
    """Convert a list of mappings (a mixture of data sets) in YAML or JSON to Hydra's grammar; return anything else
    unchanged."""
    for text in (value, _PATTERN.sub(lambda match: match[1] + json.dumps(match[2]), value)):
        with contextlib.suppress(yaml.YAMLError):
            entries = yaml.safe_load(text)
            if isinstance(entries, list) and all(isinstance(one, dict) and "name" in one for one in entries):
                return _hydra(entries)
    return value


def _hydra(value: object) -> str:
    """Write a value of lists, mappings, texts and numbers in Hydra's grammar."""
    if isinstance(value, dict):
        pairs = (re.sub(r"([^\w.-])", r"\\\1", str(key)) + ":" + _hydra(one) for key, one in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, str):
        return _quote(value)
    return "null" if value is None else json.dumps(value)


def _split_number(key: str, value: object) -> tuple[str, object]:
    """Split `json:caption:1`, which YAML reads as a name without a value, at its last colon."""
    name, colon, last = key.rpartition(":")
    return (name, yaml.safe_load(last)) if value is None and colon else (key, value)


NAME_OF_DIGITS = r"\d[\d_]*(?:[:_][\d_]+)+|0\d+"
"""What YAML or Hydra would read as another number: a time (16:00), the name of an account (2024_05, 012)."""


def _is_expression(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
"""A quoted text in Hydra's grammar."""
NUMBER_OR_TRUTH = r"[+-]?(\d[\d_]*)?\.?\d+(e[+-]?\d+)?|true|false|nan|[+-]?inf"


def _sentence(value: str, key: Key) -> str:
    """Convert a value of free text: one text, unless the key takes several and it is unambiguously a list (or null)."""
    if value in ("null", "None"):
        return "null"
    elements: list[str] | None = None
    is_list = typing.get_origin(key.type) is list
    if re.fullmatch(QUOTED, value) and is_list:
        return f"[{value}]"
    if re.fullmatch(rf"({QUOTED})(\s*,\s*({QUOTED}))*", value):
        return value  # several values are one run each, with --multirun
    if value.startswith("[") and value.endswith("]") and not key.is_text:
        inside = value[1:-1].strip()
        if re.fullmatch(rf"(({QUOTED})(\s*,\s*({QUOTED}))*)?", inside):
            elements = [e[0] for e in re.finditer(QUOTED, inside)]
        elif not re.search(r"\s,|,\s|[\[\]'\"]", inside):
            elements = [_quote(escaped(e)) for e in inside.split(",")]
    if elements is not None:
        return "[" + ",".join(elements) + "]"
    text = _quote(escaped(value))
    return f"[{text}]" if is_list else text


def _as_text(value: str) -> str:
    """Quote a value that Hydra cannot parse; of a list such as [a=1,{0..9}.tar], each element."""
    if value.startswith("[") and value.endswith("]"):
        elements = re.findall(r"(?:'[^']*'|\"[^\"]*\"|\{[^}]*\}|[^,])+", value[1:-1])
        return "[" + ",".join(e if e[:1] in "'\"" else _quote(e.strip()) for e in elements) + "]"
    return _quote(value)


def _quote(value: str) -> str:
    """Quote a text for Hydra, where a backslash is special only before a quotation mark."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value) + "'"
