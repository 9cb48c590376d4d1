"""A second real S3 server for the tests: Ceph's radosgw over one monitor and one in-memory OSD, on loopback.

Needs Debian's packages radosgw, ceph-mon, ceph-osd and ceph-common; no systemd, no cephx, no disk. Starts in about 15
seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.s3 import S3Server, free_port

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
START_S = 60.0

_CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
mon initial members = a
public addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
mon data = {folder}/mon
osd data = {folder}/osd
mon data avail crit = 1
mon data avail warn = 1
mon allow pool size one = true
mon max pg per osd = 1000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw dns name = localhost
rgw enable usage log = false
rgw enable ops log = false
rgw thread pool size = 64
"""


def missing_programs() -> list[str]:
    """The programs of Ceph that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _lasting_port() -> int:
    """A free port that no connection takes in the meantime: radosgw binds it some ten seconds later."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    return free_port()


class Ceph:
    """A running cluster of one machine; `stop` ends its processes and removes its files."""

    def __init__(self) -> None:
        # Socket paths may hold 107 characters, which those of pytest's own temporary directories can pass.
        self.folder = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._config = self.folder / "ceph.conf"
        self.server = S3Server("127.0.0.1", _lasting_port(), ACCESS_KEY, SECRET_KEY)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        for name in ("mon", "osd", "log", "run"):
            (self.folder / name).mkdir()
        fsid, osd, mon_port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
        values = {"fsid": fsid, "mon_port": mon_port, "rgw_port": self.server.port, "folder": self.folder}
        self._config.write_text(_CONFIG.format(**values))
        monmap = str(self.folder / "monmap")
        address = f"[v1:127.0.0.1:{mon_port}]"
        self._run("monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, *_as_root())
        self._spawn("ceph-mon", "-f", "-i", "a", *_as_root())
        self._ask("osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, *_as_root())
        self._wait("the OSD", self._osd_is_up)
        user = ("--uid=tester", "--display-name=tester", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", *user)  # before radosgw: both make the pools
        self._spawn("radosgw", "-f", "-n", "client.rgw", *_as_root())
        self._wait("radosgw", self._answers)

    def _osd_is_up(self) -> bool:
        """An OSD that asks the monitor before it knows its fsid is refused ("wrong fsid") and ends: start it again."""
        osd = self._processes[-1]
        if osd.args[0] == "ceph-osd" and osd.poll() is not None:  # type: ignore[index]
            self._processes.pop()
        if len(self._processes) == 1:
            self._spawn("ceph-osd", "-f", "-i", "0", *_as_root())
        return "1 up" in self._ask("osd", "stat")

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.server.endpoint, timeout=5).close()
            return True
        except (TimeoutError, urllib.error.URLError, ConnectionError):
            return False

    def _wait(self, what: str, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not is_up():
            dead = [process.args for process in self._processes[2:] if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not come up; ended: {dead}\n{self._logs()}")
            time.sleep(0.1)

    def _ask(self, *words: str) -> str:
        """`ceph WORDS`; a client that asks before it has heard of the cluster's fsid is refused, and asks again."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self._run("ceph", *words)
            except RuntimeError as error:
                if "getting command descriptions" not in str(error) or time.monotonic() > deadline:
                    raise

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self._config), *arguments]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{error}\n{self._logs()}") from error
        said = done.stdout.decode(errors="replace")
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {said[-2000:]}\n{self._logs()}")
        return said

    def _spawn(self, program: str, *arguments: str) -> None:
        with open(self.folder / "log" / f"{program}.out", "wb") as out:
            command = [program, "-c", str(self._config), *arguments]
            self._processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    def _logs(self) -> str:
        ends = (f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in self.folder.glob("log/*"))
        return "\n".join(ends)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _as_root() -> tuple[str, ...]:
    """Ceph's daemons started by root would become the user `ceph`, who cannot write here."""
    return ("--setuser", "root", "--setgroup", "root") if os.geteuid() == 0 else ()
