"""One rank under srun: determines the rendezvous address, runs the program, and records how it ended.

`srun ... python -P -m slurm.task PROGRAM ARGUMENTS...`. It imports as little as possible, because every rank waits for
it.
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
"""Name of the note that the program was asked to stop and has saved."""
FAILED = "failed-*.json"
"""Names of the notes about programs that failed: {rank, node, code, time}."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
SIOCGIFADDR = 0x8915


def main(command: list[str], environ: MutableMapping[str, str] = os.environ) -> int:
    """Run `command`; return the exit code for srun.

    A program that exits with code 75 has saved and did not fail. If srun saw this code, it would kill the ranks that
    need a moment longer; so the script gets a note, and srun gets 0.
    """
    set_meeting_place(environ)
    for number in PASSED_ON:  # Slurm sends them to every process of the step, including the program
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    code = child.wait()
    code = 128 - code if code < 0 else code
    notes = environ.get("CASCADE_NOTES")
    if notes and code:
        note(Path(notes), code, environ)
    return 0 if code == EXIT_PREEMPTED and notes else code


def note(notes: Path, code: int, environ: MutableMapping[str, str]) -> None:
    """Write the note about an end, atomically."""
    if code == EXIT_PREEMPTED:
        (notes / STOPPED).touch()
        return
    rank, node = int(environ.get("SLURM_PROCID", "0")), environ.get("SLURMD_NODENAME") or socket.gethostname()
    path = notes / FAILED.replace("*", str(rank))
    path.with_suffix(".tmp").write_text(json.dumps({"rank": rank, "node": node, "code": code, "time": time.time()}))
    path.with_suffix(".tmp").replace(path)


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
