"""Runs Slurm's commands without the variables of an allocation that this process may be in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_EXIT_ERROR")
"""Variables by which the user selects a cluster. All other SLURM_* and SRUN_* describe an allocation."""
PATIENCE_S = 60
"""Seconds that a command of Slurm may take."""


def clean_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without the variables of an allocation from which a job is submitted.

    sbatch would pass SLURM_CPU_BIND, SLURM_MEM_PER_CPU and the like on to the new job, where srun obeys them. SBATCH_*
    are kept: they are the user's defaults.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not name.startswith(("SLURM_", "SLURMD_", "SRUN_", "CASCADE_"))
    }


def ask(*command: str) -> str | None:
    """Run a Slurm command and return what it prints; None if it is missing, fails or takes too long."""
    env = {**clean_environment(), "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
