"""The GPU of this process: which one it is, and whether it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from data_pipeline.common.errors import ConfigError
from training.config.experiment import ClusterConfig
from training.processes.endings import DeviceLost, blame
from training.processes.failures import node_name
from training.processes.ranks import gpu_of

CPU_BUILD = "torch is a CPU build"
OLD_DRIVER = "too old"
"""In torch's message about a driver that does not fit its CUDA version."""
NO_FILES = "NoDevFiles"
"""What Slurm sets CUDA_VISIBLE_DEVICES to in a job without GPUs."""


class Gpu(NamedTuple):
    """What a process sees of its GPU.

    Attributes:
        device: `cuda:I` with this process's own index, or `cpu`.
        uuid: UUID of the GPU; empty without one.
        why: why there is none.
        visible: number of GPUs that torch sees.
        given: number of GPUs that the scheduler gave to this process (CUDA_VISIBLE_DEVICES); 0: unknown.
    """

    device: str = "cpu"
    uuid: str = ""
    why: str = ""
    visible: int = 0
    given: int = 0


def see_gpu(local_rank: int, environ: Mapping[str, str] = os.environ) -> Gpu:
    """Look for the GPU of a process: its local rank, or 0 if it only sees its own (--gpus-per-task)."""
    import torch

    listed = environ.get("CUDA_VISIBLE_DEVICES", "")
    given = len([one for one in listed.split(",") if one.strip()]) if listed != NO_FILES else 0
    if torch.version.cuda is None and torch.version.hip is None and not torch.cuda.is_available():
        return Gpu(why=CPU_BUILD, given=given)
    visible = 0
    try:
        if torch.cuda.is_available():
            visible = torch.cuda.device_count()
            index = gpu_of(local_rank, visible)
            return Gpu(f"cuda:{index}", str(torch.cuda.get_device_properties(index).uuid), "", visible, given)
        torch.cuda.init()
        why = "torch sees no GPU"
    except (RuntimeError, ZeroDivisionError) as error:
        why = f"torch sees no GPU: {(str(error).splitlines() or [''])[0][:200]}"
    return Gpu(why=why, visible=visible, given=given)


def no_gpu(
    rank: int, node: str, gpu: Gpu, reason: str, others_have: bool = False, shared: bool = False
) -> DeviceLost | ConfigError:
    """Return the error about a process without a GPU: the node's failure if others have one or the scheduler gave it
    one, otherwise a mistake in the settings.

    Args:
        rank, node: the process.
        gpu: what it sees.
        reason: why it should have one.
        others_have: whether other processes of the run have one.
        shared: all ranks raise this error.
    """
    said = f"rank {rank} on {node} has no GPU ({gpu.why}), but {reason}"
    remedy = ": fix or exclude the node, or run on CPUs with cluster.gpus=false"
    if gpu.why != CPU_BUILD and OLD_DRIVER not in gpu.why and (others_have or gpu.given):
        return DeviceLost(said, remedy, node, shared)
    return ConfigError(f"{said}{remedy}")


def own_device(cluster: ClusterConfig, rank: int, local_rank: int) -> str:
    """Return the device of a process that works by itself: its GPU, or the CPU with cluster.gpus=false or on a machine
    without GPUs.

    Raises:
        DeviceLost, ConfigError: a scheduler was asked for a GPU, and it is not there.
    """
    if not cluster.gpus:
        return "cpu"
    gpu = see_gpu(local_rank)
    if not gpu.uuid and cluster.kind != "local":
        error = no_gpu(rank, node_name(), gpu, "cluster.gpus=true asks for one")
        if isinstance(error, DeviceLost):
            blame(rank, error)
        raise error
    return gpu.device
