"""Walking a tar archive member by member, checking what `tarfile` lets pass.

In stream mode Python's `tarfile` takes a damaged header for the end of the archive (python/cpython#120740), so that
every reader built on it loses the rest of a shard without an error. This walk verifies each header's checksum,
reports damage and goes on at the next good header. Formats: v7, ustar, GNU (long names, base-256 sizes) and pax
(path, size), gzip around it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xxhash

from data_pipeline.common.errors import DataError

BLOCK = 512
_ZERO = bytes(BLOCK)
_PIECE = 1 << 20
_MAX_EXTENDED = 1 << 20
_PAX_SIZE = re.compile("[0-9]{1,19}")
_LONGEST_END = 2 + 20
"""Zero blocks up to which they are an end of archive: two, and what fills the last record of, as all tars have by
default, 20 blocks."""
MAX_MEMBER = 256 << 20
"""Members larger than this (bytes) are checked but not kept in memory."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage to a shard: `reason` is the counter, `offset` the byte where it was found."""

    reason: str
    offset: int
    detail: str


@dataclass(slots=True)
class Member:
    """One regular file of an archive."""

    name: str
    offset: int
    """Byte of the archive (after decompression) at which the data begins."""
    size: int
    data: bytes
    """Empty when the member is larger than the walk keeps."""
    checksum: int
    """xxh3-64 of the data."""


@dataclass(slots=True)
class _Header:
    name: str
    size: int
    kind: bytes
    ustar: bool


class Gunzip:
    """Decompresses a gzip stream piece by piece; damage ends it and is told in `damage`."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._inflate, self._waiting = stream, zlib.decompressobj(31), b""
        self.damage = ""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end."""
        while not self.damage:
            self._waiting = self._waiting or self._stream.read(_PIECE)
            if not self._waiting:
                self.damage = "" if self._inflate.eof else "the gzip data is cut short"
                break
            if self._inflate.eof:
                self._inflate = zlib.decompressobj(31)
            before = self._inflate.copy()
            try:
                piece = self._inflate.decompress(self._waiting, size)
            except zlib.error as error:
                self.damage = f"the gzip data is damaged: {error}"
                return _up_to_damage(before, self._waiting)
            self._waiting = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if piece:
                return piece
        return b""


def _up_to_damage(inflate: Any, data: bytes) -> bytes:
    """What can be unpacked of damaged data: zlib drops all that a failing call has made, so bytes go in one by one."""
    pieces = []
    with suppress(zlib.error):
        for at in range(len(data)):
            pieces.append(inflate.decompress(data[at : at + 1]))
    return b"".join(pieces)


class _Prefixed:
    """A stream with some bytes put back before it."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._stream.read(size)


class _Source:
    """Exact reads with a position, through gzip where the first bytes say so."""

    def __init__(self, stream: Any) -> None:
        head = stream.read(2)
        joined = _Prefixed(head, stream)
        self._gunzip = Gunzip(joined) if head == b"\x1f\x8b" else None
        self._stream: Any = self._gunzip or joined
        self._piece, self._at = b"", 0
        self.position = 0

    @property
    def damage(self) -> str:
        return self._gunzip.damage if self._gunzip else ""

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end or where the compression is damaged."""
        pieces, missing = [], size
        while missing:
            if self._at == len(self._piece):
                self._piece, self._at = self._stream.read(_PIECE), 0
                if not self._piece:
                    break
            part = self._piece[self._at : self._at + missing]
            self._at += len(part)
            missing -= len(part)
            pieces.append(part)
        self.position += size - missing
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def walk(
    stream: Any, problems: list[Problem] | None = None, *, name: str = "shard", max_member: int = MAX_MEMBER
) -> Iterator[Member]:
    """Every complete regular member, in archive order. Links, directories and devices are skipped, never followed.

    Args:
        stream: has `.read(n)`; memory stays bounded by the largest kept member.
        problems: collects the damage found: `empty_shard`, `truncated_shard`, `corrupt_shard` (a header that does not
            verify; the walk goes on at the next one that does), `unsupported_member`, `missing_end_blocks`.
        name: what to call the archive in errors.

    Raises:
        DataError: this is no tar archive at all (an error page saved as a shard, for instance).
    """
    source = _Source(stream)
    found: list[Problem] = [] if problems is None else problems
    first, started, in_damage, unreported, zero_blocks = b"", False, False, False, 0
    long_name, pax, global_pax = "", {}, {}  # type: str, dict[str, str], dict[str, str]

    def report(reason: str, detail: str) -> None:
        found.append(Problem(reason, source.position, source.damage or detail))

    while True:
        start = source.position
        block = source.read(BLOCK)
        first = first or block[:48]
        if len(block) < BLOCK:
            if source.damage and not started:
                report("truncated_shard", "no member")
            elif not first:
                report("empty_shard", "zero bytes")
            elif not started and not zero_blocks:
                raise _not_a_tar(name, first)
            elif block and not zero_blocks and not in_damage:
                report("truncated_shard", f"the archive ends inside the header at byte {start}")
            elif not zero_blocks and not in_damage:
                report("truncated_shard" if source.damage else "missing_end_blocks", "no end-of-archive blocks")
            elif not started:
                report("empty_shard", "no member")
            elif source.damage and zero_blocks:
                report("corrupt_shard", "")
            elif zero_blocks > _LONGEST_END:
                report("truncated_shard", f"nothing but zero bytes from byte {start - zero_blocks * BLOCK} on")
            return
        if block == _ZERO:
            zero_blocks += 1
            continue
        header = _parse(block, strict=in_damage or not started)
        if header is None:
            silent = not started or zero_blocks >= 2  # junk after the end marks is no loss, unless members follow it
            if not in_damage and not silent:
                report("corrupt_shard", f"the header at byte {start} does not verify")
            unreported = silent if not in_damage else unreported
            in_damage, zero_blocks, long_name, pax = True, 0, "", {}
            continue
        if started and zero_blocks > _LONGEST_END:
            report("corrupt_shard", f"{zero_blocks * BLOCK} zero bytes before the header at byte {start}")
        elif in_damage and unreported:
            report("corrupt_shard", f"the bytes before the header at byte {start} belong to no member")
        started, in_damage, zero_blocks = True, False, 0
        if header.kind in b"xgXLK":
            if header.size > _MAX_EXTENDED:
                report("corrupt_shard", f"an extended header of {header.size} bytes at byte {start}")
                in_damage = True
                continue
            data = source.read(_padded(header.size))[: header.size]
            if len(data) < header.size:
                report("truncated_shard", f"the archive ends inside the extended header at byte {start}")
                return
            if header.kind == b"L":
                long_name = _text(data.rstrip(b"\0"))
            elif header.kind != b"K":
                (global_pax if header.kind == b"g" else pax).update(_parse_pax(data))
            continue
        records = {**global_pax, **pax}
        member_name = records.get("path") or long_name or header.name
        size = int(records["size"]) if _PAX_SIZE.fullmatch(records.get("size", "")) else header.size
        long_name, pax = "", {}
        if header.kind in b"123456":
            continue
        member = _read_data(source, member_name, size, max_member)
        if member is None:
            report("truncated_shard", f"the archive ends inside {member_name!r}, which begins at byte {start}")
            return
        sparse = header.kind not in b"0\x007" or any(key.startswith("GNU.sparse") for key in records)
        if sparse:
            report("unsupported_member", f"{member_name!r} is of type {header.kind!r}")
        elif not member_name.endswith("/"):
            yield member
        padding = _padded(size) - size
        if len(source.read(padding)) < padding:
            report("truncated_shard", f"the archive ends in the padding after {member_name!r}")
            return


def _not_a_tar(name: str, first: bytes) -> DataError:
    page = first.lstrip()[:1] in (b"<", b"{")
    hint = "; it looks like an error page that was saved under the shard's name, so fetch it again" if page else ""
    return DataError(f"{name}: this is not a tar archive (it begins with {first[:24]!r}){hint}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read_data(source: _Source, name: str, size: int, keep: int) -> Member | None:
    """The member's data with its checksum, or None when the archive ends inside it."""
    offset = source.position
    if size <= min(_PIECE, keep):
        data = source.read(size)
        return Member(name, offset, size, data, xxhash.xxh3_64_intdigest(data)) if len(data) == size else None
    pieces, digest, left = [], xxhash.xxh3_64(), size
    while left:
        piece = source.read(min(_PIECE, left))
        if not piece:
            return None
        digest.update(piece)
        left -= len(piece)
        if size <= keep:
            pieces.append(piece)
    return Member(name, offset, size, b"".join(pieces), digest.intdigest())


def _parse(block: bytes, strict: bool) -> _Header | None:
    """A header block, or None when its checksum or its numbers do not verify.

    Args:
        strict: also ask for the ustar magic, because arbitrary data is being searched for a header.
    """
    ustar = block[257:262] == b"ustar"
    if strict and not ustar and not _plausible_v7(block):
        return None
    stored = _number(block[148:156])
    if stored is None:
        return None
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        return None
    size = _number(block[124:136])
    if size is None or size < 0:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _Header(_text(name), size, block[156:157], ustar)


def _plausible_v7(block: bytes) -> bool:
    """A header older than ustar: a printable name and nothing after the link name."""
    return not any(block[257:]) and block[:1].isascii() and block[:1] > b" "


def _number(field: bytes) -> int | None:
    """An octal or base-256 number; None when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if field[0] != 0xFF else -1
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _parse_pax(data: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax extended header; a damaged record ends the list."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0 or not data[position:space].isdigit():
            break
        length = int(data[position:space])
        record = data[space + 1 : position + length]
        if length <= space - position or not record.endswith(b"\n") or b"=" not in record:
            break
        key, value = record[:-1].split(b"=", 1)
        records[_text(key)] = _text(value)
        position += length
    return records
