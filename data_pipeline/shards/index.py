"""The index of one shard: where each member of each sample is, and the properties that filters use.

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
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
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
from data_pipeline.storage.shard_lists import stem

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
"""Earlier versions that can still be read. Version 3 knew fewer layouts, so it is valid only if it found no unusable
sample."""
_MOST_LICENCES = 50
OTHER_LICENCES = "other"
"""Name for the less frequent licences of a shard in its summary."""
_MOST_DETAILS, _DETAILS_OF_A_KIND = 20, 5
_MEMBER_BYTES = 3 * 8
_PIECE = 1 << 22
_unlike_etag: set[str] = set()
_elsewhere: set[str] = set()
_READS = 3
"""How often to walk a remote shard until two reads agree."""
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
    """One member of a sample: its extension, where its data starts in the archive (after decompression), its size in
    bytes and its xxh3-64."""

    extension: str
    offset: int
    size: int
    checksum: int


class ShardIndex:
    """The index of one shard in memory; about 150 bytes per sample."""

    def __init__(self, url: str, table: pa.Table, meta: dict[str, Any]) -> None:
        self.url, self.table, self.meta = url, table, meta
        self.place = ""
        """URL of the stored index; empty until it is stored."""

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def digest(self) -> str:
        """Hash of the keys, sizes and contents, independent of the shard's location."""
        return str(self.meta["digest"])

    @property
    def problems(self) -> dict[str, int]:
        """Reason -> number of problems found while indexing."""
        return dict(self.meta["problems"])

    @property
    def compressed(self) -> bool:
        """Whether the shard is gzipped, so that it can only be read from the start."""
        return bool(self.meta["compressed"])

    @property
    def etag(self) -> str | None:
        """The ETag that reads of a remote shard must match; None for a local shard."""
        return self.meta["etag"] if store.is_remote(self.url) else None

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the table, one value per sample."""
        return self.table.column(name)

    def layouts_of(self, problem: str) -> Counter[str]:
        """Count the layouts of the samples with this problem."""
        rows = zip(self.column("problem").to_pylist(), self.column("layout").to_pylist(), strict=True)
        return Counter(layout for found, layout in rows if found == problem)

    @cached_property
    def _members(self) -> tuple[memoryview, memoryview]:
        """The first part of each row; and offset, size and checksum of every part, interleaved, uint64 (parts, 3)."""
        offsets = self.table.column("offsets").combine_chunks()
        flat = [self.table.column(name).combine_chunks().flatten().to_numpy() for name in ("sizes", "checksums")]
        columns = [array.astype(np.uint64, copy=False) for array in (offsets.flatten().to_numpy(), *flat)]
        return offsets.offsets.to_numpy().data, np.stack(columns, axis=1).data

    @cached_property
    def _layouts(self) -> tuple[list[tuple[list[str], Callable[..., tuple[int, ...]]]], memoryview]:
        """The extensions of each layout, with a function that unpacks as many members; and the layout of each row."""
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
        """Return the key of sample `row`."""
        ends, data = self._keys
        return data[ends[row] : ends[row + 1]].decode()

    def parts(self, row: int) -> list[Part]:
        """Return the members of sample `row` (counted before filters), in archive order."""
        return [Part(*part) for part in self.places(row)]

    def places(self, row: int) -> list[tuple[str, int, int, int]]:
        """Like `parts`, as plain tuples, for the hot path."""
        starts, members = self._members
        layouts, which = self._layouts
        extensions, unpack = layouts[which[row]]
        numbers = iter(unpack(members, _MEMBER_BYTES * starts[row]))
        return list(zip(extensions, numbers, numbers, numbers))  # noqa: B905 (they are one iterator)

    def picture_checksums(self) -> np.ndarray:
        """Return the checksum of each sample's picture, uint64 (n,); 0 for samples without one."""
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
        """Return the first byte and the end byte of every sample, int64 (n,) each."""
        if not len(self):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        starts, members = self._members
        offsets, sizes = np.asarray(members)[:, :2].astype(np.int64).T
        rows = np.asarray(starts)[:-1]
        return np.minimum.reduceat(offsets, rows), np.maximum.reduceat(offsets + sizes, rows)


def index_url(shard: str, names: MembersConfig = _DEFAULT_NAMES) -> str:
    """Return where the index of a shard is stored: `00000.tar` -> `00000.index.parquet` beside it.

    With `data.members`, which changes the content of an index, the name contains a hash of that setting.
    """
    tag = f".{names.tag}" if names.tag else ""
    return f"{stem(store.without_query(shard))}{tag}.index.parquet"


def cached_index_url(shard: str, index_dir: str | None, names: MembersConfig = _DEFAULT_NAMES) -> str:
    """Return where the index is stored if the shard's own directory is not writable."""
    where = store.parent(shard) if store.is_remote(shard) else os.path.abspath(store.parent(shard))
    folder = f"{store.basename(where)}-{hashlib.blake2b(where.encode(), digest_size=6).hexdigest()}"
    return store.join(store.join(index_dir or default_index_dir(), folder), store.basename(index_url(shard, names)))


def default_index_dir() -> str:
    """Return the default directory for indexes that cannot be stored beside their shards."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # a user without a home directory
        return os.path.join(tempfile.gettempdir(), f"cascade-{os.getuid()}", "index")
    return os.path.join(base, "cascade", "index")


def index_shard(
    url: str, patience: Patience = DEFAULT, entry: store.Entry | None = None, names: MembersConfig = _DEFAULT_NAMES
) -> ShardIndex:
    """Index a shard by walking it once, without storing the index.

    Members may come in any order and need not be adjacent. The key is the name up to the first dot after the last
    slash, as in webdataset; for names that contain dots themselves (`photo.v2.jpg`, `photo.v2.txt`) up to the last
    dot, see `members.split_samples`.

    A remote shard is trusted if the MD5s of its bytes match the object's ETag, or if a second read gives the same
    bytes.

    Args:
        url: the shard.
        patience: retry limits.
        entry: the shard as described by its store, if already known.
        names: `data.members`.

    Raises:
        DataError: it is not a tar archive, is missing, access is denied, or repeated reads keep giving other bytes.
        StoreError: the store kept failing until the deadline.
    """
    url = os.fspath(url)
    entry = entry or store.describe([url], patience)[0]
    for _ in range(_READS):
        index, confirmed = _walk(entry, patience, names)
        if confirmed:
            return index
        if index.meta["content"] == _content(entry, patience):
            _say_unlike_etag(entry)
            return index
        logger.warning("%s: a second read returned different bytes; indexing it again", url)
    raise DataError(
        f"{url}: {_READS} times in a row, two reads returned different bytes: the network or the store damages them"
    )


def _say_unlike_etag(entry: store.Entry) -> None:
    """Warn, once per directory, of an object whose two equal reads do not fit an ETag that looks like an MD5."""
    where = store.parent(entry.url)
    if re.fullmatch("[0-9a-f]{32}", entry.etag) and where not in _unlike_etag:
        _unlike_etag.add(where)
        logger.warning(
            "%s: two reads agree, but their MD5 is not the ETag; that is normal for objects that the store encrypts, "
            "otherwise the object or what transfers it is damaged: compare it with the original",
            entry.url,
        )


def _walk(entry: store.Entry, patience: Patience, names: MembersConfig) -> tuple[ShardIndex, bool]:
    """Return the index of a shard, and whether its ETag confirms the bytes; a local file is always confirmed."""
    url, remote = entry.url, store.is_remote(entry.url)
    problems: list[Problem] = []
    with store.open_stream(url, etag=entry.etag if remote else None, patience=patience) as stream:
        probe = _Probe(stream, EtagCheck(entry.etag, entry.size) if remote else None)
        with closing(walk(probe, problems, name=url, links=True)) as members:  # a large one is held until then
            samples = rows_of(members, problems, names)
        probe.drain()
    if not samples and not problems:
        problems.append(Problem("empty_shard", 0, "no member is a picture or belongs to one"))
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
    """Return licence -> number of samples, most frequent first.

    Samples without a licence count as `unknown`; all but the 50 most frequent licences are combined as `other`.
    """
    counts = Counter(licence or UNKNOWN for licence in licences)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    found = dict(ranked[:_MOST_LICENCES])
    if rest := sum(count for _, count in ranked[_MOST_LICENCES:]):
        found[OTHER_LICENCES] = found.get(OTHER_LICENCES, 0) + rest
    return found


def expected_count(url: str, patience: Patience = DEFAULT) -> int | None:
    """Return how many samples img2dataset reports, from `NAME_stats.json` or `NAME.parquet` beside the shard, or None.

    This is the only way to notice a tar that was truncated exactly at a member's header.
    """
    beside = stem(store.without_query(url))
    try:
        return int(json.loads(store.read_bytes(f"{beside}_stats.json", patience))["successes"])
    except (DataError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # not made by img2dataset, or img2dataset was interrupted
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(f"{beside}.parquet", patience)), columns=["status"])
    except (DataError, pa.ArrowException, KeyError, OSError):
        return None
    return table.column("status").to_pylist().count("success")


class _Probe:
    """Passes a stream through and records its first two bytes and its checksum."""

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
        """Read the rest of the stream, so that the checksum covers all of it."""
        while self.read(_PIECE):
            pass


def _details(problems: list[Problem]) -> list[str]:
    """Return the first few problems of each kind, so that a harmless kind does not hide the others."""
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
    """Write the index as one Parquet file, with checksums of its pages and metadata.

    Raises:
        DataError, StoreError: it cannot be written.
    """
    facts = json.dumps(index.meta).encode()
    table = index.table.replace_schema_metadata({b"cascade": facts, b"cascade_xxh3": _checksum(facts)})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    store.write_bytes(url, out.getbuffer(), patience)


def _checksum(facts: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(facts).encode()


def _facts(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the facts about a shard from the metadata of its index file.

    Raises:
        ValueError: they are damaged or of another version. `KeyError` if they are missing.
    """
    facts = metadata[b"cascade"]
    meta: dict[str, Any] = json.loads(facts)
    version = meta["version"]
    known = version in (VERSION, _WITHOUT_LICENCES) or (version == _FEWER_LAYOUTS and not meta["unusable"])
    if not known or metadata[b"cascade_xxh3"] != _checksum(facts):
        raise ValueError("another version, or damaged")
    return meta


_UNREADABLE = (DataError, pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""Errors from reading a file that is missing, damaged or something else."""


def read_index(shard: str, url: str, patience: Patience = DEFAULT) -> ShardIndex | None:
    """Read the index at `url`; None if it is missing, damaged or of a version we cannot read."""
    try:
        content = store.read_bytes(url, patience)
    except _UNREADABLE:
        return None
    return parse_index(shard, url, content)


def parse_index(shard: str, url: str, content: bytes) -> ShardIndex | None:
    """Like `read_index`, from the bytes of its file."""
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
    """Raise `ValueError` unless every sample has as many offsets, sizes and checksums as its layout has members."""
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
    """Return the facts about a shard from its stored index, and where that is; None without a valid index.

    It does not read the rows, which makes it ten times faster than `load_index`.
    """
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
    """Load the stored index of a shard, from beside it or from `index_dir`; None if there is no valid one.

    An index is valid if the size and the ETag of the shard have not changed.

    Args:
        url: the shard.
        index_dir: `data.index_dir`.
        entry: the shard as described by its store, if already known.
        patience: retry limits.
        names: `data.members`.
        licences: require an index with licences; earlier versions did not record them.
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
    """Build and store the index of a shard that has no valid one.

    If only the modification time of a local file has changed, its checksum is verified and the old index is kept.

    Args:
        entry: the shard as described by its store.
        index_dir: `data.index_dir`, used if the shard's own directory is not writable.
        patience: retry limits.
        names: `data.members`.
        rebuild: walk the shard in any case, and overwrite its index.

    Raises:
        DataError: it is not a tar archive, is missing, or access is denied.
        StoreError: the store kept failing until the deadline.
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
    """Return the checksum of a whole shard."""
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
    """Store the index beside its shard or, if that is not writable, in `index_dir`; return where."""
    try:
        save_index(index, index_url(index.url, names), patience)
        return index_url(index.url, names)
    except CascadeError as error:
        where = cached_index_url(index.url, index_dir, names)
        _say_elsewhere(store.parent(index.url), store.parent(where), error)
        try:
            save_index(index, where, patience)
        except CascadeError as second:
            reason = str(second).partition(";")[0]
            raise type(second)(f"{reason}; set data.index_dir to a directory that can be written") from second
        return where


def _say_elsewhere(shards: str, indexes: str, error: CascadeError) -> None:
    """Report, once per directory, that indexes cannot be stored beside their shards."""
    if shards not in _elsewhere:
        _elsewhere.add(shards)
        reason = str(error).partition(";")[0]
        logger.info("%s: indexes cannot be written there and go to %s (%s)", shards, indexes, reason)
