"""`cascade index`: walks every shard once, checks it and stores its index. Shards with a valid index are skipped."""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from data_pipeline.common.errors import CascadeError, DataError, NotAnArchive, check_exhausted, dropped_remark
from data_pipeline.common.machine import usable_cores
from data_pipeline.common.progress import progress
from data_pipeline.common.terminal import print_result
from data_pipeline.config import DataConfig
from data_pipeline.shards.copies import copies
from data_pipeline.shards.dataset import patience_of
from data_pipeline.shards.filters import keep_rows, licences_of, score_advice
from data_pipeline.shards.index import ShardIndex, build_index, count_licences, load_index
from data_pipeline.shards.mixture import entries_of
from data_pipeline.storage import store
from data_pipeline.storage.retry import Patience

logger = logging.getLogger(__name__)

_WORTH_PROCESSES = 1 << 30
"""Bytes to walk from which processes are faster than threads (a process takes about a second to start)."""

_Shard = tuple[str, store.Entry, DataConfig]
"""Data set, shard, and the settings that apply to it."""
Result = tuple[int, dict[str, int], list[str], dict[str, int], dict[str, int]]
"""Samples; problems by reason; their details; samples dropped by the filters, by reason; remaining ones by licence."""


class IndexSettings(Protocol):
    """The settings of the command that are read here."""

    json: bool
    data: DataConfig


def main(config: IndexSettings) -> dict[str, Any]:
    """Run `cascade index`; print the result as a line of JSON, or readable lines in a terminal.

    Returns:
        {"shards": .., "samples": .., "problems": {reason: count}, "built": shards walked now, "remaining": samples that
        pass data.filter, "dropped": {reason: count}, "licences": {licence: remaining samples}}; for a mixture also
        "datasets": {name: {"shards": .., "samples": .., "remaining": ..}} and "copies", see
        `data_pipeline.shards.copies`.

    Raises:
        DataError: no shards match, or the store denies access.
        Exhausted: this machine has run out of memory or of open files.
        StoreError: the store kept failing until the deadline. Finished indexes are kept; running again continues.
    """
    patience = patience_of(config.data)
    entries = entries_of(config.data)
    problems: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    samples = built = 0
    rebuild = getattr(config, "rebuild", False)  # other commands that index do not have this setting
    sets = {name: {"shards": 0, "samples": 0, "remaining": 0} for name, _, _ in entries if name}
    for (name, entry, _), fresh, (count, found, details, out, allowed) in _index_all(entries, patience, rebuild):
        samples += count
        if name:
            more = {"shards": 1, "samples": count, "remaining": count - sum(out.values())}
            sets[name] = {key: sets[name][key] + value for key, value in more.items()}
        built += fresh
        problems.update(found)
        dropped.update(out)
        licences.update(allowed)
        for detail in details:
            logger.warning("%s: %s", entry.url, detail)
    result = {
        "shards": len(entries),
        "samples": samples,
        "problems": dict(sorted(problems.items())),
        "built": built,
        "remaining": samples - dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "licences": dict(licences.most_common()),
    }
    if remark := dropped_remark(dropped, samples, score_advice):
        logger.warning("%s", remark)
    if sets:
        result |= {"datasets": sets, "copies": _copies(entries, samples, patience)}
    if not config.json:
        print_result(result)
    return result


def _copies(entries: list[_Shard], samples: int, patience: Patience) -> list[dict[str, Any]]:
    """Find what the data sets of a mixture have in common, and warn of common pictures."""

    def indexes(wanted: str) -> Iterator[ShardIndex]:
        for name, entry, config in entries:
            index = load_index(entry.url, config.index_dir, entry, patience, config.members) if name == wanted else None
            if index is not None:
                yield index

    found = copies({name: indexes(name) for name, _, _ in entries}, samples)
    for pair in found:
        if pair["same_picture"]:
            logger.warning(
                "data sets %s and %s share %d pictures (for example %s), so they are trained on twice as often",
                *pair["datasets"],
                pair["same_picture"],
                pair["example"],
            )
    return found


def _index_all(entries: list[_Shard], patience: Patience, rebuild: bool) -> Iterator[tuple[_Shard, bool, Result]]:
    """Yield (shard, whether it was walked now, result) for every shard, with a progress bar."""
    todo: list[_Shard] = []
    known = (lambda _: None) if rebuild else _known(patience)
    with ThreadPoolExecutor(16) as pool, progress(total=len(entries), desc="index", unit="shard") as bar:
        for entry, result in zip(entries, pool.map(known, entries), strict=True):
            if result is None:
                todo.append(entry)
                continue
            bar.update()
            yield entry, False, result
        if not todo:
            return
        with _workers(todo) as executor:
            jobs = {executor.submit(_build, shard[1], shard[2], patience, rebuild): shard for shard in todo}
            try:
                for job in as_completed(jobs):
                    bar.update()
                    yield jobs[job], True, job.result()
            finally:
                executor.shutdown(wait=True, cancel_futures=True)


def _known(patience: Patience) -> Callable[[_Shard], Result | None]:
    def load(shard: _Shard) -> Result | None:
        _, entry, config = shard
        index = load_index(entry.url, config.index_dir, entry, patience, config.members, licences=True)
        return None if index is None else _result(index, config)

    return load


def _build(entry: store.Entry, config: DataConfig, patience: Patience, rebuild: bool) -> Result:
    """Walk one shard and store its index; a shard that is not an archive or cannot be opened counts as a problem."""
    try:
        if not store.is_remote(entry.url):
            store.open_stream(entry.url).close()
    except DataError as error:
        check_exhausted(error)
        return 0, {"unreadable_shard": 1}, [str(error).removeprefix(f"{entry.url}: ")], {}, {}
    try:
        index = build_index(entry, config.index_dir, patience, config.members, rebuild)
    except NotAnArchive as error:
        return 0, {"not_a_tar": 1}, [str(error).removeprefix(f"{entry.url}: ")], {}, {}
    except CascadeError:
        raise
    except Exception as error:  # unforeseen damage affects only this shard
        check_exhausted(error)
        return 0, {"corrupt_shard": 1}, [f"{type(error).__name__}: {error}"], {}, {}
    return _result(index, config)


def _result(index: ShardIndex, config: DataConfig) -> Result:
    rows, dropped = keep_rows(index, config.filter)
    licences = count_licences(licences_of(index)[rows].tolist())
    return len(index), index.problems, index.meta["details"], dict(dropped), licences


def _workers(todo: list[_Shard]) -> Executor:
    count = min(len(todo), usable_cores(), 32)
    if count > 1 and sum(entry.size for _, entry, _ in todo) >= _WORTH_PROCESSES:
        return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    return ThreadPoolExecutor(max(count, 2))
