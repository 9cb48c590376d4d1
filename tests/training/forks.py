"""Starts the processes of a run from a server that has torch and DeepSpeed imported already: a start costs a second,
not ten.

Those of `start` are what `training.processes.launcher.launch` starts, with the same entry; only the launcher itself is
left out. `command` is a command line with all that it starts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.training import forking
from training.config.experiment import Experiment
from training.processes.launcher import free_port, worker

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.training.preload"])
ROOT = Path(__file__).parents[2]
SHARED = "CASCADE_TESTS_FORK_SERVER"
"""Environment variable with the address of the server that several processes of one test session share."""


@dataclass
class Running:
    """The processes of one start, and their output so far."""

    processes: list[Any]
    output: Path
    result: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def codes(self, grace_s: float = 60.0) -> list[int]:
        """Waits; after one process has failed, the others are killed after a while, as by a launcher. Returns the exit
        codes by rank."""
        deadline = None
        while running := [process.sentinel for process in self.processes if process.exitcode is None]:
            if deadline is None and any(process.exitcode for process in self.processes):
                deadline = time.monotonic() + grace_s
            left = None if deadline is None else max(0.01, deadline - time.monotonic())
            if not multiprocessing.connection.wait(running, left):
                self.kill_rest()
        return [process.exitcode for process in self.processes]

    def kill_rest(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()


def start(config: Experiment, ranks: int = 1, module: str = "training.train", **variables: str) -> Running:
    """Runs `module.main(config)` in `ranks` processes, with additional environment variables."""
    scratch = Path(tempfile.mkdtemp(prefix="forks-", dir=str(Path(config.run.dir).parent)))
    (scratch / "config.json").write_text(json.dumps(asdict(config)))
    words = (module, type(config).__name__, f"{scratch}/config.json", f"{scratch}/result.json")
    return Running(_start(worker, words, ranks, scratch, variables), scratch / "output", scratch / "result.json")


def call(function: Callable[..., Any], ranks: int, scratch: Path, *arguments: str) -> Running:
    """Runs `function(*arguments)` in `ranks` processes."""
    return Running(_start(function, arguments, ranks, scratch, {}), scratch / "output", scratch / "result.json")


def command(
    *words: str, module: str = "training.cli", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m training.cli WORDS...` and the processes that it starts, as forks; `env` is the whole environment."""
    with tempfile.TemporaryDirectory(prefix="forks-") as scratch:
        environ, place = dict(os.environ if env is None else env), str(cwd or Path.cwd())
        process = _server.Process(target=_command, args=(module, words, environ, place, scratch))
        serve()
        process.start()
        process.join()
        out, err = (Path(scratch, name).read_text() for name in ("out", "err"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def serve() -> None:
    """Starts the server, if none runs, where it finds `tests`: it looks in its working directory, then among the
    installed packages, one of which has brought a `tests` of its own."""
    if SHARED in os.environ:
        return _use_shared(os.environ[SHARED])
    with contextlib.chdir(ROOT):
        multiprocessing.forkserver.ensure_running()


def share() -> None:
    """Starts a server that the processes which this one starts use as well: what it imports takes seconds and half a
    gigabyte."""
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if not hasattr(server, "_forkserver_authkey"):  # from Python 3.14 on, it answers the process that started it alone
        serve()
        os.environ[SHARED] = server._forkserver_address


@functools.cache
def _use_shared(address: str) -> None:
    """Python has a process ask the server that it has started itself, for whose end it would wait."""
    server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is None:
        server._forkserver_address, server._forkserver_alive_fd = address, os.open(os.devnull, os.O_RDONLY)
        server.ensure_running = multiprocessing.resource_tracker.ensure_running


def _start(
    function: Callable[..., Any], arguments: tuple[str, ...], ranks: int, scratch: Path, variables: dict[str, str]
) -> list[Any]:
    serve()
    processes = []
    environ = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(ranks):
        own = {**environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        processes.append(_server.Process(target=_child, args=(own, str(scratch / "output"), function, arguments)))
        processes[-1].start()
    return processes


def _child(environ: dict[str, str], output: str, function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    os.environ.update(environ)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    forking.fork_modules()
    sys.exit(function(*arguments))


def _command(module: str, words: tuple[str, ...], environ: dict[str, str], cwd: str, scratch: str) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{scratch}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    forking.fork_modules()
    forking.run(module, words)
