"""A sweep as one job array: each task runs the script of one job, in that job's own run directory."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.errors import ConfigError
from slurm.jobs.job import Job
from slurm.options import quoted, verbatim

OWN = ("#SBATCH --job-name=", "#SBATCH --output=")
"""Options that may differ between the jobs of a sweep."""
SCRIPT = """\
#!/bin/bash
# A sweep: task N of the array runs the script of the Nth job and appends to that job's log.
{directives}
#SBATCH --array=0-{last}{limit}
#SBATCH --output={output}
scripts=(
{scripts}
)
logs=(
{logs}
)
script=${{scripts[$SLURM_ARRAY_TASK_ID]}}
mkdir -p "${{logs[$SLURM_ARRAY_TASK_ID]}}"
export CASCADE_JOB="\\"${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID\\""
exec bash "$script" >> "${{logs[$SLURM_ARRAY_TASK_ID]}}/slurm-${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.log" 2>&1
"""


def tasks_of(array: str) -> int:
    """Return how many tasks the value of sbatch's --array names, such as 0-15%4 or 1,3,8-20:4; 1 if it is empty."""
    count = 0
    for part in array.partition("%")[0].split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        count += (int(last) - int(first)) // int(step or 1) + 1 if last else 1
    return count


def sweep_folder(jobs: Sequence[Job]) -> Path:
    """Return the common parent directory of all runs of a sweep."""
    return Path(os.path.commonpath([str(job.home.parent) for job in jobs]))


def render_array(jobs: Sequence[Job], texts: Sequence[str], at_once: int) -> str:
    """Return the sbatch script of the array.

    Args:
        jobs: the jobs of the sweep.
        texts: their scripts.
        at_once: most tasks to run at the same time; 0: all.

    Raises:
        ConfigError: the jobs request different resources, which is impossible in one array.
    """
    asked = [[line for line in text.splitlines() if line.startswith("#SBATCH")] for text in texts]
    common = [[line for line in lines if not line.startswith(OWN)] for lines in asked]
    for lines in common[1:]:
        if lines != common[0]:
            other = next(line for line in [*lines, *common[0]] if (line in lines) != (line in common[0]))
            raise ConfigError(
                f"--multirun: its jobs differ in {other.removeprefix('#SBATCH ')}, but a job array requests the same "
                f"for all; sweep cluster.* with separate launches"
            )
    name = next(line for line in asked[0] if line.startswith(OWN[0]))
    return SCRIPT.format(
        directives="\n".join([name, *common[0]]),
        last=len(jobs) - 1,
        limit=f"%{at_once}" if at_once else "",
        output=quoted("output", f"{verbatim(sweep_folder(jobs))}/launch/array-%A_%a.log"),
        scripts="\n".join(f"    {shlex.quote(str(job.script))}" for job in jobs),
        logs="\n".join(f"    {shlex.quote(str(job.home / 'logs'))}" for job in jobs),
    )
