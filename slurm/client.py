"""Runs Slurm's commands with a deadline, and without the variables of an allocation that this process may be in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_EXIT_ERROR")
"""Variables by which the user selects a cluster. All other SLURM_* and SRUN_* describe an allocation."""
FILTERS = ("SQUEUE_", "SCANCEL_", "SACCT_", "SCONTROL_")
"""Beginnings of variables that a user sets for what they type. SQUEUE_STATES would hide jobs from us, and SCANCEL_STATE
would keep them."""
PATIENCE_S = 60
"""Seconds that a command of Slurm may take."""
QUIET_S = 10
"""Seconds after which a command that has not answered is mentioned."""


@dataclass(frozen=True)
class Answer:
    """What a command of Slurm printed.

    Attributes:
        output, errors: its standard output and error output.
        problem: why it failed, in Slurm's words; empty if it succeeded.
        late: whether it was ended because it did not answer.
    """

    output: str = ""
    errors: str = ""
    problem: str = ""
    late: bool = False


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without the variables of an allocation from which a job is submitted, and without those
    that would filter what we ask.

    sbatch would pass SLURM_CPU_BIND, SLURM_MEM_PER_CPU and the like on to the new job, where srun obeys them. SBATCH_*
    are kept: they are the user's defaults. The cluster that sbatch would submit to is the one for all commands.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in KEPT or not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "CASCADE_", *FILTERS))
    }
    cluster = kept.pop("SBATCH_CLUSTERS", None)
    return {**kept, "SLURM_CLUSTERS": cluster} if cluster else kept


def call_slurm(*command: str, env: Mapping[str, str] | None = None, patience_s: float | None = None) -> Answer:
    """Run a Slurm command, with nothing to read, and return its answer. One that is quiet for long is mentioned on
    stderr.

    Args:
        command: the program and its arguments.
        env: its environment; None: `clean_environment`, with times in Slurm's standard format.
        patience_s: seconds that it may take; None: PATIENCE_S.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    env = {**clean_environment(), "SLURM_TIME_FORMAT": "standard"} if env is None else env
    name, pipe = Path(command[0]).name, subprocess.PIPE
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", env=env
        )
    except OSError as error:
        return Answer(problem=f"{name}: {error.strerror}")
    try:
        try:
            output, errors = child.communicate(timeout=min(QUIET_S, patience_s))
        except subprocess.TimeoutExpired:
            left_s = patience_s - QUIET_S
            if left_s <= 0:
                raise
            print(f"{name} has not answered yet; waiting {left_s:.0f} s more", file=sys.stderr, flush=True)
            output, errors = child.communicate(timeout=left_s)
    except subprocess.TimeoutExpired:
        return Answer(problem=f"{name} did not answer within {patience_s:.0f} s", late=True)
    finally:
        child.kill()
        child.wait()
    if not child.returncode:
        return Answer(output, errors)
    return Answer(output, errors, " ".join(errors.split()) or f"{name} ended with code {child.returncode}")


def ask(*command: str) -> str | None:
    """Run a Slurm command and return what it prints; None if it is missing, fails or takes too long."""
    answer = call_slurm(*command)
    return None if answer.problem else answer.output
