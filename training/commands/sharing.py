"""What commands that make a file per shard have in common: they run in several processes, and refuse to continue an
output that other settings have made."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.common.errors import DataError
from data_pipeline.config import DataConfig
from data_pipeline.shards.index import ShardIndex, build_index, load_index
from data_pipeline.storage import store
from data_pipeline.storage.atomic import abandoned
from data_pipeline.storage.retry import Patience
from training.processes.launcher import launch
from training.processes.ranks import is_launched, process_count, ranks_of

_RESULTS = "CASCADE_SHARED_RESULTS"
"""Directory in which the processes of one command store their counts."""
T = TypeVar("T")


def in_processes(module: str, config: Any, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Run `work(config)` in the processes of a launcher or, without one, in `cluster.processes` processes of this
    machine; return the sum of their counts (in a launcher's process, its own).

    Args:
        module: the module whose `main(config)` calls this; the processes of this machine run it again.
    """
    if not is_launched() and process_count(config.cluster) > 1:
        with tempfile.TemporaryDirectory(prefix="cascade-shared-") as folder:
            os.environ[_RESULTS] = folder
            try:
                launch(module, config)
            finally:
                del os.environ[_RESULTS]
            total: Counter[str] = Counter()
            for file in Path(folder).iterdir():
                total.update(json.loads(file.read_text()))
            return dict(total)
    done = work(config)
    if _RESULTS in os.environ:
        Path(os.environ[_RESULTS], str(ranks_of()[0])).write_text(json.dumps(done))
    return done


def refuse_equal_names(shards: Sequence[str], places: Sequence[str], kind: str) -> None:
    """Raise DataError if two shards (URLs) would write the same file.

    Args:
        places: the file that is made of each shard.
        kind: what such a file is called in the message.
    """
    writers: dict[str, str] = {}
    for shard, place in zip(shards, places, strict=True):
        if place in writers:
            raise DataError(
                f"{shard} and {writers[place]} would write the same {kind}; run the command for each, with its own "
                "output"
            )
        writers[place] = shard


def index_of(entry: store.Entry, data: DataConfig, patience: Patience, licences: bool = False) -> ShardIndex:
    """Return the stored index of a shard or, if it has no valid one, a new one, which is stored.

    Args:
        licences: an index without the licences of the pictures is not valid.
    """
    index = load_index(entry.url, data.index_dir, entry, patience, data.members, licences)
    return build_index(entry, data.index_dir, patience, data.members) if index is None else index


def in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def refuse_other(place: str, differing: Sequence[str]) -> None:
    """Raise DataError for an existing output that other settings have made; `differing` says in which respects."""
    if differing:
        raise DataError(
            f"{place}: it was made with a different {' and '.join(differing)}; remove it or choose another output"
        )


def first_and_last(places: Sequence[str]) -> list[int]:
    """Return the numbers of the first and last of these files that exist, of whichever process, from one listing of
    each folder.

    If these were made with the settings of this run, it may go on; otherwise a process whose files are all missing
    would mix two kinds in one output.
    """
    there: dict[str, set[str]] = {}
    found = []
    for number, place in enumerate(places):
        folder = store.parent(place)
        if folder not in there:
            there[folder] = set(store.list_dir(folder))
        if store.basename(place) in there[folder]:
            found.append(number)
    return found[:1] + found[1:][-1:]


def remove_leftovers(places: Sequence[str]) -> None:
    """Remove what killed processes have left on disk of these files, which no other process writes."""
    mine = [place for place in places if not store.is_remote(place)]
    for folder in {store.parent(place) for place in mine}:
        own = {store.basename(place) for place in mine if store.parent(place) == folder}
        store.remove_files(folder, [name for name in store.list_dir(folder) if abandoned(name) in own])
