"""`cluster.preflight=true`: measures every device, link, store and clock of the allocation once before a training
starts, and reports slow nodes. This takes seconds, and can save hours in which all nodes wait for one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch

from data_pipeline.storage.store import read_bytes, remove_files, write_bytes
from training.config.experiment import Experiment
from training.processes.collectives import barrier, each, gather_json, together
from training.processes.endings import SlowNode
from training.processes.failures import node_name
from training.processes.ranks import Ranks
from training.run.directory import RunDir, replace_file

log = logging.getLogger("cascade")

SLOW_DEVICE, SLOW_LINK, SLOW_STORE = 1.3, 2.0, 4.0
"""Factor over the median's time from which something is slow; stores vary most."""
FAST_STORE_GB_S = 2.0
"""Rate up to which a slower node counts: above it, nodes read back from their own memory what they have just written,
which says nothing about the store."""
CLOCK_S = 5.0
"""Seconds by which a clock may be off; larger differences confuse logs, cache leases and the signatures of S3
requests."""
REPEATS = 5
"""Number of measurements, of which the best counts, since disturbances only slow them down."""
SIDE = {"cuda": 8192, "cpu": 768}
LINK_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
STORE_BYTES = 8 << 20
REPORT = "preflight.json"


@dataclass(frozen=True)
class Measured:
    """Measurements of one rank; None where it made none.

    Attributes:
        rank: the rank.
        node: name of its node.
        tflops: rate of a matrix product, TFLOP/s.
        clock_s: time of day at a common moment, seconds.
        all_reduce_gb_s: rate of an all-reduce over all ranks, GB/s of the tensor; None for a single rank.
        receive_gb_s: rate of receiving from the previous rank, GB/s; None for a single rank.
        write_gb_s, read_gb_s: rates of the checkpoint store, GB/s; measured by one rank per node.
    """

    rank: int
    node: str
    tflops: float
    clock_s: float
    all_reduce_gb_s: float | None = None
    receive_gb_s: float | None = None
    write_gb_s: float | None = None
    read_gb_s: float | None = None


@dataclass(frozen=True)
class Finding:
    """Something slow or wrong on a node; `excludes`: enough to exclude the node."""

    node: str
    sentence: str
    excludes: bool = True


def preflight(config: Experiment, ranks: Ranks, run: RunDir, node: str | None = None) -> list[Finding]:
    """Measure, write RUN_DIR/preflight.json, and log what is slow; return the findings. Collective.

    Args:
        node: this machine's name; None: Slurm's name of it, or the host name.

    Raises:
        SlowNode: on all ranks, with cluster.preflight_exclude, if a node is slow and others remain.
    """
    own = measure(ranks, run.checkpoints, node or node_name())
    found = [Measured(**entry) for entry in gather_json(asdict(own), ranks)]

    def report() -> dict[str, Any]:
        findings = judge_measured(found)
        bad = sorted({finding.node for finding in findings if finding.excludes})
        said = {"ranks": [asdict(one) for one in found], "findings": [asdict(one) for one in findings], "slow": bad}
        replace_file(run.path / REPORT, json.dumps({**said, "time": time.time()}, indent=1))
        log.info("preflight: %s", extremes_of(found))
        for finding in findings:
            log.warning("preflight: %s", finding.sentence)
        return {"findings": said["findings"], "slow": bad, "others": len({one.node for one in found} - {*bad})}

    answer = together(report, ranks)
    if answer["slow"] and answer["others"] and config.cluster.preflight_exclude:
        raise SlowNode(
            f"the preflight found {', '.join(answer['slow'])} slow ({run.path / REPORT}): the run exits with code 79 "
            f"so that the job can restart without it (cluster.preflight_exclude=true)"
        )
    return [Finding(**entry) for entry in answer["findings"]]


# ------------------------------------------------------------------------------------------------- measuring


def measure(ranks: Ranks, store: str, node: str) -> Measured:
    """Measure this rank. Collective."""
    kind = ranks.device.partition(":")[0]

    def alone() -> tuple[float, float | None, float | None]:
        speed = _tflops(ranks.device, SIDE[kind])
        return speed, *(_store_gb_s(store, ranks.rank) if ranks.local_rank == 0 else (None, None))

    tflops, written, read = each(alone, ranks)
    reduced = received = None
    if ranks.world_size > 1:  # gloo cannot send to itself
        tensor = torch.zeros(LINK_BYTES[kind] // 4, device=ranks.device)
        barrier(ranks)
        reduced = _gb_s(tensor, lambda: torch.distributed.all_reduce(tensor))
        received = _gb_s(tensor, lambda: _around(tensor, ranks))
        barrier(ranks)
    clock = time.time()
    return Measured(ranks.rank, node, tflops, clock, reduced, received, written, read)


def _best(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest call, after a warm-up call."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _tflops(device: str, side: int) -> float:
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32)
    return 2 * side**3 / _best(lambda: matrix @ matrix, device) / 1e12


def _gb_s(tensor: torch.Tensor, call: Callable[[], Any]) -> float:
    return tensor.numel() * tensor.element_size() / _best(call, str(tensor.device)) / 1e9


def _around(tensor: torch.Tensor, ranks: Ranks) -> None:
    """Send to the next rank and receive from the previous one, on every rank."""
    import torch.distributed as dist

    there = torch.empty_like(tensor)
    sends = dist.P2POp(dist.isend, tensor, (ranks.rank + 1) % ranks.world_size)
    receives = dist.P2POp(dist.irecv, there, (ranks.rank - 1) % ranks.world_size)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait(timedelta(seconds=60))


def _store_gb_s(store: str, rank: int) -> tuple[float, float]:
    """Return the GB/s of writing and of reading a small object where the checkpoints go."""
    name, data = f".preflight-{rank}-{os.getpid()}", os.urandom(STORE_BYTES)
    try:
        written_s = _best(lambda: write_bytes(f"{store}/{name}", data), "cpu")
        read_s = _best(lambda: read_bytes(f"{store}/{name}"), "cpu")
        return STORE_BYTES / written_s / 1e9, STORE_BYTES / read_s / 1e9
    finally:
        remove_files(store, [name])


# --------------------------------------------------------------------------------------------------- judging


def judge_measured(found: Sequence[Measured]) -> list[Finding]:
    """Return what stands out from the other ranks."""
    findings = []
    if len(found) > 1:
        findings += _slow(found, "tflops", "computes {value:.3g} TFLOP/s", SLOW_DEVICE)
        findings += _slow_links(found)
        store = (SLOW_STORE, FAST_STORE_GB_S)
        findings += _slow(found, "write_gb_s", "writes {value:.3g} GB/s to the checkpoint store", *store)
        findings += _slow(found, "read_gb_s", "reads {value:.3g} GB/s from the checkpoint store", *store)
    middle = statistics.median(one.clock_s for one in found)
    for one in {one.node: one for one in found}.values():
        if abs(one.clock_s - middle) > CLOCK_S:
            ahead = one.clock_s - middle
            said = f"the clock of {one.node} is {ahead:+.0f} s off the others; check its time synchronization"
            findings.append(Finding(one.node, said, excludes=False))
    return findings


def _slow(
    found: Sequence[Measured], name: str, what: str, factor: float, fast_enough: float = math.inf
) -> list[Finding]:
    """Find ranks whose rate times `factor` is below the usual one, and below `fast_enough`."""
    values = {one: value for one in found if (value := getattr(one, name)) is not None}
    if len(values) < 2:
        return []
    # of two, the slower one is compared with the faster
    usual = statistics.median(values.values()) if len(values) > 2 else max(values.values())
    return [
        Finding(
            one.node,
            f"rank {one.rank} on {one.node} {what.format(value=value)}, {usual / value:.1f} times slower than usual "
            f"here ({usual:.3g}): fix or exclude the node",
        )
        for one, value in values.items()
        if value * factor < min(usual, fast_enough)
    ]


def _slow_links(found: Sequence[Measured]) -> list[Finding]:
    """Find slow links: a node that is slow both to receive and to send is to blame itself; one slow direction is a
    link."""
    rates = [one.receive_gb_s for one in found]
    if len(found) < 3 or None in rates:
        return []
    usual = statistics.median(rate for rate in rates if rate is not None)
    slow = [rate is not None and rate * SLOW_LINK < usual for rate in rates]
    findings = []
    for place, one in enumerate(found):
        after = (place + 1) % len(found)
        if slow[place] and slow[after]:
            said = (
                f"rank {one.rank} on {one.node} sends and receives slowly ({rates[place]:.3g} GB/s, usual {usual:.3g})"
            )
            findings.append(Finding(one.node, f"{said}: check its network, or exclude the node"))
        elif slow[place] and not slow[place - 1]:
            ends = f"{found[place - 1].node} to {one.node}"
            said = f"the link from {ends} carries {rates[place]:.3g} GB/s, usual {usual:.3g}"
            findings.append(Finding(one.node, f"{said}: check the network", excludes=False))
    return findings


def extremes_of(found: Sequence[Measured]) -> str:
    """Return the slowest and the fastest of each measurement, in one line."""

    def lowest(name: str, unit: str) -> str:
        values = [value for one in found if (value := getattr(one, name)) is not None]
        return f"{min(values):.3g} to {max(values):.3g} {unit}" if values else ""

    parts = {
        "matrix products": lowest("tflops", "TFLOP/s"),
        "all-reduce": lowest("all_reduce_gb_s", "GB/s"),
        "neighbour to neighbour": lowest("receive_gb_s", "GB/s"),
        "store, written": lowest("write_gb_s", "GB/s"),
        "read": lowest("read_gb_s", "GB/s"),
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items() if value)
