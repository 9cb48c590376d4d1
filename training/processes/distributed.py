"""Processes and ranks: who am I, how are the others started, and a few collectives on plain Python values.

A command that trains in several processes on one machine starts them itself (`launch`). Why not torchrun: it dies of
SIGUSR1 and leaves its workers behind as orphans, answers 1 after a clean stop by SIGTERM (so a job script cannot tell
"saved, start me again" from a crash), and its restarts hang now and then on loopback rendezvous. Under Slurm, `srun`
starts the processes and this file only reads its variables. A program that sets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT itself works as well.

The parent process imports neither torch nor deepspeed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import training.config.commands
from data_pipeline.common import python
from data_pipeline.common.errors import EXIT_USER_ERROR, CascadeError, ConfigError, of_file
from training.config.experiment import ClusterConfig, Experiment
from training.config.plain import from_plain
from training.processes.endings import (
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    STOP_CODES,
    Signals,
    run_program,
    say,
    unless_ignored,
)

FORWARDED = Signals.HANDLED
GRACE_S = 5.0
"""How long the other processes may live on after one has died; they hang in a collective with the dead one."""
AGREED_GRACE_S = 600.0
"""The same after an exit that all processes decided together: a checkpoint may still be on its way to the disk, or rank
0, which says why, in W&B."""
IMPATIENT_S = 2.0
"""The same after a second Ctrl-C."""
PR_SET_PDEATHSIG = 1
TYPED = "CASCADE_COMMAND"
"""Environment variable in which the processes find what was typed, as JSON."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    control: Any = field(default=None, compare=False, repr=False)
    """Gloo process group for decisions (main thread); None without a process group."""
    background: Any = field(default=None, compare=False, repr=False)
    """Gloo process group of the thread that writes checkpoints; None without a process group."""
    store: Any = field(default=None, compare=False, repr=False)
    """The key-value store in which the ranks met; None where one rank is alone."""

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes shared files."""
        return self.rank == 0


# --------------------------------------------------------------------------------------------------- who am I


def read_ranks(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """The ranks that a launcher put into the environment: RANK..., or Slurm's when CASCADE_SRUN=1; None without a
    launcher.

    SLURM_PROCID alone does not count: it is also set inside a plain `salloc` or a batch script that runs one process.

    Raises:
        ConfigError: a variable is missing or does not fit the others.
    """
    if "RANK" in environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif environ.get("CASCADE_SRUN") == "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return None
    values = []
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise ConfigError(f"{name} is not set although {names[0]} is: a launcher must set both")
        values.append(environ[name])
    try:
        rank, local_rank, world_size = (int(v) for v in values[:3])
    except ValueError as error:
        raise ConfigError(f"{', '.join(names)} must be numbers: {values[:3]}") from error
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]}={rank}: it must lie between 0 and {names[2]} - 1 = {world_size - 1}")
    return Ranks(rank, local_rank, world_size)


def process_count(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> int:
    """Processes to start on this machine: `cluster.processes`, else one per GPU that torch could use, else one."""
    if cluster.processes:
        return cluster.processes
    try:
        if "+cpu" in metadata.version("torch"):
            return 1
    except metadata.PackageNotFoundError:
        return 1
    if "CUDA_VISIBLE_DEVICES" in environ:
        return max(1, len([d for d in environ["CUDA_VISIBLE_DEVICES"].split(",") if d.strip()]))
    gpus = Path("/proc/driver/nvidia/gpus")
    return max(1, len(list(gpus.iterdir())) if gpus.is_dir() else 0)


def is_sweep() -> bool:
    """Whether this is one job of a --multirun, of which all run in one process, one after the other."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def thread_count(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> int:
    """CPU threads per process: `cluster.threads`, else what the environment says, else an even share of the cores that
    this process may use. OMP_NUM_THREADS=4,2 (a number for each level of nested regions) says 4.

    Raises:
        ConfigError: the environment says something else than a number.
    """
    name = "OMP_NUM_THREADS" if environ.get("OMP_NUM_THREADS") else "SLURM_CPUS_PER_TASK"
    said = (environ.get(name) or "0").partition(",")[0].strip()
    if not said.isdecimal():
        raise ConfigError(f"{name}={environ[name]}: it must be a number of threads; unset it, or set cluster.threads")
    cores = len(os.sched_getaffinity(0))
    return cluster.threads or int(said) or max(1, cores // process_count(cluster, environ))


# ------------------------------------------------------------------------------------------------ the launcher


def launch(module: str, config: Experiment) -> dict[str, Any]:
    """Runs `module.main(config)` in several processes of this machine and returns rank 0's result.

    Signals are forwarded to all of them; when one dies the others are ended; the program then exits with the code of
    the first failure (128 + the number of the signal that killed it).

    Raises:
        SystemExit: a process failed; it has printed why.
    """
    with tempfile.TemporaryDirectory(prefix="cascade-launch-") as scratch:
        config_file, result_file = Path(scratch, "config.json"), Path(scratch, "result.json")
        config_file.write_text(json.dumps(asdict(config)))
        command = [*python.module("training.processes.distributed"), module, type(config).__name__]
        command += [str(config_file), str(result_file)]
        threads = thread_count(config.cluster)
        os.environ[TYPED] = json.dumps(sys.argv)
        count, agreed = process_count(config.cluster), agreed_file(str(result_file))
        code = run_processes(command, count, threads=threads, hold_signals=True, agreed=agreed)
        if code:
            raise SystemExit(code)
        return json.loads(result_file.read_text())


def agreed_file(result_file: str) -> Path:
    """A process makes it before it ends with an error that all share."""
    return Path(f"{result_file}.agreed")


def run_processes(
    command: list[str],
    processes: int,
    threads: int = 1,
    grace_s: float = GRACE_S,
    hold_signals: bool = False,
    agreed: Path | None = None,
) -> int:
    """Starts `command` once per rank and waits; returns 0 or the exit code of the first that failed.

    Once one has failed the others are killed after `grace_s`, or after AGREED_GRACE_S if they all decided to stop
    (STOP_CODES, or the file `agreed` is there), and IMPATIENT_S after a second SIGINT.
    `hold_signals`: they start with FORWARDED blocked, and let them in when they can handle them.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in unless_ignored(FORWARDED)}
    try:
        environ = dict(
            os.environ | python.environment(),
            WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
        environ.setdefault("OMP_NUM_THREADS", str(threads))
        for rank in range(processes):
            own = dict(environ, RANK=str(rank), LOCAL_RANK=str(rank))
            before = _held_back if hold_signals else _die_with_parent
            children.append(subprocess.Popen(command, env=own, preexec_fn=before))
            for number in received:
                children[-1].send_signal(number)
        return _wait(children, grace_s, agreed, received)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], grace_s: float, agreed: Path | None, received: list[int]) -> int:
    """Waits for all; after the first failure the others get a grace period, then SIGKILL."""
    first, impatient, deadline = 0, False, float("inf")
    while None in (codes := [child.poll() for child in children]):
        if not first:
            rank, first = next(((rank, code) for rank, code in enumerate(codes) if code), (0, 0))
            if first < 0 and -first not in received:
                _say_killed(rank, -first)
            if first:
                together = first in STOP_CODES or (agreed is not None and agreed.exists())
                deadline = min(deadline, time.monotonic() + (AGREED_GRACE_S if together else grace_s))
        if not impatient and received.count(signal.SIGINT) > 1:
            impatient, deadline = True, min(deadline, time.monotonic() + IMPATIENT_S)
            first = first or EXIT_INTERRUPTED
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    first = first or next((code for code in codes if code), 0)
    return 128 - first if first < 0 else first


def _say_killed(rank: int, number: int) -> None:
    """It cannot say so itself."""
    name = signal.Signals(number).name
    memory = ", mostly because the machine ran out of memory: lower data.micro_batch" if name == "SIGKILL" else ""
    say(f"rank {rank} was killed by signal {number} ({name}){memory}")


def _die_with_parent() -> None:
    """In the child: own process group (the terminal's Ctrl-C reaches it once, through the parent), and end when the
    parent is killed, so that no orphan goes on training."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _held_back() -> None:
    """In the child: the same, and signals wait until the program asks for them."""
    _die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worker(module: str, config_class: str, config_file: str, result_file: str) -> int:
    """One rank of `launch`: `module.main(config)`; only rank 0 explains an error that all share. Returns the exit
    code."""
    rank = int(os.environ["RANK"])
    config = from_plain(getattr(training.config.commands, config_class), json.loads(Path(config_file).read_text()))
    command = importlib.import_module(module)
    if not getattr(command, "HANDLES_SIGNALS", False):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    try:
        result = command.main(config)
    except CascadeError as error:
        if rank == 0 and config.debug:
            traceback.print_exc()
        elif rank == 0 or error.exit_code == EXIT_HUNG:
            say(str(error))
        if error.exit_code != EXIT_HUNG:
            agreed_file(result_file).touch()
        return error.exit_code
    except OSError as error:
        if config.debug or error.filename is None:
            raise
        say(str(of_file(error)))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:  # a second Ctrl-C
        return EXIT_INTERRUPTED
    if rank == 0:
        Path(result_file).write_text(json.dumps(result))
    return 0


# -------------------------------------------------------------------------------- collectives on plain values


def all_gather(value: Any, ranks: Ranks, group: Any = None) -> list[Any]:
    """`value` of every rank, in rank order (pickled; small things only)."""
    if ranks.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=group or ranks.control)
    return values


def broadcast(value: Any, ranks: Ranks, group: Any = None) -> Any:
    """Rank 0's value, on every rank."""
    if ranks.world_size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=group or ranks.control)
    return box[0]


def all_sum(values: list[float], ranks: Ranks) -> list[float]:
    """Element-wise sum over the ranks, in float64; over the GPUs' group where there is one. Main thread."""
    if ranks.world_size == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, group=None if tensor.is_cuda else ranks.control)
    return tensor.tolist()


def together(call: Any, ranks: Ranks) -> Any:
    """Rank 0's `call()`, on every rank; an error of rank 0 is raised on all of them, so that none waits for the
    others."""
    outcome: tuple[Any, BaseException | None] = (None, None)
    if ranks.is_main:
        try:
            outcome = (call(), None)
        except Exception as error:
            outcome = (None, error)
    value, problem = broadcast(outcome, ranks)
    if problem is not None:
        raise problem
    return value


def each(call: Any, ranks: Ranks) -> Any:
    """Every rank's own `call()`; when it fails on some, the first one's error is raised on all (rank 0 will say it)."""
    value, error = None, None
    try:
        value = call()
    except Exception as caught:
        error = caught
    for problem in all_gather(error, ranks):
        if problem is not None:
            raise problem
    return value


if __name__ == "__main__":
    run_program(lambda: worker(*sys.argv[1:5]))
