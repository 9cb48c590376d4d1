"""Reads selected members of a shard roughly in archive order, through one stream where that is cheaper."""

from __future__ import annotations

import io
from typing import Any

from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.shards.index import Part
from data_pipeline.shards.tar import MAX_MEMBER, Gunzip
from data_pipeline.storage import store
from data_pipeline.storage.retry import DEFAULT, Patience

_LOCAL_GAP, _REMOTE_GAP = 1 << 16, 1 << 22
"""Gaps in bytes up to which reading through is cheaper than reopening the shard at an offset."""


class PartReader:
    """Reads the parts listed in an index from plain or compressed shards, local or remote. Not thread-safe."""

    def __init__(self, entry: store.Entry, compressed: bool, patience: Patience = DEFAULT) -> None:
        self._entry, self._compressed, self._patience = entry, compressed, patience
        self._gap = _REMOTE_GAP if store.is_remote(entry.url) else _LOCAL_GAP
        self._stream: Any = None
        self._reader: Any = None
        self._position = 0

    def read(self, part: Part) -> bytes:
        """Read the bytes of one member.

        Raises:
            BadSample: `too_large`, the member exceeds `MAX_MEMBER`.
            DataError: the shard is missing, or shorter than when it was indexed.
        """
        if part.size > MAX_MEMBER:
            raise BadSample("too_large", f"member .{part.extension} has {part.size} bytes")
        far = part.offset - self._position > self._gap and not self._compressed
        if self._reader is None or part.offset < self._position or far:
            self._open(0 if self._compressed else part.offset)
        self._take(part.offset - self._position, keep=False)
        return self._take(part.size, keep=True)

    def _open(self, start: int) -> None:
        self.close()
        etag = self._entry.etag if store.is_remote(self._entry.url) else None
        self._stream = store.open_stream(self._entry.url, start, etag=etag, patience=self._patience)
        self._reader = Gunzip(self._stream) if self._compressed else self._stream
        self._position = start

    def _take(self, count: int, keep: bool) -> bytes:
        kept = io.BytesIO()
        while count:
            piece = self._reader.read(min(count, 1 << 20))
            if not piece:
                raise DataError(f"{self._entry.url}: it was truncated while being read")
            count -= len(piece)
            self._position += len(piece)
            if keep:
                kept.write(piece)
        return kept.getvalue()

    def close(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
