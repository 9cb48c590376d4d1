"""Starts the processes of a command on this machine.

Why not torchrun: SIGUSR1 kills it and leaves its workers as orphans, it exits with 1 after a clean stop by SIGTERM (so
a job script cannot tell "saved, start me again" from a crash), and its restarts occasionally hang in the loopback
rendezvous. Under Slurm, `srun` starts the processes. Any other launcher that sets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT works as well.

The parent process imports neither torch nor deepspeed.
"""

from __future__ import annotations

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import training.config.commands
from data_pipeline.common import python
from data_pipeline.common.children import die_with_parent_only, pausing
from data_pipeline.common.errors import EXIT_USER_ERROR, CascadeError, UserError, of_machine
from training.config.experiment import Experiment
from training.config.plain import from_plain
from training.processes.endings import DeviceLost, Signals, Terminated, ends_at_once, run_program, say, unless_ignored
from training.processes.exit_codes import EXIT_HUNG, EXIT_INTERRUPTED, STOP_CODES
from training.processes.ranks import process_count, thread_count

FORWARDED = Signals.HANDLED
GRACE_S = 5.0
"""Seconds for which the other processes may run on after one has died; they hang in a collective with it."""
AGREED_GRACE_S = 600.0
"""The same after an exit that all processes agreed on: rank 0, which reports the reason, may still be writing a
checkpoint or finishing its W&B run."""
IMPATIENT_S = 2.0
"""The same after a second Ctrl-C."""
INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable with the network interface that gloo uses."""
TYPED = "CASCADE_COMMAND"
"""Environment variable that holds the command line as typed, as JSON."""


def launch(module: str, config: Experiment) -> dict[str, Any]:
    """Run `module.main(config)` in several processes of this machine; return rank 0's result.

    Signals are forwarded to all processes. If one dies, the others are ended.

    Raises:
        SystemExit: a process failed, after printing the reason; the code is that of the first failure (128 + the number
            of the signal that killed it).
    """
    with tempfile.TemporaryDirectory(prefix="cascade-launch-") as scratch:
        config_file, result_file = Path(scratch, "config.json"), Path(scratch, "result.json")
        config_file.write_text(json.dumps(asdict(config)))
        command = [*python.module("training.processes.launcher"), module, type(config).__name__]
        command += [str(config_file), str(result_file)]
        threads = thread_count(config.cluster)
        os.environ[TYPED] = json.dumps(sys.argv)
        count, agreed = process_count(config.cluster), agreed_file(str(result_file))
        code = run_processes(command, count, threads=threads, hold_signals=True, agreed=agreed)
        if code:
            raise SystemExit(code)
        return json.loads(result_file.read_text())


def agreed_file(result_file: str) -> Path:
    """Return the file that a process creates before it exits with an error that all processes share."""
    return Path(f"{result_file}.agreed")


def _is_first(result_file: str) -> bool:
    """Return whether this process is the first of a launch to ask."""
    try:
        with open(f"{result_file}.told", "x"):
            return True
    except FileExistsError:
        return False


def run_processes(
    command: list[str],
    processes: int,
    threads: int = 1,
    grace_s: float = GRACE_S,
    hold_signals: bool = False,
    agreed: Path | None = None,
) -> int:
    """Start `command` once per rank and wait; return 0 or the exit code of the first rank that failed.

    After the first failure the others are killed: after `grace_s` seconds, after AGREED_GRACE_S if they all decided to
    stop (STOP_CODES, or the file `agreed` exists), or IMPATIENT_S after a second SIGINT.

    Args:
        threads: OMP_NUM_THREADS of each process, unless the environment sets it.
        hold_signals: start the processes with FORWARDED blocked; they unblock them once they can handle them.
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
            **meeting_here(),
            TORCHELASTIC_USE_AGENT_STORE="False",  # rank 0 hosts the store, whatever torchrun has left in a shell
        )
        environ.setdefault("OMP_NUM_THREADS", str(threads))
        for rank in range(processes):
            own = dict(environ, RANK=str(rank), LOCAL_RANK=str(rank))
            before = _held_back if hold_signals else die_with_parent_only
            children.append(subprocess.Popen(command, env=own, preexec_fn=before))
            for number in received:
                children[-1].send_signal(number)
        with pausing(lambda: [child.pid for child in children if child.poll() is None]):
            return _wait(children, grace_s, agreed, received)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], grace_s: float, agreed: Path | None, received: list[int]) -> int:
    """Wait for all; after the first failure the others get a grace period, then SIGKILL."""
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
    """Report that a rank was killed by a signal, which it cannot report itself."""
    name = signal.Signals(number).name
    memory = ", usually because the machine ran out of memory: lower data.micro_batch" if name == "SIGKILL" else ""
    say(f"rank {rank} was killed by signal {number} ({name}){memory}")


def _held_back() -> None:
    """Run in the child: see die_with_parent_only; also block signals until the program unblocks them."""
    die_with_parent_only()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)


def meeting_here() -> dict[str, str]:
    """Return the environment variables with which processes of this machine meet.

    They use its loopback interface, whatever its host name resolves to: gloo would ask the name server for it, which
    may not answer, and refuses a name of 64 characters.

    Raises:
        UserError: that interface is down, as in a new network namespace.
    """
    host, port = _free_address()
    found = {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    known = {name for _, name in socket.if_nameindex()}
    if not os.environ.get(INTERFACE) and (name := next((name for name in ("lo", "lo0") if name in known), "")):
        found[INTERFACE] = name
    return found


def free_port() -> int:
    """Return a TCP port that is currently free on the loopback interface. Raises UserError if that is down."""
    return _free_address()[1]


def _free_address() -> tuple[str, int]:
    """Return the address of the loopback interface, of IPv4 if it has one, and a free TCP port."""
    problem: OSError | None = None
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe, socket.socket(family) as other:
                probe.bind((host, 0))
                probe.listen()
                other.connect(probe.getsockname())
                return host, int(probe.getsockname()[1])
        except OSError as error:
            problem = problem or error
    assert problem is not None
    raise UserError(
        f"127.0.0.1 cannot be reached ({problem.strerror}), where the processes of a run meet: bring up the loopback "
        f"interface (ip link set lo up)"
    ) from problem


def worker(module: str, config_class: str, config_file: str, result_file: str) -> int:
    """Run `module.main(config)` as one rank of `launch`; return the exit code. An error that all ranks share is
    reported once, and so is a signal that ends a command with nothing to save."""
    rank = int(os.environ["RANK"])
    config = from_plain(getattr(training.config.commands, config_class), json.loads(Path(config_file).read_text()))
    with python.importing():
        command = importlib.import_module(module)
    try:
        if getattr(command, "HANDLES_SIGNALS", False):
            result = command.main(config)
        else:
            with ends_at_once():
                signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
                result = command.main(config)
    except CascadeError as error:
        alone = error.exit_code == EXIT_HUNG or (isinstance(error, DeviceLost) and not error.shared)
        if rank == 0 and config.debug:
            traceback.print_exc()
        elif alone or _is_first(result_file):
            say(str(error))
        if not alone:
            agreed_file(result_file).touch()
        return error.exit_code
    except Exception as error:
        told = of_machine(error)
        if config.debug or told is None:
            raise
        if told.exit_code != EXIT_USER_ERROR:
            say(f"rank {rank}: {told}")
        elif _is_first(result_file):  # of all ranks, which may share it
            say(str(told))
        return told.exit_code
    except Terminated as end:
        if _is_first(result_file):
            say(f"stopped by {signal.Signals(end.number).name}")
        return 128 + end.number
    except KeyboardInterrupt:  # a second Ctrl-C
        return EXIT_INTERRUPTED
    if rank == 0:
        Path(result_file).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_program(lambda: worker(*sys.argv[1:5]))
