"""SkyPilot: a task per job of the graph (`sky launch`), and all of them in order as a pipeline (`sky jobs launch`).

SkyPilot's pipelines are chains, so stages that could train at the same time run one after the other; launched
individually, their tasks can run in parallel. Run directory, code and data must be on storage that all nodes mount.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.errors import ConfigError
from slurm.emitters.node import job_name, node_script
from slurm.jobs.job import Job
from training.config.cluster import slurm_mebibytes
from training.config.commands import LaunchCommand
from training.processes.exit_codes import EXIT_PREEMPTED

ENDING, WHOLE = "sky.yaml", ("pipeline", "sky.yaml")


def task(job: Job) -> dict[str, Any]:
    """Return one task, in the form that `sky launch FILE` expects.

    Raises:
        ConfigError: it needs GPUs but cluster.accelerator is not set, or a mount is invalid.
    """
    cluster = job.config.cluster
    nodes = cluster.nodes if job.is_distributed else 1
    resources: dict[str, Any] = {}
    if job.gpus:
        if not cluster.accelerator:
            raise ConfigError("cluster.accelerator: SkyPilot needs a GPU type, for example H100")
        resources["accelerators"] = f"{cluster.accelerator}:{job.gpus}"
    if job.cpus:
        resources["cpus"] = f"{job.cpus * job.processes}+"
    if cluster.mem:
        resources["memory"] = f"{math.ceil(slurm_mebibytes('cluster.mem', cluster.mem) / 1024)}+"
    if cluster.container:
        resources["image_id"] = f"docker:{cluster.container}"
    resources["job_recovery"] = {
        "max_restarts_on_errors": cluster.max_restarts_without_progress,
        "recover_on_exit_codes": [EXIT_PREEMPTED],
    }
    found: dict[str, Any] = {"name": job_name(job), "num_nodes": nodes, "resources": resources}
    mounts = dict(_mount(entry) for entry in cluster.container_mounts)
    if mounts:
        found["file_mounts"] = mounts
    return {**found, "run": _run(job, nodes)}


def check_launch(config: LaunchCommand) -> None:
    """Raise `ConfigError` for a job array."""
    if config.embed_tasks > 1:
        raise ConfigError(f"embed_tasks={config.embed_tasks}: SkyPilot has no job arrays; leave it out")


def how(jobs: Sequence[Job], path: Path) -> str:
    """Return the command that launches the only task, or the pipeline."""
    only = len(jobs) == 1
    return f"sky launch {shlex.quote(str(jobs[0].script))}" if only else f"sky jobs launch {shlex.quote(str(path))}"


def manifest(job: Job) -> str:
    """Return the task as YAML."""
    return f"# {job.title}\n" + yaml.safe_dump(task(job), sort_keys=False, width=1000)


def whole(name: str, jobs: Sequence[Job], path: Path) -> str:
    """Return all tasks as YAML, in order; each runs after the previous one has succeeded."""
    return yaml.safe_dump_all([{"name": name}, *(task(job) for job in jobs)], sort_keys=False, width=1000)


def _mount(entry: str) -> tuple[str, str]:
    source, _, path = entry.rpartition(":")
    if not source or not path.startswith("/"):
        raise ConfigError(f"cluster.container_mounts: {entry}: for SkyPilot it must be s3://BUCKET/...:/PATH")
    return path, source


def _run(job: Job, nodes: int) -> str:
    first = '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
    here = [f"cd {shlex.quote(str(Path.cwd()))}"]
    return node_script(job, nodes=nodes, node="SKYPILOT_NODE_RANK", first=first, before=here)
