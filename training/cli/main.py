"""The command line: `cascade VERB key=value ...`. Every verb is a Hydra app on conf/base.yaml.

Composition and validation happen here, without torch; then the verb's module is imported and its `main(config)` called.
A `CascadeError` ends the program with its message and exit code; debug=true adds the traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.common import python
from data_pipeline.common.errors import EXIT_USER_ERROR, CascadeError, ConfigError, UserError, of_machine, system_words
from data_pipeline.common.terminal import guard_messages, visible
from training.config.commands import COMMANDS
from training.config.experiment import Experiment
from training.processes.endings import DeviceLost, Terminated, crash_code, ends_at_once, run_program, say
from training.processes.exit_codes import EXIT_NOT_FINITE
from training.processes.ranks import is_search, read_ranks, speaks

OTHER_NAMES = {
    "fit": "train",
    "finetune": "train",
    "generate": "sample",
    "inference": "sample",
    "infer": "sample",
    "predict": "sample",
    "test": "evaluate",
    "validate": "evaluate",
    "fid": "evaluate",
    "export": "bundle",
    "submit": "launch",
    "download": "prepare",
    "doctor": "plan doctor=true",
}
"""What other programs call our commands."""
SWEEPING = ("hydra/launcher=", "hydra/sweeper=", "hydra.launcher.", "hydra.sweeper.", "hydra.sweep.")
"""Settings of Hydra that only a --multirun uses."""
NAMING = ("stage", "experiment", "run.name", "run.dir", "stage.name")
"""Keys that are already part of the default paths."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; return if it succeeded.

    Args:
        argv: the words after `cascade`; None: those of this process.

    Raises:
        SystemExit: with the exit code of a failure (2: wrong input; 75: saved and stopped on request, start again).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    guard_messages()
    with _closed_pipe():
        _main(words)


def _main(words: list[str]) -> None:
    if not words or words[0] in ("--help", "-h", "help"):
        if words[1:2] and words[1] in COMMANDS:
            return _main([words[1], "--help"])
        from training.cli.help import overview

        return print(overview())
    if words[0] in ("--version", "-V", "version") or (words[0] in COMMANDS and "--version" in words):
        from training.cli.help import version

        return print(version())
    if words[0] in ("-sc", "--shell-completion"):
        return _complete(words)
    verb, rest = words[0], words[1:]
    if verb not in COMMANDS:
        _fail("cascade", ConfigError(_no_such_command(words)))
    if not COMMANDS[verb].bare:
        rest = ["--help" if word == "help" else word for word in rest]
    with _errors(verb, debug="debug=true" in rest):
        _check_directory()
        if {"--help", "-h"} & set(rest):
            from training.cli.compose import searching
            from training.cli.help import verb_help

            _, arguments = _parsed([w for w in rest if w not in ("--help", "-h")], verb)
            with searching(arguments.config_path or arguments.config_dir):
                return print(verb_help(verb, arguments.overrides))
        _hydra(verb, rest)


def _check_directory() -> None:
    """Raise UserError if the working directory has been deleted (and perhaps made again) since the shell went there."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory of this shell no longer exists; change to one that does (cd)") from error


def _no_such_command(words: Sequence[str]) -> str:
    """Return the sentence about a first word that is not a command."""
    verb = words[0]
    if "=" in verb or verb.startswith("-"):
        command = next((word for word in words if word in COMMANDS), "COMMAND")
        return (
            f"{verb}: the command comes first: cascade {command} key=value ...; the commands are {', '.join(COMMANDS)}"
        )
    name = verb.lower().replace("_", "-")
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{verb}: no such command; {hint}the commands are {', '.join(COMMANDS)}"


def run(verb: str, config: Experiment) -> dict[str, Any] | None:
    """Import the verb's module, call its `main(config)`, and with json=true print the result as one line of JSON.

    Returns:
        The result of `main`.

    Raises:
        SystemExit: the command failed; the reason was printed to stderr.
    """
    try:
        with _closed_pipe():
            with contextlib.nullcontext() if COMMANDS[verb].trains else ends_at_once(), _errors(verb, config.debug):
                with python.importing():
                    command = importlib.import_module(COMMANDS[verb].module)
                result = command.main(config)
            if config.json and result is not None:
                print(json.dumps(result), flush=True)
            return result
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(crash_code(error)) from None


# ------------------------------------------------------------------------------------------------------ Hydra


def _hydra(verb: str, words: Sequence[str]) -> None:
    """Call Hydra's own command line, which runs the verb or handles --cfg, --info, --multirun and -sc."""
    from hydra import version
    from hydra._internal.utils import _run_hydra

    from training.cli.compose import register_schema
    from training.cli.explain import explain
    from training.cli.overrides import CONF_DIR, normalise

    register_schema(verb)
    version.setbase("1.3")
    parser, arguments = _parsed(words, verb)
    _use_directory(arguments)
    if arguments.experimental_rerun:
        raise ConfigError("--experimental-rerun: there are no such files; the same command again resumes a run")
    if arguments.hydra_help:
        arguments.overrides = []
    variables = {"HYDRA_FULL_ERROR": "1"}  # makes Hydra raise its errors instead of printing them
    if arguments.shell_completion:
        variables["COMP_LINE"] = os.environ.get("COMP_LINE", "").replace(f" {verb} ", " ", 1)  # Hydra knows no verbs
    else:
        arguments.overrides = normalise(verb, arguments.overrides)
        if not arguments.multirun and "hydra.mode=MULTIRUN" not in arguments.overrides:
            alone = [word for word in arguments.overrides if word.lstrip("+").startswith(SWEEPING)]
            if alone:
                raise ConfigError(f"{alone[0]}: only a sweep uses it; add --multirun")
    fixed = _fixed_keys(arguments.overrides) if arguments.multirun else None
    try:
        with _environment(**variables), warnings.catch_warnings():
            warnings.filterwarnings("error", "provider=hydra.searchpath .* is not available")
            _run_hydra(arguments, parser, _task(verb, fixed), config_path=str(CONF_DIR), config_name=verb)
        if arguments.multirun:
            _after_sweep(verb)
            _end_workers()
    except CascadeError:
        raise
    except SystemExit as end:
        if arguments.cfg and end.code == 1:  # Hydra has said that there is no such --package
            raise SystemExit(EXIT_USER_ERROR) from None
        raise
    except Exception as error:
        raise ConfigError(explain(error, verb)) from error


def _use_directory(arguments: Any) -> None:
    """Use --config-path like --config-dir, so that our groups and base.yaml stay available.

    Raises:
        ConfigError: both are given, or there is no such directory.
    """
    if arguments.config_path and arguments.config_dir:
        raise ConfigError("--config-path and --config-dir: give only one of them; both name a config directory")
    for option in ("config_path", "config_dir"):
        folder = getattr(arguments, option)
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"--{option.replace('_', '-')}={folder}: there is no such directory")
    arguments.config_dir, arguments.config_path = arguments.config_path or arguments.config_dir, None


def _after_sweep(verb: str) -> None:
    """Call `after_sweep` of the command's module, if it has one, when all jobs of a --multirun are done."""
    finish = getattr(sys.modules.get(COMMANDS[verb].module), "after_sweep", None)
    if finish:
        finish()


def _end_workers() -> None:
    """End the idle processes of Hydra's joblib launcher, for which `run_program` would wait at exit."""
    executor = getattr(sys.modules.get("joblib.externals.loky.reusable_executor"), "_executor", None)
    if executor is not None:
        executor.shutdown(wait=True)


def _task(verb: str, fixed: Sequence[str] | None) -> Callable[[Any], float | None]:
    """Return the function that Hydra calls with the composed config, once per job of a --multirun.

    It raises only SystemExit, and returns the value for a sweeper to minimise: `objective` of the command's module, if
    it has one (infinity for a run that did not stay finite).

    Args:
        fixed: keys that are the same in all jobs of a --multirun; None: not a --multirun.
    """

    def task(cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        from training.cli.compose import validate

        with _environment(HYDRA_FULL_ERROR=None):
            with _errors(verb, cfg.debug):
                if fixed is not None:
                    _separate(verb, cfg, fixed)
                config = validate(verb, cfg, HydraConfig.get().overrides.task)
            try:
                result = run(verb, config)
            except SystemExit as end:
                if fixed is None or end.code != EXIT_NOT_FINITE or not is_search():
                    raise
                return math.inf  # lets the sweeper continue with other values
            judge = getattr(sys.modules.get(COMMANDS[verb].module), "objective", None)
            return judge(result) if judge and result else None

    return task


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables (or unset them, for None) inside the context."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _parsed(words: Sequence[str], verb: str) -> tuple[Any, Any]:
    """Return Hydra's parser and what it reads in the words: options, and the rest as `overrides`. Options cannot be
    abbreviated (--experiment would be one).

    Raises:
        ConfigError: an option that does not exist, or would have no effect.
    """
    from hydra._internal.utils import get_args_parser

    def wrong(message: str) -> NoReturn:
        raise ConfigError(f"{message}; settings are key=value, options are listed by --help")

    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.error = wrong  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        from training.cli.explain import flag

        raise ConfigError(flag(words[words.index(unknown[0]) :], verb))
    for name in ("package", "resolve"):
        if getattr(arguments, name) and not arguments.cfg:
            raise ConfigError(f"--{name}: only --cfg uses it; add --cfg job")
    return parser, arguments


def _complete(words: Sequence[str]) -> None:
    """Complete a command line: first the verb, then what Hydra knows about that verb's keys and groups.

    `cascade -sc install=bash` prints the script; the shell then calls `cascade -sc query=bash` with COMP_LINE.
    """
    line = os.environ.get("COMP_LINE", "")
    typed = line.split(" ")[1:]
    verb = typed[0] if typed else ""
    if verb in COMMANDS and len(typed) > 1:
        return _hydra(verb, words)
    if any(w.startswith("query=") for w in words):
        return print(" ".join(v for v in COMMANDS if v.startswith(verb)))
    _hydra("train", words)


# ------------------------------------------------------------------------------------------------- --multirun


def _fixed_keys(overrides: Sequence[str]) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [o.key_or_group for o in parsed if not o.is_sweep_override()]


def _separate(verb: str, cfg: Any, fixed: Sequence[str]) -> None:
    """Give each job of a --multirun its own output: RUN_DIR/seed=1, RUN_DIR/seed=2 ... The differing keys come from the
    command line or, with another sweeper, from its `hydra.sweeper.params`."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    words = [o for o in HydraConfig.get().overrides.task if o.partition("=")[0].lstrip("+") not in fixed]
    suffix = ",".join(w.lstrip("+").replace("/", "-") for w in words if w.partition("=")[0] not in NAMING)
    keys = COMMANDS[verb].outputs
    for key in keys if suffix else ():
        before = OmegaConf.select(cfg, key)
        if before is not None:
            OmegaConf.update(cfg, key, f"{before}/{suffix}" if before else suffix)
    if keys and suffix:
        print(f"==> {verb} {' '.join(words)}", flush=True)


# ----------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def _closed_pipe() -> Iterator[None]:
    """Exit quietly if the reader of stdout has gone (`cascade order ... | head`), and with a sentence if the disk that
    it is redirected to is full."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        raise SystemExit(141) from None
    except OSError as error:
        if error.filename is not None or _can_print():
            raise
        _drop_stdout()
        say(f"cascade: the output cannot be written ({system_words(error)})")
        raise SystemExit(1) from None


def _can_print() -> bool:
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        return False
    return True


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _errors(verb: str, debug: bool) -> Iterator[None]:
    """End the program with the message and exit code of a `CascadeError`."""
    try:
        yield
    except CascadeError as error:
        if debug:
            traceback.print_exc()
        _fail(f"cascade {verb}", error)
    except Exception as error:
        told = of_machine(error)
        if debug or told is None:
            raise
        _fail(f"cascade {verb}", told)
    except KeyboardInterrupt as end:
        number = signal.Signals(end.number) if isinstance(end, Terminated) else signal.SIGINT
        rest = "; what is finished is kept, and the same command continues" if COMMANDS[verb].continues else ""
        say(f"cascade {verb}: stopped by {number.name}{rest}")
        raise SystemExit(128 + number) from None


def _fail(who: str, error: CascadeError) -> NoReturn:
    """Print the message and exit. A user error is the same on all ranks, so only rank 0 prints it."""
    if speaks():
        say(visible(f"{who}: {error}"))
    elif error.exit_code != EXIT_USER_ERROR and not (isinstance(error, DeviceLost) and error.shared):
        ranks = read_ranks()
        say(visible(f"{who} (rank {ranks.rank if ranks else 0}): {error}"))
    raise SystemExit(error.exit_code)


def program() -> NoReturn:
    """The `cascade` program."""
    if sys.argv[1:2] != ["launch"]:  # the commands in cluster.setup keep their own Python environment
        os.environ.update(python.environment())
    run_program(main)


if __name__ == "__main__":
    program()
