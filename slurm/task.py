"""One rank under srun: finds the way to the first node, runs the program, and notes how it ended.

`srun ... python -P -m slurm.task PROGRAM ARGUMENTS...`. It imports next to nothing: it stands in front of every rank.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from data_pipeline.common.children import die_with_parent
from training.processes.exit_codes import EXIT_PREEMPTED

STOPPED = "stopped"
"""Note: the program was asked to stop and has saved."""
FAILED = "failed-*.json"
"""Notes: {rank, node, code, time} of a program that failed."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
SIOCGIFADDR = 0x8915


def main(command: list[str], environ: MutableMapping[str, str] = os.environ) -> int:
    """Runs `command`; returns what srun is told.

    A program that ends with code 75 has saved and is no failure: srun would kill the ranks that need a moment longer.
    So this is a note for the script, and 0 for srun.
    """
    set_meeting_place(environ)
    for number in PASSED_ON:  # Slurm sends them to every process of the step: the program has got it as well
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    code = child.wait()
    code = 128 - code if code < 0 else code
    notes = environ.get("CASCADE_NOTES")
    if notes and code:
        note(Path(notes), code, environ)
    return 0 if code == EXIT_PREEMPTED and notes else code


def note(notes: Path, code: int, environ: MutableMapping[str, str]) -> None:
    """Leaves word of an end, whole or not at all."""
    if code == EXIT_PREEMPTED:
        (notes / STOPPED).touch()
        return
    rank, node = int(environ.get("SLURM_PROCID", "0")), environ.get("SLURMD_NODENAME") or socket.gethostname()
    path = notes / FAILED.replace("*", str(rank))
    path.with_suffix(".tmp").write_text(json.dumps({"rank": rank, "node": node, "code": code, "time": time.time()}))
    path.with_suffix(".tmp").replace(path)


def set_meeting_place(environ: MutableMapping[str, str]) -> None:
    """Where the ranks meet, as an address instead of a name: compute nodes need not resolve each other's.

    The script runs on the first node, where rank 0 will be; srun tells every task from which address it was launched.
    gloo listens where the host's own name leads, which is 127.0.1.1 on a Debian machine: it is given the interface.
    """
    launcher = environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if environ.get("CASCADE_MEET_AT_LAUNCHER") == "1" and launcher and not launcher.startswith("127."):
        environ["MASTER_ADDR"] = launcher
    if "GLOO_SOCKET_IFNAME" not in environ and environ.get("MASTER_ADDR"):
        interface = interface_towards(environ["MASTER_ADDR"])
        if interface:
            environ["GLOO_SOCKET_IFNAME"] = interface


def interface_towards(address: str) -> str | None:
    """The network interface whose address this machine would use to reach another; None where that is not known."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # a datagram socket sends nothing here
            own = probe.getsockname()[0]
        found = _interfaces6() if family == socket.AF_INET6 else _interfaces4()
    except OSError:
        return None
    return found.get(own)


def _interfaces4() -> dict[str, str]:
    """IPv4 address -> interface."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    return found


def _interfaces6() -> dict[str, str]:
    """IPv6 address -> interface."""
    found = {}
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, *_, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
