"""Tells by the messages of torch, NCCL and gloo who has failed: another rank, or this one's GPU; and leaves notes about
it for the job script. Imports nothing large, as the task of each rank on Slurm imports it."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.storage.atomic import replacing

LOST = (
    "timed out",
    "timeout",
    "connection closed",
    "connection reset",
    "broken pipe",
    "connection refused",
    "connection was closed",  # NCCL's network plugins
    "communicator was aborted",  # NCCL, in the threads of a rank whose watchdog has seen an error elsewhere
    "ncclremoteerror",
    "remote process exited",  # NCCL's text for ncclRemoteError
    "peer may have exited",
)
"""Messages of gloo, NCCL and the key-value store if a peer is gone or does not respond. torch raises a plain
RuntimeError (or DistBackendError), as for any other failure of a collective, so only the wording tells them apart."""
BROKEN_GPU = re.compile(
    r"(?:CUDA|HIP)(?: (?:error|failure)\b|\]:)[^\n]*?"  # torch, NCCL, Triton
    r"(?:\bECC error|GPU is lost|fallen off the bus|unspecified launch failure|illegal memory access"
    r"|illegal instruction|hardware (?:stack )?error|NVLink error|unknown error|busy or unavailable"
    r"|no CUDA-capable device|invalid device ordinal|system not yet initialized|launch timed out)[^\n]*"
    r"|(?:CUBLAS|CUDNN)_STATUS_EXECUTION_FAILED[^\n]*"
    r"|No CUDA GPUs are available[^\n]*",
    re.IGNORECASE,
)
"""What CUDA and HIP say about a GPU that has failed. An illegal memory access may also be a bug; it is treated as the
GPU's failure because most of those in a long training are. A failed assertion in a kernel, a lack of memory or an
invalid argument never is."""
BROKEN_NODE = re.compile(r"ncclUnhandledCudaError|ncclSystemError|unhandled (?:cuda|system) error", re.IGNORECASE)
"""What NCCL says if a system call or CUDA failed in this process."""
NO_FAILURE = re.compile(r"out of memory|invalid argument", re.IGNORECASE)
STUCK = re.compile(
    r"Watchdog caught collective operation timeout|watchdog got stuck|operations have failed or timed out"
)
"""What NCCL's own threads print before they abort a process that waits for another."""
FAILED = "failed-*.json"
"""Names of the notes about ranks that failed: {rank, node, code, time, why, innocent}."""


def is_lost_rank(message: str) -> bool:
    """Return whether a collective failed because of another process."""
    said = message.lower()
    return any(words in said for words in LOST)


def broken_gpu(message: str) -> str:
    """Return the line by which a message says that this process's GPU, or its connection, has failed; empty if it does
    not say so."""
    found = BROKEN_GPU.search(message)
    if not found and not is_lost_rank(message) and not NO_FAILURE.search(message):
        found = BROKEN_NODE.search(message)
    return found[0].strip()[:200] if found else ""


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return this machine's name: Slurm's name of the node, or the host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def leave_note(notes: Path, rank: int, node: str, code: int, why: str = "", innocent: bool = False) -> None:
    """Tell the job script how a rank failed, atomically. The first note of a rank stands: the program knows more than
    what started it.

    Args:
        notes: directory of the notes of this start (CASCADE_NOTES).
        rank: the rank.
        node: the node to blame, by the scheduler's name of it.
        code: exit code.
        why: one sentence; empty if only the code is known.
        innocent: the node is not to blame.
    """
    path = notes / FAILED.replace("*", str(rank))
    if path.exists():
        return
    note = {"rank": rank, "node": node, "code": code, "time": time.time(), "why": why, "innocent": innocent}
    with replacing(path, durable=False) as file:
        file.write(json.dumps(note).encode())
