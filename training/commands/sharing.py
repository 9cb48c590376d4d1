"""Work on shards shared out: by `part` and `parts`, by the tasks of a Slurm array, and by processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from training.processes.launcher import launch
from training.processes.ranks import process_count

_RESULTS = "CASCADE_SHARED_RESULTS"
"""Directory in which the processes of one command leave what they did."""


def in_processes(module: str, config: Any, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """`work(config)` in as many processes as a launcher or `cluster.processes` says, and the sum of what they did.

    Args:
        module: whose `main(config)` calls this; the processes of this machine start it again.
    """
    launched = "RANK" in os.environ or os.environ.get("CASCADE_SRUN") == "1"
    if not launched and process_count(config.cluster) > 1:
        with tempfile.TemporaryDirectory(prefix="cascade-shared-") as folder:
            os.environ[_RESULTS] = folder
            try:
                launch(module, config)
            finally:
                del os.environ[_RESULTS]
            total: Counter[str] = Counter()
            for file in Path(folder).iterdir():
                total.update(json.loads(file.read_text()))
            return dict(total)
    done = work(config)
    if _RESULTS in os.environ:
        Path(os.environ[_RESULTS], os.environ["RANK"]).write_text(json.dumps(done))
    return done


def share(part: int, parts: int, environment: Mapping[str, str]) -> tuple[int, int]:
    """(this process's part, parts in all), after the Slurm array and the launcher have divided it further.

    Raises:
        ConfigError: `part` is not below `parts`.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part={part}: it must lie between 0 and parts={parts} less 1")
    if "SLURM_ARRAY_TASK_COUNT" in environment and parts == 1:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = max(int(environment.get("SLURM_ARRAY_TASK_STEP", "1")), 1)
        part = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        parts = int(environment["SLURM_ARRAY_TASK_COUNT"])
    rank, _, world = ranks_of(environment)
    return part * world + rank, parts * world


def ranks_of(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, rank on its machine, processes) by a launcher's variables, or by Slurm's in a job of `cascade launch`."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" not in environment and environment.get("CASCADE_SRUN") == "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    rank, local_rank, world = (int(environment.get(name, default)) for name, default in zip(names, "001", strict=True))
    return rank, local_rank, world
