"""What a run keeps in memory of every shard, and a file of these summaries: saves opening 100,000 indexes at start."""

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
"""Number of shards from which opening every index takes noticeable time."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run keeps in memory of a shard."""

    entry: store.Entry
    place: str
    """URL of its index."""
    digest: str
    samples: int
    kept: int
    dropped: dict[str, int]
    problems: dict[str, int]
    compressed: bool
    licences: dict[str, int] = field(default_factory=dict)
    """Licence -> number of used samples; empty for an index of an earlier version."""


def summarize(index: ShardIndex, entry: store.Entry, place: str, rules: FilterConfig) -> Summary:
    """Summarize a shard under the given filters; `place` is the URL of its index."""
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
    """Summarize a shard without filters from the facts in its index, without reading the rows."""
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
    """Return where the summaries of the shards in these directories, under these filters, are stored."""
    places = sorted({store.parent(entry.url) for entry in entries})
    made_by = [VERSION, FILTERS_VERSION, places, asdict(rules), names.tag]
    name = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=8).hexdigest()
    return store.join(index_dir or default_index_dir(), f"summary-{name}.parquet")


def read_summaries(url: str, entries: list[store.Entry], patience: Patience = DEFAULT) -> dict[str, Summary]:
    """Read the stored summaries of shards that have not changed, by shard URL; empty if there are none."""
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
    """Store summaries for the next start. A failure is only logged: the next start just takes longer."""
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
