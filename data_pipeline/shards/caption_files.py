"""Captions written by a model for the pictures of a data set: one file per shard, joined to its samples by key.

`00000.captions.parquet` belongs to `00000.tar`. It has a row per caption with `key` and `caption`; under `cascade` in
its metadata is what it was made from: the digest of the shard, the model (hash of its files), the prompt and the
settings. `cascade caption` writes these files; `data.captions.files={NAME: DIR}` and the source `file:NAME` use them.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.common.errors import DataError
from data_pipeline.common.recent import Recent
from data_pipeline.storage import store
from data_pipeline.storage.shard_lists import stem

logger = logging.getLogger(__name__)

CAPTION_FILES_VERSION = 1
_OPEN = 32
_MADE_WITH = ("sha", "prompt", "max_tokens", "side", "dtype")
"""Facts that are the same in all files of one output."""
SCHEMA_OF_CAPTIONS = pa.schema([("key", pa.string()), ("caption", pa.string())])


def caption_file_url(shard: str, folder: str) -> str:
    """Return where the captions of a shard are stored."""
    return store.join(folder, f"{stem(store.basename(shard))}.captions.parquet")


def captions_hash(shard: str, folder: str) -> str:
    """Return a short hash of the captions of a shard, hexadecimal. Raises `DataError` if there are none."""
    return hashlib.blake2b(store.read_bytes(caption_file_url(shard, folder)), digest_size=8).hexdigest()


def write_captions(url: str, rows: Iterable[tuple[str, str]], facts: Mapping[str, Any]) -> int:
    """Write (key, caption) rows and what they were made from, atomically; return the size of the file in bytes."""
    pairs = list(rows)
    table = pa.table([[key for key, _ in pairs], [caption for _, caption in pairs]], schema=SCHEMA_OF_CAPTIONS)
    said = json.dumps({**facts, "version": CAPTION_FILES_VERSION}).encode()
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"cascade": said}), out, compression="zstd", write_page_checksum=True)
    store.write_bytes(url, out.getbuffer())
    return out.getbuffer().nbytes


def read_captions(url: str) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the captions by key, and what they were made from.

    Raises:
        DataError: the file is missing, damaged or of another version.
    """
    content = store.read_bytes(url)
    try:
        table = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read()
        facts: dict[str, Any] = json.loads(table.schema.metadata[b"cascade"])
        if facts["version"] != CAPTION_FILES_VERSION:
            raise ValueError(f"version {facts['version']}")
        found: dict[str, list[str]] = defaultdict(list)
        for key, caption in zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True):
            found[key].append(caption)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{url}: not a complete file of captions ({error}); remove it and run `cascade caption` again"
        ) from error
    return dict(found), facts


class CaptionFiles:
    """The caption files of a data set, opened on demand. Thread-safe.

    Args:
        folders: `data.captions.files`: directory or s3:// prefix by name.
        shards: URL -> digest of every shard.

    Raises:
        DataError: a shard has no file.
    """

    def __init__(self, folders: Mapping[str, str], shards: Mapping[str, str]) -> None:
        self._folders, self._digests = dict(folders), dict(shards)
        for name, folder in folders.items():
            names = {shard: store.basename(caption_file_url(shard, folder)) for shard in shards}
            there = store.present(folder, names.values())
            for shard, place in names.items():
                if place not in there:
                    raise DataError(
                        f"data.captions.files: {name}={folder}: no {place} for {shard}; run `cascade caption`"
                    )
        self._open: Recent[tuple[str, str], dict[str, list[str]]] = Recent(_OPEN)
        self._first: dict[str, tuple[str, list[Any]]] = {}
        """Name -> the first of its files that was opened, and what made it."""
        self._mixed: set[str] = set()
        """Names of which a warning was given that their files were not all made alike."""

    def of(self, shard: str, key: str) -> dict[str, list[str]]:
        """Return the captions of a sample by the name of their folder; an empty list if its model wrote none.

        Raises:
            DataError: a file is missing or damaged, or belongs to another shard.
        """
        return {name: self._file(name, shard).get(key, []) for name in self._folders}

    def _file(self, name: str, shard: str) -> dict[str, list[str]]:
        known = self._open.get((name, shard))
        if known is not None:
            return known
        url = caption_file_url(shard, self._folders[name])
        found, facts = read_captions(url)
        if facts.get("digest") != self._digests[shard]:
            raise DataError(f"{url}: it was made from different contents of {shard}; run `cascade caption` again")
        made = [facts.get(fact) for fact in _MADE_WITH]
        first, of_first = self._first.setdefault(name, (url, made))
        if made != of_first and name not in self._mixed:
            self._mixed.add(name)
            logger.warning(
                "data.captions.files: %s: %s and %s were made by different models, prompts or settings; both are used",
                name,
                first,
                url,
            )
        return self._open.put((name, shard), found)
