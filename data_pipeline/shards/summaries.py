"""What a run keeps in memory of every shard, and a file of it, so that a start does not open 100,000 indexes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.common.errors import CascadeError
from data_pipeline.config import FilterConfig, MembersConfig
from data_pipeline.shards.filters import FILTERS_VERSION, keep_rows, licences_of
from data_pipeline.shards.index import VERSION, ShardIndex, count_licences, default_index_dir
from data_pipeline.storage import store
from data_pipeline.storage.retry import DEFAULT, Patience

logger = logging.getLogger(__name__)

_NONE: dict[str, int] = {}
_WORTH_A_FILE = 64
"""Shards from which opening every index takes noticeable time."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What is kept of every shard in memory."""

    entry: store.Entry
    place: str
    """Where its index lies."""
    digest: str
    samples: int
    kept: int
    dropped: dict[str, int]
    problems: dict[str, int]
    compressed: bool
    licences: dict[str, int] = field(default_factory=dict)
    """Licence -> samples that take part; empty where an earlier version made the index."""


def summarize(index: ShardIndex, entry: store.Entry, place: str, rules: FilterConfig) -> Summary:
    """What a run keeps in memory of a shard."""
    rows, dropped = keep_rows(index, rules)
    return Summary(
        entry,
        place,
        index.digest,
        len(index),
        len(rows),
        dict(dropped) or _NONE,
        index.problems or _NONE,
        index.compressed,
        count_licences(licences_of(index)[rows].tolist()) if "licences" in index.meta else _NONE,
    )


def summarize_meta(meta: dict[str, Any], entry: store.Entry, place: str) -> Summary:
    """The same where no filter asks for the rows."""
    unusable, samples = meta["unusable"], meta["samples"]
    kept = samples - sum(unusable.values())
    return Summary(
        entry,
        place,
        meta["digest"],
        samples,
        kept,
        unusable or _NONE,
        meta["problems"] or _NONE,
        meta["compressed"],
        meta.get("licences", _NONE),
    )


def summary_url(
    entries: Iterable[store.Entry], rules: FilterConfig, index_dir: str | None, names: MembersConfig
) -> str:
    """Where the summaries of shards in these directories under these filters lie."""
    places = sorted({store.parent(entry.url) for entry in entries})
    made_by = [VERSION, FILTERS_VERSION, places, asdict(rules), names.tag]
    name = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=8).hexdigest()
    return store.join(index_dir or default_index_dir(), f"summary-{name}.parquet")


def read_summaries(url: str, entries: list[store.Entry], patience: Patience = DEFAULT) -> dict[str, Summary]:
    """Stored summaries of those shards that are still what they were, by shard URL."""
    if len(entries) < _WORTH_A_FILE:
        return {}
    try:
        content = io.BytesIO(store.read_bytes(url, patience))
        columns = pq.ParquetFile(content, page_checksum_verification=True).read().to_pydict()
        by_url = {shard: number for number, shard in enumerate(columns["url"])}
        found = {}
        for entry in entries:
            number = by_url.get(entry.url)
            if number is None or (columns["etag"][number], columns["size"][number]) != (entry.etag, entry.size):
                continue
            found[entry.url] = Summary(
                entry,
                columns["place"][number],
                columns["digest"][number],
                columns["samples"][number],
                columns["kept"][number],
                json.loads(columns["dropped"][number]) or _NONE,
                json.loads(columns["problems"][number]) or _NONE,
                columns["compressed"][number],
                json.loads(columns["licences"][number]) or _NONE,
            )
        return found
    except (CascadeError, pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return {}


def write_summaries(url: str, summaries: list[Summary], patience: Patience = DEFAULT) -> None:
    """Stores summaries for the next start; where that cannot be done, the next start only takes longer."""
    if len(summaries) < _WORTH_A_FILE:
        return
    rows = [
        {
            "url": s.entry.url,
            "size": s.entry.size,
            "etag": s.entry.etag,
            "place": s.place,
            "digest": s.digest,
            "samples": s.samples,
            "kept": s.kept,
            "dropped": json.dumps(s.dropped),
            "problems": json.dumps(s.problems),
            "compressed": s.compressed,
            "licences": json.dumps(s.licences),
        }
        for s in summaries
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd", write_page_checksum=True)
    try:
        store.write_bytes(url, out.getbuffer(), patience)
    except CascadeError as error:
        logger.info("%s: the next start will read every index again", error)
