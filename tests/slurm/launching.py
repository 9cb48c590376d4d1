"""Helpers for the tests of `cascade launch`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from slurm.commands.launch import main
from tests.training import forks
from training.cli.compose import load_config

TWO_NODES = ["cluster=slurm", "cluster.nodes=2", "cluster.processes=1", "cluster.cpus_per_task=1", "cluster.gpus=false"]
ONE_TASK = ["cluster=slurm", "experiment=demo", "cluster.processes=1", "cluster.gpus=false"]
FAKE = {
    "srun": 'while [[ $1 == --* ]]; do echo "$1" >> options; shift; done\n'
    'if [ "${SLURM_EXPORT_ENV:-ALL}" = NONE ]; then exec env -i PATH="$PATH" "$@"; fi\nexec "$@"',
    "scontrol": 'case "$*" in "show hostnames"*) echo "${SLURM_JOB_NODELIST%%,*}";; esac',
    "squeue": "echo RUNNING",
    "scancel": "true",
}
"""The programs of a site, as far as a job's script uses them on one node."""


def launch(*words: str, own: list[str] | None = None) -> dict:
    """`cascade launch` in this process; `words` are settings of both commands, `own` the launcher's."""
    without = {"verb=sample", "verb=evaluate", "verb=bundle"} & {*(own or [])}  # they read no shards
    if not without and not any(word.startswith(("data.shards=", "experiment=demo")) for word in words):
        words = (*words, "data.shards=data/demo/train")
    quoted = json.dumps(list(words), ensure_ascii=False)
    return main(load_config("launch", [*words, *(own or []), f"overrides={quoted}"]))


def cascade(*words: str, env: dict[str, str], cwd: Path) -> dict:
    """A command line; returns its JSON answer."""
    done = forks.command(*words, "json=true", env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def install(folder: Path, **programs: str) -> Path:
    """Writes shell scripts as programs; returns the directory for PATH."""
    folder.mkdir(exist_ok=True)
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def run_script(script: str | Path, site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a job's script as Slurm would, with the programs of `site` in front."""
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    env = {**os.environ, **job, "PATH": f"{site}:{os.environ['PATH']}", **environment}
    return subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, timeout=60)
