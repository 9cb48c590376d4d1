"""Shared downloads: the processes of one machine download each file of an object store only once."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from data_pipeline.storage.folder import TemporaryCopies, copies_place, share_copies
from training.processes.collectives import barrier, each, gather_bytes, together
from training.processes.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """This process is number `index` (from 0) of the `count` processes on its machine."""

    index: int = 0
    count: int = 1


@contextmanager
def shared_downloads(ranks: Ranks) -> Iterator[Share]:
    """Inside this context, `Folder.fetch` downloads a file once for all processes of a machine. The copies are in
    TMPDIR and are removed at the end. Collective on entry and on exit.

    Processes share copies if they see the same TMPDIR on one host, so containers with their own TMPDIR do not.
    """
    if ranks.world_size == 1:
        yield Share()
        return
    homes = gather_bytes(each(_this_machine, ranks), ranks)
    mates = [rank for rank, home in enumerate(homes) if home == homes[ranks.rank]]
    first, token = ranks.rank == mates[0], together(lambda: secrets.token_hex(8), ranks)
    name = f"{token}-{mates[0]}"
    owned = each(lambda: TemporaryCopies(name) if first else None, ranks)
    share_copies(copies_place(name))
    try:
        yield Share(mates.index(ranks.rank), len(mates))
        barrier(ranks)  # the others may still be reading
    finally:
        share_copies(None)
        if owned is not None:
            owned.close()


def _this_machine() -> bytes:
    """Return 32 bytes that are equal for processes that see the same temporary directory on one host."""
    place = tempfile.gettempdir()
    status = os.stat(place)
    seen = socket.gethostname(), place, status.st_dev, status.st_ino
    return hashlib.sha256(repr(seen).encode()).digest()
