"""The rank of this process, the number of processes and their share of the work: the only code that reads RANK and
SLURM_PROCID in training.

Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.machine import usable_cores
from training.config.experiment import ClusterConfig


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, its device and its process groups."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    place: str = ""
    """Device and node, for messages."""
    control: Any = field(default=None, compare=False, repr=False)
    """Gloo process group for decisions (main thread); None without a process group."""
    background: Any = field(default=None, compare=False, repr=False)
    """Gloo process group of the thread that writes checkpoints; None without a process group."""
    store: Any = field(default=None, compare=False, repr=False)
    """The key-value store in which the ranks met; None for a single rank."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes shared files."""
        return self.rank == 0


def named(ranks: Sequence[int], most: int = 8) -> str:
    """Return `rank 3`, or `ranks 1, 2 and 5 more`, for a message."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:most]))}{more}"


UNLAUNCHED = "if no launcher started this command: unset RANK CASCADE_SRUN"
"""The remedy for variables that an earlier program has left in a shell."""


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher, or Slurm in a job of `cascade launch`, started this process as a rank."""
    return "RANK" in environ or environ.get("CASCADE_SRUN") == "1"


def _names(environ: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the names of the variables with the rank, the local rank and the world size."""
    if "RANK" in environ or not is_launched(environ):
        return "RANK", "LOCAL_RANK", "WORLD_SIZE"
    return "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"


def read_ranks(environ: Mapping[str, str] = os.environ) -> Ranks | None:
    """Read the ranks that a launcher set in the environment: RANK..., or Slurm's variables if CASCADE_SRUN=1; None
    without a launcher.

    SLURM_PROCID alone is not enough: it is also set in a plain `salloc` or in a batch script that runs one process.

    Raises:
        ConfigError: a variable is missing or contradicts the others, or Slurm started several tasks that are not ranks
            of one program.
    """
    if not is_launched(environ):
        check_one_program(environ)
        return None
    names, values = _names(environ), []
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise ConfigError(f"{name} is not set although {names[0]} is: a launcher must set both; {UNLAUNCHED}")
        values.append(environ[name])
    numbers = [int(v) if v.isdecimal() else None for v in (*values[:3], values[4])]
    for name, value, number in zip((*names, "MASTER_PORT"), (*values[:3], values[4]), numbers, strict=True):
        if number is None:
            raise ConfigError(f"{name}={value}: it must be a number; {UNLAUNCHED}")
    rank, local_rank, world_size, port = (number or 0 for number in numbers)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{names[0]}={rank}: it must lie between 0 and {names[2]} - 1 = {world_size - 1}; {UNLAUNCHED}"
        )
    if not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT={port}: it must lie between 1 and 65535; {UNLAUNCHED}")
    return Ranks(rank, local_rank, world_size)


def share(part: int, parts: int, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return this process's part and the total number of parts, after dividing by Slurm array task and by rank.

    Raises:
        ConfigError: `part` is not below `parts`.
    """
    if not 0 <= part < parts:
        raise ConfigError(f"part={part}: it must lie between 0 and parts - 1={parts - 1}")
    if "SLURM_ARRAY_TASK_COUNT" in environ and parts == 1:
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = max(int(environ.get("SLURM_ARRAY_TASK_STEP", "1")), 1)
        part = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step
        parts = int(environ["SLURM_ARRAY_TASK_COUNT"])
    rank, _, world = ranks_of(environ)
    return part * world + rank, parts * world


def ranks_of(environ: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return (rank, local rank, world size) from a launcher's variables, or from Slurm's in a job of `cascade
    launch`."""
    found = zip(_names(environ), "001", strict=True)
    rank, local_rank, world = (int(environ.get(name, default)) for name, default in found)
    return rank, local_rank, world


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process reports errors that all ranks share: rank 0, or a process without a rank, which may
    have variables left by an earlier program."""
    try:
        ranks = read_ranks(environ)
    except ConfigError:
        return True
    return ranks is None or ranks.is_main


def check_one_program(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a plain `srun -N2 cascade train`, each task of which would start its own run in the same directory.

    Raises:
        ConfigError: this is one of several tasks that are not ranks of one program.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in environ and tasks.isdecimal() and int(tasks) > 1:
        raise ConfigError(
            f"srun has started {tasks} tasks of this command, which would be {tasks} competing runs: submit it with "
            f"`cascade launch cluster=slurm cluster.nodes=N`, or set CASCADE_SRUN=1, MASTER_ADDR (the first node) and "
            f"MASTER_PORT for srun, so that its tasks are the ranks of one run"
        )


def gpu_of(local_rank: int, visible: int) -> int:
    """Return the index of this process's GPU among those it sees: its local rank, or 0 if it only sees its own
    (--gpus-per-task)."""
    return local_rank % visible


def process_count(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes to start on this machine: `cluster.processes`, otherwise one per GPU that torch
    could use, otherwise one."""
    if cluster.processes:
        return cluster.processes
    try:
        if "+cpu" in metadata.version("torch"):
            return 1
    except metadata.PackageNotFoundError:
        return 1
    if "CUDA_VISIBLE_DEVICES" in environ:
        return max(1, len([d for d in environ["CUDA_VISIBLE_DEVICES"].split(",") if d.strip()]))
    gpus = Path("/proc/driver/nvidia/gpus")
    return max(1, len(list(gpus.iterdir())) if gpus.is_dir() else 0)


def is_sweep() -> bool:
    """Return whether this is one job of a --multirun, whose jobs run one after the other in one process."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_search() -> bool:
    """Return whether this is one job of a --multirun whose sweeper (Optuna, Ax) chooses the next values from its
    result."""
    from hydra.core.hydra_config import HydraConfig

    return is_sweep() and "BasicSweeper" not in str(HydraConfig.get().sweeper._target_)


def thread_count(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> int:
    """Return the CPU threads per process: `cluster.threads`, otherwise OMP_NUM_THREADS or SLURM_CPUS_PER_TASK,
    otherwise an even share of the cores that this process may use. OMP_NUM_THREADS=4,2 (one number per level of nested
    regions) gives 4.

    Raises:
        ConfigError: the environment variable is not a number.
    """
    name = "OMP_NUM_THREADS" if environ.get("OMP_NUM_THREADS") else "SLURM_CPUS_PER_TASK"
    said = (environ.get(name) or "0").partition(",")[0].strip()
    if not said.isdecimal():
        raise ConfigError(f"{name}={environ[name]}: it must be a number of threads; unset it, or set cluster.threads")
    return cluster.threads or int(said) or max(1, usable_cores() // process_count(cluster, environ))
