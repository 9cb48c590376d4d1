"""`cascade verify`: reads and decodes every sample as training would, and reports what is broken, where and why.

It never stops at damage of any kind: an unusable shard or sample is counted and gets a line in the quarantine file.
Nothing is written outside OUTPUT; memory is bounded by one shard's index and a few samples.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np

from data_pipeline.commands.verify_report import THUMBNAIL, Tally, write_page
from data_pipeline.common.errors import BadSample, CascadeError, NotAnArchive, check_exhausted
from data_pipeline.common.ordered import ordered
from data_pipeline.common.progress import progress
from data_pipeline.common.terminal import print_result
from data_pipeline.config import DataConfig
from data_pipeline.content import captions, images
from data_pipeline.content.captions import Caption
from data_pipeline.content.members import more_captions
from data_pipeline.reading.sequential import PartReader
from data_pipeline.shards.caption_files import CaptionFiles
from data_pipeline.shards.dataset import keep_rows, patience_of
from data_pipeline.shards.index import (
    IMAGE_EXTENSIONS,
    ShardIndex,
    cached_index_url,
    index_shard,
    index_url,
    read_index,
)
from data_pipeline.shards.mixture import entries_of
from data_pipeline.shards.tar import MAX_TEXT
from data_pipeline.storage import store
from data_pipeline.storage.atomic import naming, scratch
from data_pipeline.storage.retry import Patience

logger = logging.getLogger(__name__)

LOST = ("empty_shard", "truncated_shard", "corrupt_shard", "unsupported_member")
"""Damage that costs samples. Other problems (`bad_json`, `duplicate_key`, ...) cost none and are only warnings;
`count_mismatch` counts the missing samples as dropped."""


class VerifySettings(Protocol):
    """The settings of the command that are read here."""

    seed: int
    json: bool
    data: DataConfig
    stage: Any
    report: bool
    output: str


def main(config: VerifySettings) -> dict[str, Any]:
    """Run `cascade verify`; print the result as a line of JSON, or readable lines in a terminal.

    Returns:
        {"delivered": samples that training can use, "dropped": {reason: count}, "warnings": {problem: count},
        "captions.sources": {source: number of captions from it}, "shards": .., "quarantine": path, "report": path or
        None}

    Raises:
        DataError: no shards match, the store denies access, or `output` cannot be written.
        Exhausted: this machine has run out of memory or of open files.
    """
    patience = patience_of(config.data)
    entries = entries_of(config.data)
    tally = Tally()
    quarantine = store.join(config.output, "quarantine.jsonl")
    with _Quarantine(quarantine, tally) as broken, ThreadPoolExecutor(config.data.threads) as pool:
        for _, entry, data in progress(entries, desc="verify", unit="shard"):
            try:
                _verify_shard(entry, config, data, patience, pool, tally, broken)
            except Exception as error:  # damage, even unforeseen, affects only this shard
                check_exhausted(error)
                broken.add(entry.url, None, 0, *_shard_damage(error))
    page = store.join(config.output, "report.html") if config.report else None
    if page:
        write_page(page, config.data.shards, tally)
    hint = tally.hint()
    if hint:
        logger.warning("%s", hint)
    result = {**tally.result(), "shards": len(entries), "quarantine": quarantine, "report": page}
    if not config.json:
        print_result(result)
    return result


def _verify_shard(
    entry: store.Entry,
    config: VerifySettings,
    data: DataConfig,
    patience: Patience,
    pool: ThreadPoolExecutor,
    tally: Tally,
    broken: _Quarantine,
) -> None:
    index = index_shard(entry.url, patience, entry, data.members)
    rows, dropped = keep_rows(index, data.filter)
    _report_problems(index, tally, broken)
    tally.dropped.update(dropped)
    tally.describe(index)
    files = CaptionFiles(data.captions.files, {entry.url: index.digest}) if data.captions.files else None

    def work(sample: dict[str, Any]) -> Caption | BadSample:
        if files is not None:
            sample[captions.FROM_FILES] = files.of(entry.url, sample["__key__"])
        return _decode(sample, config, data)

    changed, good = _changed_rows(index, data, patience), []
    for row in rows.tolist():
        if row in changed:
            broken.add(entry.url, index.key(row), _offset(index, row), "checksum", "it differs from the stored index")
        else:
            good.append(row)
    for sample, outcome in ordered(
        pool, work, _read(index, entry, good, patience, data.captions.members), 4 * data.threads
    ):
        if isinstance(outcome, BadSample):
            if outcome.reason == "missing_caption":
                tally.layouts[outcome.reason][str(index.table["layout"][sample["__position__"]].as_py())] += 1
            broken.add(entry.url, sample["__key__"], sample["__offset__"], outcome.reason, outcome.detail)
        else:
            tally.deliver(sample, outcome, partial(_whole, sample, data))


def _report_problems(index: ShardIndex, tally: Tally, broken: _Quarantine) -> None:
    """Count and record what the index says is wrong with the shard. `keep_rows` counts its unusable samples."""
    for detail in index.meta["details"]:
        reason, _, words = str(detail).partition(" at byte ")
        offset, _, words = words.partition(": ")
        broken.write(index.url, None, int(offset), reason, words)
    problems = index.column("problem").to_pylist()
    row_problems = Counter(problem for problem in problems if problem)
    missing = max((index.meta["expected"] or 0) - len(index), 0)
    if missing:
        tally.dropped["count_mismatch"] += missing
    for reason, count in index.problems.items():
        count -= row_problems[reason] + (reason == "count_mismatch" and missing > 0)
        if count > 0:
            (tally.dropped if reason in LOST else tally.warnings)[reason] += count
    for problem in row_problems:
        tally.layouts[problem].update(index.layouts_of(problem))
    for row, problem in enumerate(problems):
        if problem:
            members = f"its members are {index.table['layout'][row].as_py()}"
            broken.write(index.url, index.key(row), _offset(index, row), problem, members)


def _decode(sample: dict[str, Any], config: VerifySettings, data: DataConfig) -> Caption | BadSample:
    """Return the caption that training would use, or why it would not use the sample."""
    try:
        if "__error__" in sample:
            raise sample["__error__"]
        stage = config.stage
        caption = captions.choose_caption(sample, data.captions, config.seed, sample["__position__"])
        images.training_pair(
            sample["__image__"],
            size=stage.image_size,
            low_res_size=stage.low_res_size,
            crop_size=stage.crop_size,
            crop=data.crop,
            flip=data.flip,
            seed=config.seed,
            position=sample["__position__"],
            margin=data.decode_margin,
            max_pixels=data.max_pixels,
            background=data.background,
            srgb=data.srgb,
            orientation=images.orientation_from_json(sample.get("json")),
        )
        return caption
    except BadSample as bad:
        return bad
    except Exception as error:
        return BadSample("decode_error", f"{type(error).__name__}: {error}")


def _whole(sample: dict[str, Any], data: DataConfig) -> np.ndarray:
    """Return the whole picture, upright, at about the size for the contact sheet."""
    orientation = images.orientation_from_json(sample.get("json"))
    return images.decode(sample["__image__"], THUMBNAIL, 1.0, data.max_pixels, data.background, orientation, data.srgb)


def _read(
    index: ShardIndex, entry: store.Entry, rows: list[int], patience: Patience, names: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the members that training uses, sample by sample in archive order, in one pass over the shard.

    Args:
        names: `data.captions.members`.
    """
    with PartReader(entry, index.compressed, patience) as reader:
        for row in rows:
            parts = {part.extension: part for part in index.parts(row)}
            picture = next(name for name in IMAGE_EXTENSIONS if name in parts)
            sample: dict[str, Any] = {
                "__key__": index.key(row),
                "__url__": index.url,
                "__offset__": _offset(index, row),
                "__position__": row,
                "__extension__": picture,
            }
            others = more_captions(parts, names)
            wanted = [parts[name] for name in (picture, "txt", "json", *others) if name in parts]
            wanted = [part for part in wanted if part.extension == picture or part.size <= MAX_TEXT]
            try:
                for part in sorted(wanted, key=lambda part: part.offset):
                    sample[part.extension] = reader.read(part)
                sample["__image__"] = sample[picture]
            except BadSample as bad:
                sample["__error__"] = bad
            yield sample


def _changed_rows(index: ShardIndex, data: DataConfig, patience: Patience) -> set[int]:
    """Return the rows whose bytes differ from the stored index, for example because of a flipped bit on disk."""
    places = index_url(index.url, data.members), cached_index_url(index.url, data.index_dir, data.members)
    stored = next(filter(None, (read_index(index.url, place, patience) for place in places)), None)
    if stored is None or stored.digest == index.digest or stored.meta["size"] != index.meta["size"]:
        return set()
    names = ("key", "offsets", "sizes")
    if any(not stored.column(name).equals(index.column(name)) for name in names):
        return set()  # a different shard of the same size, which training indexes again
    pairs = zip(stored.column("checksums").to_pylist(), index.column("checksums").to_pylist(), strict=True)
    return {row for row, (before, now) in enumerate(pairs) if before != now}


def _offset(index: ShardIndex, row: int) -> int:
    return min(part.offset for part in index.parts(row))


def _shard_damage(error: Exception) -> tuple[str, str]:
    """Return the reason and the detail of the loss of a whole shard."""
    if not isinstance(error, CascadeError):
        return "corrupt_shard", f"{type(error).__name__}: {error}"
    return "corrupt_shard" if isinstance(error, NotAnArchive) else "unreadable_shard", str(error)


class _Quarantine:
    """The file that lists what is broken, one JSON object per line."""

    def __init__(self, url: str, tally: Tally) -> None:
        self._url, self._tally = url, tally
        self._place = scratch() if store.is_remote(url) else url
        store.write_bytes(url, b"")
        self._file = tempfile.TemporaryFile() if store.is_remote(url) else open(store.local_path(url), "wb")  # noqa: SIM115

    def add(self, shard: str, key: str | None, offset: int, reason: str, detail: str) -> None:
        """Count and record one loss; the loss of a whole shard is also logged immediately."""
        self._tally.dropped[reason] += 1
        self.write(shard, key, offset, reason, detail)
        if key is None:
            logger.warning("%s", detail if shard in detail else f"{shard}: {detail}")

    def write(self, shard: str, key: str | None, offset: int, reason: str, detail: str) -> None:
        line = {"shard": shard, "key": key, "offset": offset, "reason": reason, "detail": detail[:500]}
        self._tally.example(line)
        with naming(self._place):
            self._file.write(json.dumps(line).encode() + b"\n")

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._place), self._file:  # closing it writes again what could not be flushed
            self._file.flush()
            if store.is_remote(self._url) and self._file.tell():
                store.upload(self._url, self._file)
