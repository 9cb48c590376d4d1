"""The command line as the user typed it, and the command to type next."""

from __future__ import annotations

import json
import os
import shlex
import sys

from training.config.experiment import Experiment, RunConfig
from training.config.reads import may_read
from training.processes.launcher import TYPED

SHARED = ("run.name", "data.shards", "text.path")
"""Keys that the next command of an experiment needs too, if it reads them."""
CONFIG_DIR = "--config-dir"


def typed_command() -> list[str]:
    """Return the words of the command line, in the processes that it has started too."""
    return json.loads(os.environ.get(TYPED, "null")) or sys.argv


def typed_keys() -> dict[str, str]:
    """Return the values of the command line by their keys, as typed."""
    return dict(word.split("=", 1) for word in typed_command() if "=" in word)


def experiment_of(config: Experiment) -> str:
    """Return the experiment that was chosen; if none was typed, as in a job's script, the name of the run."""
    return typed_keys().get("experiment", config.run.name)


def command_for(verb: str, config: Experiment, **more: str) -> str:
    """Return the command of another step of the same experiment, with some of its keys, for the user to type."""
    words, typed, name, bundle = typed_command(), typed_keys(), config.run.name, config.bundle.dir
    own, keys = [], {"experiment": name} if name != RunConfig.name else {}
    if "experiment" in typed:
        keys = {"experiment": typed["experiment"]}
        keys |= {key: typed[key] for key in SHARED if key in typed and may_read(verb, key)}
        folder = typed.get(CONFIG_DIR) or "".join(
            words[words.index(CONFIG_DIR) + 1 :][:1] if CONFIG_DIR in words else []
        )
        own = [f"{CONFIG_DIR}={folder}"] if folder else []
    keys |= more
    if verb in ("sample", "evaluate") and bundle != f"runs/{name}/bundle":
        keys["bundle.dir"] = bundle
    return shlex.join(["cascade", verb, *own, *(f"{key}={value}" for key, value in keys.items())])
