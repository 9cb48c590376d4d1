"""The processes of one machine download a file of an object store once between them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.storage.folder import PREFIX, share_copies
from training.processes.collectives import barrier, each, gather_bytes, together
from training.processes.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """This process among those of its machine: it is number `index` of `count`."""

    index: int = 0
    count: int = 1


@contextmanager
def shared_downloads(ranks: Ranks) -> Iterator[Share]:
    """Inside, `Folder.fetch` downloads a file once for all processes of a machine. Their copies lie in TMPDIR and are
    removed at the end. Collective, at both ends.

    Processes share when they see the same TMPDIR on one host: not those of containers that have one each.
    """
    if ranks.world_size == 1:
        yield Share()
        return
    homes = gather_bytes(each(_this_machine, ranks), ranks)
    mates = [rank for rank, home in enumerate(homes) if home == homes[ranks.rank]]
    first, token = ranks.rank == mates[0], together(lambda: secrets.token_hex(8), ranks)
    copies = Path(tempfile.gettempdir(), f"{PREFIX}{token}-{mates[0]}")
    each(lambda: copies.mkdir(mode=0o700) if first else None, ranks)
    share_copies(copies)
    try:
        yield Share(mates.index(ranks.rank), len(mates))
        barrier(ranks)  # the others may still read
    finally:
        share_copies(None)
        if first:
            shutil.rmtree(copies, ignore_errors=True)


def _this_machine() -> bytes:
    """Equal for processes that see the same directory of temporary files on one host; 32 bytes."""
    place = tempfile.gettempdir()
    status = os.stat(place)
    seen = socket.gethostname(), place, status.st_dev, status.st_ino
    return hashlib.sha256(repr(seen).encode()).digest()
