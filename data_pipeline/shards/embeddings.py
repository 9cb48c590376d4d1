"""Precomputed text embeddings: one sidecar file per shard, joined to its samples by key and caption.

A sidecar `00000.embeddings.safetensors` belongs to `00000.tar`. It is a plain safetensors file with

    tokens    bf16 or int8 (sum of T, D)   the tokens of all captions, concatenated, each at its true length T
    scales    fp32 (sum of T,)             int8 only: factor of each token's integers
    starts    int64 (captions + 1,)        where each caption's tokens start
    keys      uint64 (captions,)           hash of the sample's key
    captions  uint64 (captions,)           hash of the caption's text
    checksums uint64 (captions,)           xxh3-64 of the caption's tokens and scales

and, under `cascade` in its metadata, what it was made from: the digest of the shard and the identity of the encoder.
Reading raises an error if the shard or the encoder is another one, or if a key or caption is missing; a sample whose
embedding is damaged counts as bad.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from data_pipeline.common.errors import BadSample, ConfigError, DataError, system_words
from data_pipeline.common.recent import Recent
from data_pipeline.shards.index import key_hash
from data_pipeline.storage import store
from data_pipeline.storage.atomic import naming, replacing, scratch
from data_pipeline.storage.disk_cache import DiskCache
from data_pipeline.storage.safetensors import header
from data_pipeline.storage.shard_lists import stem

VERSION = 2
DTYPES = ("bf16", "int8")
_OPEN_SIDECARS = 64
_ARRAYS = ("tokens", "starts", "keys", "captions", "checksums", "scales")
_NAMES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""safetensors dtype -> numpy dtype (bf16 as its 16 bits)."""


def sidecar_url(shard: str, folder: str | None = None) -> str:
    """Return where the sidecar of a shard is stored: in `folder`, or beside the shard."""
    return store.join(folder or store.parent(shard), f"{stem(store.basename(shard))}.embeddings.safetensors")


def caption_hash(caption: str) -> int:
    """Return a 64-bit BLAKE2b hash of the UTF-8 caption, by which its embedding is found."""
    return int.from_bytes(hashlib.blake2b(caption.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Convert fp32 to bf16 bit patterns, uint16 of the same shape, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Convert bf16 bit patterns, uint16, to fp32 of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize fp32 (T, D) to int8 (T, D) with an fp32 (T,) scale per token; the error is at most half a scale."""
    scales = np.abs(values).max(axis=1, initial=0.0).astype(np.float32) / 127
    steps = values / np.where(scales > 0, scales, 1)[:, None]
    return np.rint(steps).astype(np.int8), scales


class SidecarWriter:
    """Writes one sidecar, atomically, on `close`.

    Args:
        url: see `sidecar_url`.
        facts: what it is made from, kept in its metadata.
        dim: width D of the embeddings.
        dtype: `bf16` (about 3 digits) or `int8` (half the size, accurate to about 1 % of a token's largest value).
    """

    def __init__(self, url: str, facts: Mapping[str, Any], dim: int, dtype: str = "bf16") -> None:
        self._url, self._facts, self._dim, self._dtype = url, {**facts, "version": VERSION}, dim, dtype
        self._tokens = tempfile.TemporaryFile()  # noqa: SIM115
        self._lengths: list[int] = []
        self._scales: list[np.ndarray] = []
        self._hashes: list[tuple[int, int, int]] = []

    def add(self, key: str, caption: str, tokens: np.ndarray) -> None:
        """Add one caption of one sample; `tokens` is fp32 (T, D)."""
        scales = np.zeros(0, "<f4")
        if self._dtype == "int8":
            data, scales = to_int8(tokens)
            self._scales.append(scales)
        else:
            data = to_bf16(tokens)
        content = np.ascontiguousarray(data).tobytes()
        with naming(scratch()):
            self._tokens.write(content)
        self._lengths.append(len(tokens))
        self._hashes.append((key_hash(key), caption_hash(caption), _checksum(content, scales)))

    def close(self) -> None:
        """Write the sidecar atomically.

        Raises:
            DataError, StoreError: it cannot be written.
            OSError: TMPDIR is full; the error names it.
        """
        starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype("<i8")
        hashes = np.array(self._hashes, "<u8").reshape(-1, 3)
        arrays = {"starts": starts, "keys": hashes[:, 0], "captions": hashes[:, 1], "checksums": hashes[:, 2]}
        if self._dtype == "int8":
            arrays["scales"] = np.concatenate([np.zeros(0, "<f4"), *self._scales]).astype("<f4")
        kinds = {"starts": "I64", "keys": "U64", "captions": "U64", "checksums": "U64", "scales": "F32"}
        entries: dict[str, tuple[str, Sequence[int], int]] = {
            name: (kinds[name], array.shape, array.nbytes) for name, array in arrays.items()
        }
        kind = "I8" if self._dtype == "int8" else "BF16"
        entries["tokens"] = (kind, (int(starts[-1]), self._dim), self._tokens.tell())
        head = header(entries, {"cascade": json.dumps(self._facts)})
        head += b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
        with naming(scratch()):
            self._tokens.seek(0)
        if store.is_remote(self._url):
            with tempfile.TemporaryFile() as whole:
                with naming(scratch()):
                    whole.write(head)
                    shutil.copyfileobj(self._tokens, whole, 1 << 22)
                    whole.flush()
                store.upload(self._url, whole)
        else:
            _write_local(store.local_path(self._url), head, self._tokens)
        self._tokens.close()


def _checksum(content: bytes, scales: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(content + scales.astype("<f4").tobytes())


def _write_local(path: str, head: bytes, tokens: Any) -> None:
    """Write head and tokens to a file, atomically."""
    try:
        with replacing(path) as file:
            file.write(head)
            shutil.copyfileobj(tokens, file, 1 << 22)
    except OSError as error:
        raise DataError(f"{path}: {system_words(error)}") from error


class Sidecar:
    """An open sidecar: its facts, and the tokens of any caption with one read. Takes about 150 bytes per caption.

    Args:
        url: the file.
        cache: caches parts of remote files on the node's disk.

    Raises:
        DataError: the file is missing, incomplete or not a sidecar.
    """

    def __init__(self, url: str, cache: DiskCache | None = None) -> None:
        self.url, self._cache = url, cache if store.is_remote(url) else None
        try:
            self._entry = store.entry(url)
            there = self._entry.size
            (size,) = struct.unpack("<Q", self._read(0, min(8, there)))
            if 8 + size > there:
                raise ValueError(f"it ends at byte {there}, inside its header")
            header = json.loads(self._read(8, 8 + size))
            self.facts: dict[str, Any] = json.loads(header["__metadata__"]["cascade"])
            if self.facts["version"] != VERSION:
                raise ValueError(f"version {self.facts['version']}")
            self._base, self._header = 8 + size, header
            whole = self._base + max(entry["data_offsets"][1] for name, entry in header.items() if name in _ARRAYS)
            if there != whole:
                raise ValueError(f"it has {there} bytes, its header says {whole}")
            small = {name: self._whole(name) for name in _ARRAYS if name in header and name != "tokens"}
            self._kind = _NAMES[header["tokens"]["dtype"]]
            self._at, self._dim = header["tokens"]["data_offsets"][0], int(header["tokens"]["shape"][1])
        except (ValueError, KeyError, TypeError, struct.error, DataError) as error:
            if isinstance(error, DataError) and not store.exists(url):
                raise
            raise DataError(
                f"{url}: not a complete file of embeddings of version {VERSION} ({error}); remove it and run "
                "`cascade embed` again"
            ) from error
        self._starts, self._scales, self._checksums = small["starts"], small.get("scales"), small["checksums"]
        pairs = zip(small["keys"].tolist(), small["captions"].tolist(), strict=True)
        self._rows = {pair: row for row, pair in enumerate(pairs)}
        self._keys = set(small["keys"].tolist())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _whole(self, name: str) -> np.ndarray:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        data = self._read(self._base + begin, self._base + end)
        return np.frombuffer(data, _NAMES[entry["dtype"]])

    def _read(self, begin: int, end: int, fresh: bool = False) -> bytes:
        """Read bytes [begin, end); `fresh` bypasses the disk cache."""
        if end <= begin:
            return b""
        if self._cache is None:
            return store.read_range(self.url, begin, end)
        etag, size = self._entry.etag, self._entry.size
        fetch = partial(store.read_range, self.url, etag=etag or None)
        return self._cache.read(etag or self.url, size, begin, end, fetch, fresh)

    def tokens(self, key: str, caption: str) -> np.ndarray:
        """Return the embedding of a caption, fp32 (T, D).

        Raises:
            DataError: the sample, or this caption of it, was not embedded.
            BadSample: `checksum`, the bytes differ from those written.
        """
        row = self._rows.get((key_hash(key), caption_hash(caption)))
        if row is None:
            lacking = f"caption {caption[:60]!r} of sample" if key_hash(key) in self._keys else "sample"
            raise DataError(
                f"{self.url}: it does not hold {lacking} {key!r}; run `cascade embed` again with this run's "
                "data.captions, or set data.embeddings=null to encode while training"
            )
        first, last = int(self._starts[row]), int(self._starts[row + 1])
        width = self._dim * self._kind.itemsize
        begin = self._base + self._at
        scales = np.zeros(0, "<f4") if self._scales is None else self._scales[first:last]
        for fresh in (False, True)[: 1 + (self._cache is not None)]:  # the copy on the disk may be damaged
            data = self._read(begin + first * width, begin + last * width, fresh)
            if _checksum(data, scales) == self._checksums[row]:
                break
        else:
            raise BadSample("checksum", f"its embedding in {self.url} is damaged; remove it and run `cascade embed`")
        values = np.frombuffer(data, self._kind).reshape(last - first, self._dim)
        if self._scales is None:
            return from_bf16(values)
        return values.astype(np.float32) * scales[:, None]


class Embeddings:
    """The sidecars of a data set, opened on demand. Thread-safe.

    Args:
        folders: directories or s3:// prefixes; the first that has a sidecar of the shard's contents is used.
        shards: URL -> digest of every shard of the data set.
        cache: caches parts of remote files on the node's disk.

    Raises:
        DataError: a shard has no sidecar.
    """

    def __init__(self, folders: Sequence[str], shards: Mapping[str, str], cache: DiskCache | None = None) -> None:
        self._cache = cache
        self._digests = dict(shards)
        names = [store.basename(sidecar_url(shard)) for shard in shards]
        there = {folder: store.present(folder, names) for folder in folders}
        self._urls: dict[str, list[str]] = {}
        for shard in shards:
            name = store.basename(sidecar_url(shard))
            self._urls[shard] = [store.join(folder, name) for folder in folders if name in there[folder]]
            if not self._urls[shard]:
                raise DataError(f"data.embeddings={', '.join(folders)}: no {name} for {shard}; run `cascade embed`")
        self._open: Recent[str, Sidecar] = Recent(_OPEN_SIDECARS)
        self._identity: dict[str, Any] | None = None

    def check(self, identity: Mapping[str, Any], look: bool = True) -> None:
        """Accept only sidecars of this encoder from now on; check the first one right away if `look`.

        Raises:
            ConfigError: the first one was made by another encoder.
            DataError: it is damaged, or belongs to another shard.
        """
        self._identity = dict(identity)
        first = next(iter(self._urls), None)
        if first is not None and look:
            self._sidecar(first)

    def lookup(self, shard: str, key: str, caption: str) -> np.ndarray:
        """Return the embedding of one caption, fp32 (T, D).

        Raises:
            DataError: it is missing, or the sidecar belongs to another shard.
            BadSample: `checksum`, it is damaged.
            ConfigError: the sidecar was made by another encoder.
        """
        return self._sidecar(shard).tokens(key, caption)

    def _sidecar(self, shard: str) -> Sidecar:
        known = self._open.get(shard)
        if known is not None:
            return known
        found = [Sidecar(url, self._cache) for url in self._urls[shard]]
        fitting = [sidecar for sidecar in found if sidecar.facts.get("digest") == self._digests[shard]]
        if not fitting:
            raise DataError(
                f"{found[0].url}: it was made from different contents of {shard}; run `cascade embed` again"
            )
        if self._identity is not None:
            _check_identity(fitting[0], self._identity)
        return self._open.put(shard, fitting[0])


class DatasetEmbeddings:
    """The sidecars of all data sets of a run. In a mixture, those of data set NAME are in FOLDER/NAME or in FOLDER.

    Args:
        folders: `data.embeddings`: a directory or s3:// prefix, or a list of them.
        shards: URL -> digest of the shards of each data set, by name ("" without a mixture).
        cache: as for `Embeddings`.

    Raises:
        DataError: a shard has no sidecar.
    """

    def __init__(self, folders: Any, shards: Mapping[str, Mapping[str, str]], cache: DiskCache | None = None) -> None:
        places = [str(folder) for folder in (folders if isinstance(folders, (list, tuple)) else [folders])]
        self._sets = {
            name: Embeddings([*(store.join(place, name) for place in places if name), *places], own, cache)
            for name, own in shards.items()
        }

    def check(self, identity: Mapping[str, Any], look: bool = True) -> None:
        """Like `Embeddings.check`, for every data set."""
        for embeddings in self._sets.values():
            embeddings.check(identity, look)

    def lookup(self, shard: str, key: str, caption: str, dataset: str = "") -> np.ndarray:
        """Like `Embeddings.lookup`, in the data set `dataset`."""
        return self._sets[dataset].lookup(shard, key, caption)


def _check_identity(sidecar: Sidecar, wanted: Mapping[str, Any]) -> None:
    made = sidecar.facts.get("encoder", {})
    differing = [name for name in wanted if made.get(name) != wanted[name]]
    if differing:
        changes = ", ".join(f"{name} {made.get(name)}, the run's is {wanted[name]}" for name in differing)
        raise ConfigError(
            f"data.embeddings: {sidecar.url} was made with another text encoder ({changes}); give the run the same "
            "`text`, run `cascade embed` again, or set data.embeddings=null"
        )


def pad(rows: Sequence[np.ndarray], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad embeddings, fp32 (length, D) each, to T = `max_tokens`; longer ones are truncated.

    Returns:
        text fp32 (B, T, D), zero in the padding, and mask bool (B, T), true for tokens.
    """
    dim = rows[0].shape[1]
    text = np.zeros((len(rows), max_tokens, dim), np.float32)
    mask = np.zeros((len(rows), max_tokens), bool)
    for number, row in enumerate(rows):
        length = min(len(row), max_tokens)
        text[number, :length] = row[:length]
        mask[number, :length] = True
    return text, mask
