"""How the processes of a run find each other, and what they check before forming a process group.

Rank 0 opens a key-value store, every rank stores a card there (its node and device), and rank 0 waits for all cards, so
that missing ranks can be named. A wrong device is an error on all ranks: otherwise one rank would choose gloo while the
others wait in NCCL.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from data_pipeline.common.errors import ConfigError
from training.config.experiment import ClusterConfig
from training.processes.devices import Gpu, no_gpu, see_gpu
from training.processes.endings import DeviceLost, RankLost
from training.processes.failures import node_name
from training.processes.ranks import Ranks, named

POLL_S = 0.1
READ_S = 10.0
"""Seconds that rank 0 waits for the other ranks to read the cards."""
FILES, FILES_PER_RANK = 256, 8
"""Open files that a process needs: a constant, and a number per process of the run (measured on rank 0: 31 + 6 per
process, most of them connections of three gloo groups and the store; shards and checkpoints need some more)."""
THREADS = 24
"""Threads that a process must be able to start: a training on a CPU core had 16, and its decoding process 8. gloo hangs
if it cannot start its own."""


@dataclass(frozen=True)
class Card:
    """What a rank reports about itself."""

    rank: int
    node: str
    device: str
    """`cpu`, or `cuda:I` with this process's own index."""
    gpu: str = ""
    """UUID of the GPU; empty without one."""
    why: str = ""
    """Why it has no GPU."""
    visible: int = 0
    """Number of GPUs that torch sees there."""
    given: int = 0
    """Number of GPUs that the scheduler gave it; 0: unknown."""
    files: int = 1 << 30
    """Number of files that it may open."""
    no_interface: str = ""
    """A name in GLOO_SOCKET_IFNAME that no network interface of its node has."""


def own_card(ranks: Ranks) -> Card:
    """Return this process's card, with the GPU of its local rank if torch sees one; raises its limit of open files to
    what the run needs, as far as allowed."""
    try_threads(THREADS)
    files = allow_files(needed_files(ranks.world_size))
    wrong = missing_interface(os.environ.get("GLOO_SOCKET_IFNAME", ""))
    gpu = see_gpu(ranks.local_rank)
    return Card(
        ranks.rank,
        node_name(),
        gpu.device,
        gpu.uuid,
        gpu.why,
        visible=gpu.visible,
        given=gpu.given,
        files=files,
        no_interface=wrong,
    )


def missing_interface(names: str) -> str:
    """Return the first of comma-separated names that no network interface of this machine has; empty if all exist."""
    known = {name for _, name in socket.if_nameindex()}
    return next((name for name in names.split(",") if name and name not in known), "")


def check_cards(cards: Sequence[Card], cluster: ClusterConfig) -> None:
    """Check that all ranks have the requested kind of device, that no two share a GPU, that all may open enough
    files, and that the network interface they are told to use exists.

    Raises:
        DeviceLost: a node has lost a GPU; the message names the rank and the node.
        ConfigError: the settings ask for something else.
    """
    without = next((card for card in cards if not card.gpu), None)
    having = next((card for card in cards if card.gpu), None)
    if without is not None and (having is not None or (cluster.gpus and cluster.kind != "local")):
        reason = f"rank {having.rank} on {having.node} has one" if having else "cluster.gpus=true asks for one"
        seen_there = Gpu(why=without.why, visible=without.visible, given=without.given)
        raise no_gpu(without.rank, without.node, seen_there, reason, having is not None, shared=True)
    needed = needed_files(len(cards))
    for card in cards:
        if card.files < needed:
            raise ConfigError(
                f"rank {card.rank} on {card.node} may open {card.files} files (ulimit -Hn), but each process of this "
                f"run needs {needed}: raise the hard limit there"
            )
        if card.no_interface:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={card.no_interface}: {card.node} (rank {card.rank}) has no network interface of "
                f"this name (see ip addr); unset the variable, or set cluster.interface"
            )
    seen: dict[str, Card] = {}
    for card in cards:
        other = seen.setdefault(card.gpu, card) if card.gpu else card
        if other is not card and card.visible < card.given:
            raise DeviceLost(
                f"ranks {other.rank} and {card.rank} would share one GPU on {card.node}, where torch sees "
                f"{card.visible} of the {card.given} GPUs in CUDA_VISIBLE_DEVICES",
                ": fix or exclude the node",
                card.node,
                shared=True,
            )
        if other is not card:
            raise ConfigError(
                f"ranks {other.rank} and {card.rank} share one GPU on {card.node}: start at most one process per GPU "
                f"(cluster.processes)"
            )


def needed_files(world_size: int) -> int:
    """Return the number of open files that each of `world_size` processes needs."""
    return FILES + FILES_PER_RANK * world_size


def allow_files(needed: int) -> int:
    """Raise this process's soft limit of open files to `needed`, or to its hard limit; return the usable limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def try_threads(count: int) -> None:
    """Start this many threads at once, and end them. Raises RuntimeError if the limits of this user or container do not
    allow as many."""
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    finally:
        done.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def open_store(ranks: Ranks, timeout_s: float) -> Any:
    """Open the key-value store at MASTER_ADDR:MASTER_PORT, which rank 0 (or torchrun) hosts.

    Raises:
        RankLost: rank 0 cannot listen on this port.
        RuntimeError: no response within `timeout_s` seconds.
    """
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(host, port, is_master=holds, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        if not holds:
            raise
        raise RankLost(
            f"rank 0 on {socket.gethostname()} cannot open MASTER_PORT={port}, where the ranks meet (another program "
            f"may use it): {str(error).splitlines()[0][:200]}; start again with another port"
        ) from error


def meet(ranks: Ranks, card: Card, timeout_s: float) -> tuple[Any, list[Card]]:
    """Wait for all ranks; return the store and all cards, in rank order.

    Raises:
        RankLost: some ranks did not arrive within `timeout_s` seconds; rank 0 names them.
        RuntimeError: on other ranks, if rank 0 is gone or does not respond.
    """
    store = open_store(ranks, timeout_s)
    store.set(f"card/{ranks.rank}", json.dumps(asdict(card)))
    if ranks.is_main:
        _call_the_roll(store, ranks.world_size, timeout_s)
        cards = [store.get(f"card/{rank}").decode() for rank in range(ranks.world_size)]
        store.set("cards", f"[{','.join(cards)}]")
    everyone = [Card(**entry) for entry in json.loads(store.get("cards"))]
    # The store ends with rank 0, so if the cards make every rank stop, the others must have read them first.
    if not ranks.is_main and store.add("read", 1) == ranks.world_size - 1:
        store.set("read by all", "")
    if ranks.is_main and ranks.world_size > 1:
        with suppress(RuntimeError):  # if a rank has died meanwhile, the time-outs of the group detect it
            store.wait(["read by all"], timedelta(seconds=READ_S))
    return store, everyone


def _call_the_roll(store: Any, world_size: int, timeout_s: float) -> None:
    missing, deadline = list(range(1, world_size)), time.monotonic() + timeout_s
    while missing := [rank for rank in missing if not store.check([f"card/{rank}"])]:
        if time.monotonic() > deadline:
            raise RankLost(
                f"{named(missing)} did not arrive within {timeout_s:.0f} s (train.timeout_first_s; {meeting_place()}): "
                f"a rank that is missing did not start, hangs, or cannot reach this node; its output says more"
            )
        time.sleep(POLL_S)


def meeting_place() -> str:
    """Describe where the ranks meet, for a message."""
    return f"meeting rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
