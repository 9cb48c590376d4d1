"""Starts the processes of a run from a server that has torch and DeepSpeed imported already: a start costs a second,
not ten.

They are what `training.processes.launcher.launch` starts, with the same entry; only the launcher itself is left out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.config.experiment import Experiment
from training.processes.launcher import free_port, worker

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.training.preload"])


@dataclass
class Running:
    """The processes of one start, and what they have said so far."""

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
        """Waits; when one process has failed the others are killed after a while, as a launcher does. Exit codes by
        rank."""
        deadline = float("inf")
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + grace_s)
            if time.monotonic() > deadline:
                self.kill_rest()
            time.sleep(0.01)
        return [process.exitcode for process in self.processes]

    def kill_rest(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()


def start(config: Experiment, ranks: int = 1, module: str = "training.train", **variables: str) -> Running:
    """`module.main(config)` in `ranks` processes, with more environment variables."""
    scratch = Path(tempfile.mkdtemp(prefix="forks-", dir=str(Path(config.run.dir).parent)))
    (scratch / "config.json").write_text(json.dumps(asdict(config)))
    processes = []
    environ = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(ranks):
        own = {**environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        processes.append(_server.Process(target=_child, args=(own, str(scratch), module, type(config).__name__)))
        processes[-1].start()
    return Running(processes, scratch / "output", scratch / "result.json")


def _child(environ: dict[str, str], scratch: str, module: str, config_class: str) -> None:
    os.environ.update(environ)
    out = os.open(f"{scratch}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.exit(worker(module, config_class, f"{scratch}/config.json", f"{scratch}/result.json"))
