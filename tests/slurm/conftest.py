"""A real Slurm of two nodes in namespaces of this machine (tests/slurm_cluster.sh), started once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm import supervise

SCRIPT = Path(__file__).parent.parent / "slurm_cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")


@dataclass
class Slurm:
    """The cluster; `env` points programs at it."""

    env: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def field(self, job: int | str, name: str) -> str:
        """A field of `scontrol show job`, for example JobState or Restarts."""
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", str(job)))
        assert found
        return found[1]

    def wait(self, job: int, *states: str, timeout: float = 120, log: Path | None = None) -> str:
        """Waits until the job is in one of `states` (default: any final one); returns the state."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(
            lambda: self.field(job, "JobState") in wanted,
            timeout,
            lambda: f"job {job} is {self.field(job, 'JobState')}, not {wanted}\n{log.read_text() if log else ''}",
            pause_s=0.5,
        )
        return self.field(job, "JobState")


def until(condition, timeout: float, explain=lambda: "", pause_s: float = 0.2) -> None:
    """Polls until `condition()` holds; less often where each question to Slurm starts a program."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(pause_s)


def unavailable(reason: str) -> None:
    """Skips, except in CI, where a test that does not run is a failure: then one sentence ends the session."""
    if os.environ.get("CI") == "true":
        pytest.exit(
            f"{reason}; with CI=true the tests on Slurm must run: .ci/run installs what they need", returncode=1
        )
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [p for p in PROGRAMS if shutil.which(p, path=path) is None]
    if os.geteuid() != 0:
        unavailable("a Slurm cluster in namespaces needs root")
    if missing:
        unavailable(f"missing: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)")
    number = os.getpid() % 10000
    with tempfile.TemporaryDirectory(prefix="cascade-slurm-", ignore_cleanup_errors=True) as lab:
        os.chmod(lab, 0o755)
        env = dict(os.environ, PATH=path, SLURM_LAB=lab, SLURM_CONF=f"{lab}/etc/slurm.conf", DS_ACCELERATOR="cpu")
        env |= {"SLURM_LAB_TAG": f"c{number}", "SLURM_LAB_NET": f"10.{64 + number // 250}.{number % 250}"}
        began = subprocess.run([SCRIPT, "start", "2"], env=env, capture_output=True, text=True)
        try:
            if began.returncode:
                unavailable(f"Slurm does not start here: {began.stderr.strip()[-2000:]}")
            yield Slurm(env)
        finally:
            subprocess.run([SCRIPT, "stop"], env=env, capture_output=True)


@pytest.fixture()
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture()
def on_cluster(slurm: Slurm, here: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """This process talks to the test cluster, whose nodes all accept jobs; its scripts wait less than usual before
    repeating a start that ended at once."""
    monkeypatch.setattr(supervise, "PAUSE_S", 1)
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.env[name])
    states = dict(line.split() for line in slurm.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
    for node, state in states.items():
        if "drain" in state:  # Slurm could not end a step there
            slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    return slurm


@pytest.fixture()
def program(here: Path, monkeypatch: pytest.MonkeyPatch):
    """Lets a shell script stand in for the Python program in the generated scripts; everything else is real."""

    real = f'case "$*" in "-P -m slurm."*) exec {sys.executable} "$@" ;; esac\nshift'

    def install(body: str) -> None:
        path = here / "program"
        path.write_text(f"#!/bin/bash\n{real}\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return install
