"""`subprocess.Popen` in which `python -m MODULE` is a fork of the caller, who has imported torch already.

What is started is a process of its own as ever: with its own pid, parent, environment, directory, descriptors and exit
code, and run as `__main__`. Only the interpreter is not started again, which costs seconds. Tests of the start itself
(what is imported, what shadows what) start real ones.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_signature = inspect.signature(_execute)


def module_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The module and its arguments if this command starts a Python module; options before it do not affect imports."""
    if isinstance(words, str) or not words or words[0] != sys.executable or "-m" not in words[:3]:
        return None
    place = list(words).index("-m")
    return words[place + 1], list(words[place + 2 :])


def _fork_child(self: Any, *given: Any) -> None:
    asked = _signature.bind(self, *given).arguments
    found = module_of(asked["args"])
    if found is None:
        return _execute(self, *given)
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    if self.pid:
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in pipes))
        return None
    try:
        _become(asked)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    run(*found)


def _become(asked: dict[str, Any]) -> None:
    """What `Popen` promises about the child."""
    for target, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if asked[name] not in (-1, target):
            os.dup2(asked[name], target)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in asked["pass_fds"]:
            try:
                os.dup2(nothing, descriptor)  # not closed: objects of the parent would close a later one of this number
            except OSError:  # that of the listing itself
                continue
    if asked["cwd"] is not None:
        os.chdir(asked["cwd"])
    if asked["start_new_session"]:
        os.setsid()
    if asked["preexec_fn"] is not None:
        asked["preexec_fn"]()
    if asked["env"] is not None:
        os.environ.clear()
        os.environ.update(asked["env"])


def run(module: str, words: Sequence[str]) -> NoReturn:
    """Runs a module in this process, a fresh fork, as `python -m` would, and ends it."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()
    logging.root.handlers.clear()
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", 1, closefd=False) for n in range(3))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = [module, *words]
    sys.modules.pop(module, None)
    code: object = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def fork_modules() -> None:
    """From now on, this process and those that it starts fork instead of starting Python modules."""
    subprocess.Popen._execute_child = _fork_child  # type: ignore[attr-defined]
