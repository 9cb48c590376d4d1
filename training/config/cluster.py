"""Where the processes of a command run, and what to request from a scheduler."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.config import at_least, one_of, require

SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
SLURM_MEMORY = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
LOCAL, SLURM, KUBERNETES, SKYPILOT = "local", "slurm", "kubernetes", "skypilot"
EMITTED = (KUBERNETES, SKYPILOT)
"""Schedulers for which `cascade launch` only writes files; their own tools submit them."""
KINDS = (LOCAL, SLURM, *EMITTED)
FOLLOWED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("kind", "processes", "threads", "cpus_per_task", "gpus", "setup", "python"), KINDS),
    **dict.fromkeys(("preflight", "max_restarts_without_progress"), KINDS),
    **dict.fromkeys(("nodes", "mem", "container", "container_mounts", "interface"), (SLURM, *EMITTED)),
    **dict.fromkeys(("time", "signal_s", "requeue"), (SLURM, KUBERNETES)),
    **dict.fromkeys(("modules", "conda", "venv"), (LOCAL, SLURM)),
    **dict.fromkeys(("min_nodes", "preflight_exclude", "gpus_per", "container_runtime"), (SLURM,)),
    **dict.fromkeys(("partition", "account", "sbatch"), (SLURM,)),
    "accelerator": (SKYPILOT,),
}
"""Key -> the kinds of cluster for which `cascade launch` uses it; elsewhere any value but its default is refused."""
INSTEAD = dict.fromkeys(EMITTED, " (what the program needs belongs in the image or in cluster.setup)")
EARLY_S = 60
"""Slurm may send the signal up to this many seconds early (sbatch(1), --signal)."""


@dataclass
class ClusterConfig:
    """Where processes run. With `kind: local` they start on this machine; with `kind: slurm`, `cascade launch` submits
    to Slurm; with `kubernetes` or `skypilot` it writes files for their own tools to submit."""

    kind: str = "local"
    """`local`, `slurm`, `kubernetes` or `skypilot`."""
    processes: int = 0
    """Processes per node; 0: one per GPU, or 1 without GPUs."""
    threads: int = 0
    """CPU threads per process for torch; 0: cores / processes."""
    nodes: int = 1
    """Number of nodes of a training; with `min_nodes`, the maximum."""
    min_nodes: int = 0
    """Minimum number of nodes (Slurm): the training starts on any number up to `nodes` whose processes can share the
    data, and continues without a node that has failed. 0: exactly `nodes`."""
    partition: str | None = None
    """Slurm partition; null: the site's default."""
    account: str | None = None
    """Slurm account to charge; null: the user's default."""
    time: str | None = None
    """Time limit in Slurm's format: minutes, hours:minutes:seconds, days-hours, ..., or UNLIMITED. On Slurm, of one
    allocation (cluster=slurm: 24:00:00; null: the site's default); on Kubernetes, of the whole Job (null: none)."""
    cpus_per_task: int = 0
    """CPU cores per process; 0: the scheduler's default."""
    mem: str | None = None
    """Memory per node in Slurm's format, for example 200G; null: the site's default."""
    gpus: bool = True
    """Request one GPU per process."""
    gpus_per: str = "node"
    """`node`: each process sees all GPUs of its node and uses its own; `task`: it only sees its own (Slurm)."""
    requeue: bool = True
    """Requeue the job at its time limit, on preemption, and when restarting within the allocation fails (Slurm);
    start again a pod that was evicted or has saved and stopped (Kubernetes)."""
    signal_s: int = 120
    """Seconds before the time limit at which the job saves and requeues itself (Slurm); seconds that a pod has to save
    when it is asked to stop (Kubernetes)."""
    max_restarts_without_progress: int = 3
    """Consecutive restarts from the same checkpoint before the job ends."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Additional #SBATCH options, as `option: value`; null removes a default."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load; a module that fails to load ends the job."""
    conda: str | None = None
    """Conda environment to activate: a name or a directory."""
    venv: str | None = None
    """Virtual environment to activate: a directory."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before the program (exports, `source` ...); a line that fails ends the job and is named."""
    python: str | None = None
    """Python interpreter; null: that of the environment activated by conda, venv or setup, or of the container,
    otherwise the one that ran `cascade launch`."""
    container: str | None = None
    """Container image with this project's dependencies, in the form that pyxis or apptainer expects."""
    container_runtime: str = "pyxis"
    """`pyxis` (srun --container-image) or `apptainer`."""
    container_mounts: list[str] = field(default_factory=list)
    """HOST:CONTAINER directories; the working directory, the run directory and the code are always mounted.
    Kubernetes: CLAIM:PATH, SkyPilot: s3://BUCKET:PATH; there, all mounts must be listed."""
    accelerator: str | None = None
    """GPU type that SkyPilot requests (H100)."""
    preflight: bool = False
    """Measure devices, links, store and clocks when a training starts, and report what is slow."""
    preflight_exclude: bool = False
    """Restart without a node that the preflight found slow (Slurm)."""
    interface: str | None = None
    """Network interface of NCCL and gloo (ib0); null: NCCL chooses, gloo uses the one that leads to the first node."""

    def __post_init__(self) -> None:
        one_of("cluster.kind", self.kind, KINDS)
        at_least(self, "cluster", nodes=1, processes=0, threads=0, cpus_per_task=0, signal_s=0, min_nodes=0)
        at_least(self, "cluster", max_restarts_without_progress=0)
        require(
            self.min_nodes <= self.nodes,
            f"cluster.min_nodes={self.min_nodes}: it must be at most cluster.nodes={self.nodes}",
        )
        one_of("cluster.gpus_per", self.gpus_per, ("node", "task"))
        one_of("cluster.container_runtime", self.container_runtime, ("pyxis", "apptainer"))
        require(
            not (self.conda and self.venv),
            f"cluster.conda={self.conda} and cluster.venv={self.venv}: set only one of them",
        )
        require(
            self.preflight or not self.preflight_exclude,
            "cluster.preflight_exclude=true: it needs cluster.preflight=true, which finds the slow node",
        )
        require(
            self.nodes > 1 or self.kind != SLURM or not self.preflight_exclude,
            "cluster.preflight_exclude=true: with cluster.nodes=1 there is no other node to continue on",
        )
        require(
            bool(self.container) or not self.container_mounts or self.kind == "skypilot",
            "cluster.container_mounts: it needs cluster.container, the image to mount them in",
        )
        require(
            bool(self.container) or self.container_runtime == "pyxis",
            f"cluster.container_runtime={self.container_runtime}: it needs cluster.container, the image to run",
        )
        for key, value in (("gpus_per", self.gpus_per == "task"), ("accelerator", self.accelerator)):
            require(self.gpus or not value, f"cluster.{key}={getattr(self, key)}: cluster.gpus=false requests no GPU")
        if self.kind != LOCAL:  # with which one also trains, plans ... on this machine; see `refuse_unused`
            refuse_unused(self)


def refuse_unused(cluster: ClusterConfig) -> None:
    """Refuse keys that a launch to this kind of cluster would ignore.

    Raises:
        ConfigError: it names the key, and the kinds that follow it.
    """
    plain = ClusterConfig()
    for key, followers in FOLLOWED_BY.items():
        value = getattr(cluster, key)
        if cluster.kind in followers or value == getattr(plain, key):
            continue
        if key == "sbatch" and cluster.kind == KUBERNETES and [*value] == ["array"]:
            continue  # the tasks among which `embed` shares its work
        said = str(value).lower() if isinstance(value, bool) else value
        raise ConfigError(
            f"cluster.{key}={said}: a launch with cluster={cluster.kind} would not use it, only "
            f"{' or '.join(f'cluster={kind}' for kind in followers)}; leave it out{INSTEAD.get(cluster.kind, '')}"
        )


def slurm_mebibytes(key: str, size: str) -> int:
    """Return a Slurm memory size (200G, 64000M, or 64000, also in mebibytes) in MiB, rounded up.

    Args:
        key: the setting to name in an error.

    Raises:
        ConfigError: it is not a memory size.
    """
    match = SLURM_MEMORY.fullmatch(size.strip())
    if not match:
        raise ConfigError(f"{key}={size}: it must be a memory size in Slurm's format, such as 200G or 64000M")
    return math.ceil(int(match["number"]) * 1024.0 ** ("KMGT".index(match["unit"].upper() or "M") - 1))


def slurm_seconds(key: str, limit: str) -> float:
    """Return a Slurm time limit in seconds; infinite for UNLIMITED.

    Args:
        key: the setting to name in an error.

    Raises:
        ConfigError: it is not a time limit.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = SLURM_TIME.fullmatch(limit)
    if not match:
        raise ConfigError(f"{key}={limit}: it must be a time limit in Slurm's format, such as 24:00:00 or 2-12:00:00")
    parts = [int(part) for part in match["rest"].split(":")]
    units = (60, 1, 1) if not match["days"] and len(parts) < 3 else (3600, 60, 1)
    seconds = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return float(seconds + 86400 * int(match["days"] or 0))
