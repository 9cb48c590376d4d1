"""The index of one shard: where each member of each sample lies, and what filters ask about it.

One Parquet file per shard, one row per sample in archive order. Columns: `key`, `key_hash` (blake2b-64), `layout`
(member extensions joined by "/"), `offsets`, `sizes` (bytes) and `checksums` (xxh3-64) per member, `width`, `height`
(pixels, as stored), `caption_length` (characters of the .txt, else of json["caption"]), `aesthetic`, `watermark`,
`unsafe`, `similarity`, `licence` (from the .json), `problem` (why the sample can never be trained on, else null).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.config import MembersConfig
from data_pipeline.shards.samples import IMAGE_EXTENSIONS, SCORES, UNKNOWN, image_size, key_hash, rows_of
from data_pipeline.shards.tar import Problem, walk
from data_pipeline.storage import store
from data_pipeline.storage.etag import EtagCheck
from data_pipeline.storage.retry import DEFAULT, Patience

__all__ = [
    "IMAGE_EXTENSIONS",
    "Part",
    "ShardIndex",
    "build_index",
    "cached_index_url",
    "image_size",
    "index_shard",
    "index_url",
    "key_hash",
    "load_index",
    "load_meta",
    "parse_index",
    "read_index",
    "save_index",
    "store_index",
]

logger = logging.getLogger(__name__)

_DEFAULT_NAMES = MembersConfig()
VERSION = 5
_WITHOUT_LICENCES = 4
_FEWER_LAYOUTS = 3
"""Versions that are read as well: the older one knew fewer layouts, so it counts where every sample could be used."""
_MOST_LICENCES = 50
OTHER_LICENCES = "other"
"""What the rarer licences of a shard count as in its summary."""
_MOST_DETAILS, _DETAILS_OF_A_KIND = 20, 5
_MEMBER_BYTES = 3 * 8
_PIECE = 1 << 22
_READS = 3
"""Times that a remote shard is walked until two reads agree."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("key_hash", pa.uint64()),
        ("layout", pa.dictionary(pa.int32(), pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
        ("checksums", pa.list_(pa.uint64())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_length", pa.int32()),
        *((name, pa.float32()) for name in SCORES),
        ("licence", pa.dictionary(pa.int32(), pa.string())),
        ("problem", pa.dictionary(pa.int32(), pa.string())),
    ]
)


class Part(NamedTuple):
    """Where one member of a sample lies."""

    extension: str
    offset: int
    size: int
    checksum: int


class ShardIndex:
    """The index of one shard, in memory (about 150 bytes per sample)."""

    def __init__(self, url: str, table: pa.Table, meta: dict[str, Any]) -> None:
        self.url, self.table, self.meta = url, table, meta
        self.place = ""
        """Where it is stored, once it is."""

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def digest(self) -> str:
        """Hash of the keys, sizes and contents: the same wherever the shard lies."""
        return str(self.meta["digest"])

    @property
    def problems(self) -> dict[str, int]:
        """Reason -> how many samples it makes unusable."""
        return dict(self.meta["problems"])

    @property
    def compressed(self) -> bool:
        """Whether the shard is gzip, so that it can only be read from its beginning."""
        return bool(self.meta["compressed"])

    @property
    def etag(self) -> str | None:
        """What reads over s3:// insist on."""
        return self.meta["etag"] if store.is_remote(self.url) else None

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the table, a value per sample."""
        return self.table.column(name)

    def layouts_of(self, problem: str) -> Counter[str]:
        """How often each layout occurs among the samples with this problem."""
        rows = zip(self.column("problem").to_pylist(), self.column("layout").to_pylist(), strict=True)
        return Counter(layout for found, layout in rows if found == problem)

    @cached_property
    def _members(self) -> tuple[memoryview, memoryview]:
        """First part of each row; and of every part, side by side, its offset, size and checksum, uint64 (parts, 3)."""
        offsets = self.table.column("offsets").combine_chunks()
        flat = [self.table.column(name).combine_chunks().flatten().to_numpy() for name in ("sizes", "checksums")]
        columns = [array.astype(np.uint64, copy=False) for array in (offsets.flatten().to_numpy(), *flat)]
        return offsets.offsets.to_numpy().data, np.stack(columns, axis=1).data

    @cached_property
    def _layouts(self) -> tuple[list[tuple[list[str], Callable[..., tuple[int, ...]]]], memoryview]:
        """The extensions of each layout with what unpacks as many members, and the layout of each row."""
        column = self.table.column("layout").combine_chunks()
        names = [str(layout).split("/") for layout in column.dictionary.to_pylist()]
        layouts = [(extensions, struct.Struct(f"{3 * len(extensions)}Q").unpack_from) for extensions in names]
        return layouts, column.indices.to_numpy(zero_copy_only=False).data

    @cached_property
    def _keys(self) -> tuple[memoryview, bytes]:
        column = self.table.column("key").combine_chunks()
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int32)[column.offset :] if offsets else np.zeros(1, np.int32)
        return ends.data, data.to_pybytes() if data else b""

    def key(self, row: int) -> str:
        """The key of sample `row`."""
        ends, data = self._keys
        return data[ends[row] : ends[row + 1]].decode()

    def parts(self, row: int) -> list[Part]:
        """The members of sample `row` (a row of the file, before filters), in archive order."""
        return [Part(*part) for part in self.places(row)]

    def places(self, row: int) -> list[tuple[str, int, int, int]]:
        """The same as plain tuples, for the hot path."""
        starts, members = self._members
        layouts, which = self._layouts
        extensions, unpack = layouts[which[row]]
        numbers = iter(unpack(members, _MEMBER_BYTES * starts[row]))
        return list(zip(extensions, numbers, numbers, numbers))  # noqa: B905 (they are one iterator)

    def picture_checksums(self) -> np.ndarray:
        """The checksum of each sample's picture, (n,) uint64; 0 where it has none."""
        found = np.zeros(len(self), np.uint64)
        if not len(self):
            return found
        starts, members = self._members
        layouts, which = self._layouts
        checksums = np.asarray(members)[:, 2]
        for number, (extensions, _) in enumerate(layouts):
            place = next((place for place, name in enumerate(extensions) if name in IMAGE_EXTENSIONS), None)
            rows = np.flatnonzero(np.asarray(which) == number)
            if place is not None:
                found[rows] = checksums[np.asarray(starts)[rows] + place]
        return found

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """First byte and end byte of every sample, (n,) int64 each."""
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        starts, members = self._members
        offsets, sizes = np.asarray(members)[:, :2].astype(np.int64).T
        rows = np.asarray(starts)[:-1]
        return np.minimum.reduceat(offsets, rows), np.maximum.reduceat(offsets + sizes, rows)


def index_url(shard: str, names: MembersConfig = _DEFAULT_NAMES) -> str:
    """Where the index of a shard lies: `00000.tar` -> `00000.index.parquet` beside it; under `data.members`, which
    decides what an index says, it has a name of its own."""
    tag = f".{names.tag}" if names.tag else ""
    return f"{_stem(shard)}{tag}.index.parquet"


def _stem(shard: str) -> str:
    return re.sub(r"(\.tar|\.tar\.gz|\.tgz)$", "", shard)


def cached_index_url(shard: str, index_dir: str | None, names: MembersConfig = _DEFAULT_NAMES) -> str:
    """The same for shards whose own directory cannot be written."""
    where = store.parent(shard) if store.is_remote(shard) else os.path.abspath(store.parent(shard))
    folder = f"{store.basename(where)}-{hashlib.blake2b(where.encode(), digest_size=6).hexdigest()}"
    return store.join(store.join(index_dir or default_index_dir(), folder), store.basename(index_url(shard, names)))


def default_index_dir() -> str:
    """Where indexes are cached when they cannot lie beside their shards."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "cascade", "index")


def index_shard(
    url: str, patience: Patience = DEFAULT, entry: store.Entry | None = None, names: MembersConfig = _DEFAULT_NAMES
) -> ShardIndex:
    """Walks a shard once and describes every sample of it; nothing is written.

    Members may come in any order and need not be adjacent. The key is the name up to the first dot after the last
    slash, as in webdataset; where names have dots of their own (`photo.v2.jpg`, `photo.v2.txt`) up to the last dot, see
    `members.split_samples`.

    What came over a network is believed when its MD5s make up the object's ETag, or when a second read is the same.

    Args:
        names: `data.members`.

    Raises:
        DataError: not a tar archive, missing, denied, or every read brings other bytes.
    """
    entry = entry or store.describe([url], patience)[0]
    for _ in range(_READS):
        index, confirmed = _walk(entry, patience, names)
        if confirmed or index.meta["content"] == _content(entry, patience):
            return index
        logger.warning("%s: a second read returned different bytes; indexing it again", url)
    raise DataError(f"{url}: {_READS} times, two reads brought different bytes: the network or the store damages them")


def _walk(entry: store.Entry, patience: Patience, names: MembersConfig) -> tuple[ShardIndex, bool]:
    """The index of a shard, and whether its ETag confirms what was read (of a local file nothing is doubted)."""
    url, remote = entry.url, store.is_remote(entry.url)
    problems: list[Problem] = []
    with store.open_stream(url, etag=entry.etag if remote else None, patience=patience) as stream:
        probe = _Probe(stream, EtagCheck(entry.etag, entry.size) if remote else None)
        samples = rows_of(walk(probe, problems, name=url), problems, names)
        probe.drain()
    expected = expected_count(url, patience)
    if expected is not None and expected != len(samples):
        problems.append(Problem("count_mismatch", 0, f"{len(samples)} samples where {expected} were written"))
    counts = Counter(problem.reason for problem in problems)
    unusable = Counter(row["problem"] for row in samples if row["problem"])
    counts.update(unusable)
    table = pa.Table.from_pylist(samples, schema=SCHEMA)
    meta = {
        "version": VERSION,
        "shard": store.basename(url),
        "size": entry.size,
        "etag": entry.etag,
        "samples": len(samples),
        "expected": expected,
        "compressed": probe.head == b"\x1f\x8b",
        "problems": dict(sorted(counts.items())),
        "unusable": dict(sorted(unusable.items())),
        "licences": count_licences(row["licence"] for row in samples if not row["problem"]),
        "details": _details(problems),
        "digest": _digest(samples, names),
        "content": probe.digest.hexdigest(),
    }
    return ShardIndex(url, table, meta), probe.check is None or probe.check.confirmed()


def count_licences(licences: Iterable[str | None]) -> dict[str, int]:
    """Licence -> samples, the most frequent first; those without one are `unknown`, the rarest together `other`."""
    counts = Counter(licence or UNKNOWN for licence in licences)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    found = dict(ranked[:_MOST_LICENCES])
    if rest := sum(count for _, count in ranked[_MOST_LICENCES:]):
        found[OTHER_LICENCES] = found.get(OTHER_LICENCES, 0) + rest
    return found


def expected_count(url: str, patience: Patience = DEFAULT) -> int | None:
    """How many samples img2dataset says it wrote, from `NAME_stats.json` or `NAME.parquet` beside the shard.

    A tar that was cut at a member's header cannot be told from a whole one in any other way.
    """
    stem = _stem(url)
    try:
        return int(json.loads(store.read_bytes(f"{stem}_stats.json", patience))["successes"])
    except (DataError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # img2dataset may have written neither, or was stopped
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(f"{stem}.parquet", patience)), columns=["status"])
    except (DataError, pa.ArrowException, KeyError, OSError):
        return None
    return table.column("status").to_pylist().count("success")


class _Probe:
    """Passes a stream on, remembering its first two bytes and the checksum of all of it."""

    def __init__(self, stream: store.ByteStream, check: EtagCheck | None = None) -> None:
        self._stream, self.head, self.digest, self.check = stream, b"", xxhash.xxh3_64(), check

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.head = self.head or data[:2]
        self.digest.update(data)
        if self.check is not None:
            self.check.update(data)
        return data

    def drain(self) -> None:
        """Reads what is left, so that the checksum is of all of it."""
        while self.read(_PIECE):
            pass


def _details(problems: list[Problem]) -> list[str]:
    """The first of each kind, so that a harmless one does not hide the others."""
    shown: list[str] = []
    seen: Counter[str] = Counter()
    for problem in problems:
        seen[problem.reason] += 1
        if seen[problem.reason] <= _DETAILS_OF_A_KIND and len(shown) < _MOST_DETAILS:
            shown.append(f"{problem.reason} at byte {problem.offset}: {problem.detail}")
    return shown


def _digest(samples: list[dict[str, Any]], names: MembersConfig) -> str:
    digest = hashlib.blake2b(names.tag.encode(), digest_size=8)
    for sample in samples:
        digest.update(json.dumps([sample["key"], sample["names"], sample["sizes"], sample["checksums"]]).encode())
    return digest.hexdigest()


def save_index(index: ShardIndex, url: str, patience: Patience = DEFAULT) -> None:
    """Writes the index as one Parquet file, its pages and its facts with checksums."""
    facts = json.dumps(index.meta).encode()
    table = index.table.replace_schema_metadata({b"cascade": facts, b"cascade_xxh3": _checksum(facts)})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    store.write_bytes(url, out.getbuffer(), patience)


def _checksum(facts: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(facts).encode()


def _facts(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The facts about a shard in the file of its index. Raises `ValueError` where they are damaged or of another
    version."""
    facts = metadata[b"cascade"]
    meta: dict[str, Any] = json.loads(facts)
    version = meta["version"]
    known = version in (VERSION, _WITHOUT_LICENCES) or (version == _FEWER_LAYOUTS and not meta["unusable"])
    if not known or metadata[b"cascade_xxh3"] != _checksum(facts):
        raise ValueError("another version, or damaged")
    return meta


_UNREADABLE = (DataError, pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""What comes of a file that is missing, damaged or something else."""


def read_index(shard: str, url: str, patience: Patience = DEFAULT) -> ShardIndex | None:
    """The index at `url`, or None when there is none that this version can read, or it is damaged."""
    try:
        content = store.read_bytes(url, patience)
    except _UNREADABLE:
        return None
    return parse_index(shard, url, content)


def parse_index(shard: str, url: str, content: bytes) -> ShardIndex | None:
    """The same from the bytes of its file."""
    try:
        table = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read(use_threads=False)
        meta = _facts(table.schema.metadata)
        if meta["version"] < VERSION:
            unknown = pa.nulls(len(table), SCHEMA.field("licence").type)
            table = table.add_column(SCHEMA.get_field_index("licence"), SCHEMA.field("licence"), unknown)
        if not table.schema.remove_metadata().equals(SCHEMA) or len(table) != meta["samples"]:
            return None
        table.validate(full=True)
        _check_rows(table)
    except _UNREADABLE:
        return None
    index = ShardIndex(shard, table.replace_schema_metadata(None), meta)
    index.place = url
    return index


def _check_rows(table: pa.Table) -> None:
    """Raises `ValueError` unless every sample has as many places as its layout names."""
    layouts = pc.count_substring(table.column("layout").cast(pa.string()), "/")
    for name in ("offsets", "sizes", "checksums"):
        counts = pc.list_value_length(table.column(name))
        if not pc.all(pc.equal(counts, pc.add(layouts, 1)), skip_nulls=False).as_py() and len(table):
            raise ValueError(f"{name} do not fit the layouts")


def load_meta(
    entry: store.Entry,
    index_dir: str | None = None,
    patience: Patience = DEFAULT,
    names: MembersConfig = _DEFAULT_NAMES,
) -> tuple[dict[str, Any], str] | None:
    """The facts about a whole shard from its stored index, and where that lies, without reading the rows (ten times
    faster); None when there is none for exactly this size and etag."""
    for where in (index_url(entry.url, names), cached_index_url(entry.url, index_dir, names)):
        try:
            meta = _facts(pq.read_metadata(io.BytesIO(store.read_bytes(where, patience))).metadata)
            if (meta["size"], meta["etag"]) == (entry.size, entry.etag):
                return meta, where
        except _UNREADABLE:
            continue
    return None


def load_index(
    url: str,
    index_dir: str | None = None,
    entry: store.Entry | None = None,
    patience: Patience = DEFAULT,
    names: MembersConfig = _DEFAULT_NAMES,
    licences: bool = False,
) -> ShardIndex | None:
    """The stored index of a shard, from beside it or from the cache; None when there is none that still fits.

    Args:
        licences: one that an earlier version made, which did not look at them, does not fit.
    """
    entry = entry or store.describe([url], patience)[0]
    for index in _stored(url, index_dir, patience, names):
        if licences and "licences" not in index.meta:
            continue
        if (index.meta["size"], index.meta["etag"]) == (entry.size, entry.etag):
            return index
    return None


def _stored(url: str, index_dir: str | None, patience: Patience, names: MembersConfig) -> Iterator[ShardIndex]:
    places = (index_url(url, names), cached_index_url(url, index_dir, names))
    return (index for place in places if (index := read_index(url, place, patience)) is not None)


def build_index(
    entry: store.Entry,
    index_dir: str | None = None,
    patience: Patience = DEFAULT,
    names: MembersConfig = _DEFAULT_NAMES,
    rebuild: bool = False,
) -> ShardIndex:
    """Makes and stores the index of a shard that has none that fits. A copy of an indexed local file, of which only
    the modification time is another, is read to see that its content is the same, but not walked again.

    Args:
        rebuild: walk it in any case, and write the index in the place of the one that is there.

    Raises:
        DataError: not a tar archive, missing, denied.
    """
    old = None if rebuild or store.is_remote(entry.url) else next(_stored(entry.url, index_dir, patience, names), None)
    same = old is not None and old.meta["version"] == VERSION and old.meta["size"] == entry.size
    if old is not None and same and old.meta["content"] == _content(entry, patience):
        index = ShardIndex(entry.url, old.table, {**old.meta, "etag": entry.etag})
    else:
        index = index_shard(entry.url, patience, entry, names)
    index.place = store_index(index, index_dir, patience, names)
    return index


def _content(entry: store.Entry, patience: Patience) -> str:
    """The checksum of a whole shard."""
    etag = entry.etag if store.is_remote(entry.url) else None
    with store.open_stream(entry.url, etag=etag, patience=patience) as stream:
        probe = _Probe(stream)
        probe.drain()
    return probe.digest.hexdigest()


def store_index(
    index: ShardIndex,
    index_dir: str | None = None,
    patience: Patience = DEFAULT,
    names: MembersConfig = _DEFAULT_NAMES,
) -> str:
    """Writes the index beside its shard, or where that cannot be written into the cache; returns the place."""
    try:
        save_index(index, index_url(index.url, names), patience)
        return index_url(index.url, names)
    except CascadeError as error:
        where = cached_index_url(index.url, index_dir, names)
        logger.info("%s; the index goes to %s", error, where)
        save_index(index, where, patience)
        return where
