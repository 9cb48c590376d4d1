"""Reads selected members of a shard roughly in archive order, through one stream where that is cheaper."""

from __future__ import annotations

import io
import tempfile
from typing import IO, Any

from data_pipeline.common.errors import BadSample, DataError, system_words
from data_pipeline.shards.index import Part
from data_pipeline.shards.tar import MAX_MEMBER, Gunzip
from data_pipeline.storage import store
from data_pipeline.storage.atomic import naming, scratch
from data_pipeline.storage.retry import DEFAULT, Patience

_LOCAL_GAP, _REMOTE_GAP = 1 << 16, 1 << 22
"""Gaps in bytes up to which reading through is cheaper than reopening the shard at an offset."""


_PIECE = 1 << 20


class PartReader:
    """Reads the parts listed in an index from plain or compressed shards, local or remote. Not thread-safe.

    A compressed shard has to be read from its first byte. If its parts are not requested in order, it is unpacked once,
    into TMPDIR, instead of again for every step back.
    """

    def __init__(self, entry: store.Entry, compressed: bool, patience: Patience = DEFAULT) -> None:
        self._entry, self._compressed, self._patience = entry, compressed, patience
        self._gap = _REMOTE_GAP if store.is_remote(entry.url) else _LOCAL_GAP
        self._stream: Any = None
        self._reader: Any = None
        self._position = 0
        self._unpacked: IO[bytes] | None = None

    def read(self, part: Part) -> bytes:
        """Read the bytes of one member.

        Raises:
            BadSample: `too_large`, the member exceeds `MAX_MEMBER`.
            DataError: the shard is missing, or shorter than when it was indexed, or there is no room to unpack it.
        """
        if part.size > MAX_MEMBER:
            raise BadSample("too_large", f"member .{part.extension} has {part.size} bytes")
        if self._compressed and self._unpacked is None and part.offset < self._position:
            self._unpacked = self._unpack()
        if self._unpacked is not None:
            self._unpacked.seek(part.offset)
            data = self._unpacked.read(part.size)
            if len(data) < part.size:
                raise self._truncated()
            return data
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
            piece = self._reader.read(min(count, _PIECE))
            if not piece:
                raise self._truncated()
            count -= len(piece)
            self._position += len(piece)
            if keep:
                kept.write(piece)
        return kept.getvalue()

    def _unpack(self) -> IO[bytes]:
        """Return a temporary file with the unpacked shard, up to its end or damage."""
        self._open(0)
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            while piece := self._reader.read(_PIECE):
                with naming(scratch()):
                    file.write(piece)
            with naming(scratch()):
                file.flush()
        except OSError as error:
            if error.filename != scratch():
                raise
            raise DataError(f"{scratch()}: {system_words(error)}; {self._entry.url} is unpacked there") from error
        self._stream.close()
        return file

    def _truncated(self) -> DataError:
        return DataError(f"{self._entry.url}: it was truncated while being read")

    def close(self) -> None:
        """Close the stream and the unpacked copy."""
        if self._stream is not None:
            self._stream.close()
        if self._unpacked is not None:
            self._unpacked.close()

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
