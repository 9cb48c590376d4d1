"""The help texts of `cascade --help` and `cascade VERB --help`."""

from __future__ import annotations

import importlib.metadata
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from data_pipeline.common import terminal
from training.cli.compose import load_config
from training.cli.fields import keys_of
from training.cli.overrides import CONF_DIR, groups, section_of
from training.config.commands import COMMANDS
from training.config.experiment import Experiment
from training.config.reads import may_read

FLAGS = {
    "--cfg job": "show the composed settings instead of running (--resolve: with references resolved)",
    "--multirun, -m": "run once per combination of comma-separated values: seed=1,2,3",
    "--info": "show how the settings were composed (all, config, defaults, searchpath, ...)",
    "--config-dir DIR": "also search DIR for config files; --config-name NAME starts from another file",
    "-sc install=bash": 'shell completion: eval "$(cascade -sc install=bash)" (also fish, zsh)',
    "--hydra-help": "other options of Hydra, which parses this command line",
}
COMMON = {"json": "print a JSON object as the last line on stdout", "debug": "show tracebacks"}


def version() -> str:
    """Return `cascade 0.1.0` with the versions of torch and deepspeed, on which results depend."""
    versions = []
    for name, package in (("cascade", "cascade-t2i"), ("torch", "torch"), ("deepspeed", "deepspeed")):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(package)}")
    return ", ".join(versions)


def overview() -> str:
    """Return the help of `cascade` itself: the list of commands."""
    rows = _table({name: verb.line for name, verb in COMMANDS.items()}, 12)
    common = _table({f"{name}=true": text for name, text in COMMON.items()}, 26)
    experiments = "\n".join(_wrapped("experiments: ", ", ".join(groups().get("experiment", []))))
    return f"""\
cascade: train an Imagen-style cascade of diffusion models, and sample from it.

usage: cascade COMMAND key=value ...

{rows}

Train a small cascade from scratch, in minutes, on a CPU:
  cascade prepare  experiment=demo
  cascade train    experiment=demo stage=demo_base
  cascade train    experiment=demo stage=demo_sr
  cascade bundle   experiment=demo
  cascade sample   experiment=demo
  cascade evaluate experiment=demo

Any setting can be given on the command line:
  cascade train experiment=demo train.steps=50 zero.stage=2
{common}
  cascade COMMAND --help     the settings of a command and their defaults
  cascade COMMAND --cfg job  all settings, as the command would use them
  cascade --version          show the version

{experiments}"""


def verb_help(verb: str, overrides: Sequence[str] = ()) -> str:
    """Return the examples, groups and main keys of a verb, with the values that `overrides` give them.

    Raises:
        ConfigError: an invalid override.
    """
    config = load_config(verb, overrides)
    known = COMMANDS[verb]
    blocks = [
        *_wrapped(f"cascade {verb}: ", known.line),
        "examples:",
        *(line for example in known.examples for line in _wrapped_command(example)),
        "",
    ]
    blocks += _wrapped("", "groups (GROUP=OPTION loads conf/GROUP/OPTION.yaml; the default is in brackets):", 2)
    defaults = group_defaults()
    for group, options in groups().items():
        if not may_read(verb, section_of(group)):
            continue
        named = ", ".join(f"[{o}]" if o == defaults.get(group) else o for o in options)
        blocks += _wrapped(f"  {group:<12} ", named)
    own = [f.name for f in fields(known.config) if f.name not in {f.name for f in fields(Experiment)}]
    blocks += ["", "keys (with their current values):"]
    for section in [*own, *known.sections]:
        blocks += _key_lines(verb, config, section)
    blocks += ["", *(line for key, text in COMMON.items() for line in _wrapped(f"  {key}=false  ", text))]
    blocks += ["", "flags:", _table(FLAGS, 22)]
    return "\n".join(blocks)


def group_defaults() -> dict[str, str]:
    """Return the default option of each group."""
    text = (CONF_DIR / "base.yaml").read_text()
    return dict(re.findall(r"^  - (\w+): (\w+)", text, re.MULTILINE))


def _table(rows: Mapping[str, str], width: int) -> str:
    """Return one entry per row, its name padded to `width`, and its text wrapped to the terminal."""
    return "\n".join(line for name, text in rows.items() for line in _wrapped(f"  {name:<{width}} ", text, width + 3))


def _key_lines(verb: str, config: Any, name: str) -> Iterator[str]:
    """Yield the lines of a key, or of all keys of a section, that the command uses."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    if is_dataclass(value):
        for field in fields(value):
            yield from _key_lines(verb, config, f"{name}.{field.name}")
    elif may_read(verb, name):
        yield from _wrapped(f"  {name}={_shown(value)}  ", keys_of(COMMANDS[verb].config)[name].doc)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(_shown(v) for v in value) + "]" if len(str(value)) < 60 else f"[... {len(value)} values]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    return str(value)


def _wrapped_command(command: str) -> list[str]:
    """Wrap a command line to the width of the terminal, so that the shell reads the lines as one; words stay whole."""
    lines, line = [], " "
    for word in re.findall(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""", command):
        if len(line) + len(word) + len("  \\") > terminal.width():
            lines.append(f"{line} \\")
            line = " " * 5
        line += f" {word}"
    return [*lines, line]


def _wrapped(head: str, text: str, indent: int = 16) -> list[str]:
    """Wrap `head` and `text` to the width of the terminal, with a hanging indent of up to `indent` for
    the text."""
    width = terminal.width()
    margin = " " * min(len(head), indent)
    if len(head) > width:  # a long value, which may be wrapped itself
        head, text = " " * (len(head) - len(head.lstrip())), head.lstrip() + text
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=margin, break_long_words=False) or [
        head.rstrip()
    ]
