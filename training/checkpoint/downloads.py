"""The processes of one machine download a file of an object store once between them."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.storage.folder import PREFIX, share_copies
from training.processes.distributed import Ranks, all_gather, each


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
    homes = all_gather(each(_this_machine, ranks), ranks)
    mates = [rank for rank, home in enumerate(homes) if home == homes[ranks.rank]]
    first = ranks.rank == mates[0]
    made = all_gather(each(lambda: tempfile.mkdtemp(prefix=PREFIX) if first else "", ranks), ranks)
    share_copies(Path(made[mates[0]]))
    try:
        yield Share(mates.index(ranks.rank), len(mates))
        all_gather(None, ranks)  # the others may still read
    finally:
        share_copies(None)
        if first:
            shutil.rmtree(made[mates[0]], ignore_errors=True)


def _this_machine() -> tuple[str, str, int, int]:
    """Equal for processes that see the same directory of temporary files on one host."""
    place = tempfile.gettempdir()
    status = os.stat(place)
    return socket.gethostname(), place, status.st_dev, status.st_ino
