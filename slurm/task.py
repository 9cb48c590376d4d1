"""One rank under srun: determines the rendezvous address, runs the program, and records how it ended.

`srun ... python -P -m slurm.task PROGRAM ARGUMENTS...`. It imports as little as possible, because every rank waits for
it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

from data_pipeline.common.children import die_with_parent
from data_pipeline.common.machine import oom_kills
from training.processes.exit_codes import EXIT_DEVICE_LOST, EXIT_HUNG, EXIT_PREEMPTED
from training.processes.failures import STUCK, broken_gpu, is_lost_rank, leave_note, node_name

STOPPED = "stopped"
"""Name of the note that the program was asked to stop and has saved."""
KILLED, ABORTED = 128 + signal.SIGKILL, 128 + signal.SIGABRT
"""Exit codes of a program that was killed, and of one that NCCL's threads, or a C++ error, have aborted, of which only
the last words say why."""
TAIL = 1 << 14
"""Bytes of a program's error output that are searched for the reason of its end."""
POLL_S = 0.1
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
SIOCGIFADDR = 0x8915


def main(command: list[str], environ: MutableMapping[str, str] = os.environ) -> int:
    """Run `command`; return the exit code for srun.

    A program that exits with code 75 has saved and did not fail. If srun saw this code, it would kill the ranks that
    need a moment longer; so the script gets a note, and srun gets 0, unless the note cannot be written.
    """
    set_meeting_place(environ)
    for number in PASSED_ON:  # Slurm sends them to every process of the step, including the program
        signal.signal(number, lambda *_: None)
    kills_before = oom_kills()
    child = subprocess.Popen(command, preexec_fn=die_with_parent, stderr=subprocess.PIPE)
    errors = PassedOn(child)
    code = child.wait()
    code, said = 128 - code if code < 0 else code, errors.end()
    notes = environ.get("CASCADE_NOTES")
    if not (notes and code):
        return code
    try:
        note(Path(notes), code, said if code == ABORTED else "", oom_kills() > kills_before, environ)
    except OSError as error:
        print(f"==> {notes}: no note about code {code} there: {error.strerror}", file=sys.stderr, flush=True)
        return code
    return 0 if code == EXIT_PREEMPTED else code


class PassedOn(threading.Thread):
    """Passes the error output of a program on to this process's own, and keeps the end of it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        assert child.stderr is not None
        self._from, self._tail, self._ended = child.stderr.fileno(), b"", threading.Event()
        self.start()

    def end(self) -> str:
        """Pass on what is left of a program that has ended; return the end of its output."""
        self._ended.set()
        self.join()
        return self._tail.decode(errors="replace")

    def run(self) -> None:
        """Read until the program, and all that has its error output, has ended."""
        while True:
            ready, _, _ = select.select([self._from], [], [], POLL_S)
            if not ready and self._ended.is_set():  # its own child processes may keep the pipe open
                return
            data = os.read(self._from, TAIL) if ready else b""
            if ready and not data:
                return
            self._tail = (self._tail + data)[-TAIL:]
            with suppress(OSError):
                sys.stderr.buffer.write(data)
                sys.stderr.buffer.flush()


def note(notes: Path, code: int, said: str, starved: bool, environ: MutableMapping[str, str]) -> None:
    """Write the note about an end.

    Args:
        notes: directory of the notes.
        code: exit code of the program.
        said: the last words of a program that was aborted.
        starved: whether the kernel has meanwhile killed for lack of memory. (Its count may be that of a whole node.)
        environ: Slurm's variables.
    """
    if code == EXIT_PREEMPTED:
        (notes / STOPPED).touch()
        return
    rank, node = int(environ.get("SLURM_PROCID", "0")), node_name(environ)
    why, innocent = "", False
    if code == KILLED and starved:
        why, innocent = f"rank {rank} on {node} was killed because the job ran out of memory; raise cluster.mem", True
    if broken := broken_gpu(said):
        code, why = EXIT_DEVICE_LOST, f"rank {rank} on {node} was aborted: {broken}"
    elif is_lost_rank(said) or STUCK.search(said):
        code = EXIT_HUNG
    leave_note(notes, rank, node, code, why, innocent)


def set_meeting_place(environ: MutableMapping[str, str]) -> None:
    """Set the rendezvous of the ranks as an address, because compute nodes may be unable to resolve each other's names.

    The script runs on the first node, which will have rank 0, and srun tells every task the address it was launched
    from. By default gloo listens on the address of the host's own name, which is 127.0.1.1 on Debian; so its interface
    is set, too.
    """
    launcher = environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if environ.get("CASCADE_MEET_AT_LAUNCHER") == "1" and launcher and not launcher.startswith("127."):
        environ["MASTER_ADDR"] = launcher
    if "GLOO_SOCKET_IFNAME" not in environ and environ.get("MASTER_ADDR"):
        interface = interface_towards(environ["MASTER_ADDR"])
        if interface:
            environ["GLOO_SOCKET_IFNAME"] = interface


def interface_towards(address: str) -> str | None:
    """Return the network interface by which this machine would reach an address; None if that is unknown."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # connecting a datagram socket sends nothing
            own = probe.getsockname()[0]
        found = _interfaces6() if family == socket.AF_INET6 else _interfaces4()
    except OSError:
        return None
    return found.get(own)


def _interfaces4() -> dict[str, str]:
    """Return IPv4 address -> interface."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    return found


def _interfaces6() -> dict[str, str]:
    """Return IPv6 address -> interface."""
    found = {}
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, *_, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
