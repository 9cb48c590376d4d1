"""Walks a tar archive member by member, with checks that `tarfile` does not make.

In stream mode Python's `tarfile` mistakes a damaged header for the end of the archive (python/cpython#120740), so that
every reader built on it loses the rest of a shard without an error. This walk verifies each header's checksum, reports
damage and continues at the next valid header. Formats: v7, ustar, GNU (long names, base-256 sizes) and pax (path,
size), plain or gzipped.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import xxhash

from data_pipeline.common.errors import DataError, NotAnArchive
from data_pipeline.common.fork_lock import ForkLock
from data_pipeline.content.members import instead

logger = logging.getLogger(__name__)

BLOCK = 512
_ZERO = bytes(BLOCK)
_PIECE = 1 << 20
_MAX_EXTENDED = 1 << 20
_PAX_SIZE = re.compile("[0-9]{1,19}")
_RECORD = 20
"""Default blocking factor: archives are padded with zero blocks to a multiple of this many blocks."""
_LONGEST_END = 2 + _RECORD
"""Most zero blocks that count as a normal end of archive."""
_LARGEST_PLAIN = 8 << 30
"""Smallest size in bytes that a plain header cannot hold; only from there on a pax record of the size is needed."""
_PASSED_OVER = b"123456VD"
"""Links, devices, directories and pipes; volume labels and directory listings, as in GNU tar's backups."""
_ARCHIVE = "it is a {} archive: unpack it and use `cascade prepare prepare.kind=folder`"
_UNPACK = "it is compressed with {}, and only gzip is read: unpack it with `{}`"
_PACKED = (
    (b"PK\x03\x04", _ARCHIVE.format("zip")),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE.format("7z")),
    (b"Rar!", _ARCHIVE.format("rar")),
    (b"\x28\xb5\x2f\xfd", _UNPACK.format("zstd", "zstd -d")),
    (b"BZh", _UNPACK.format("bzip2", "bunzip2")),
    (b"\xfd7zXZ\0", _UNPACK.format("xz", "unxz")),
    (b"\x04\x22\x4d\x18", _UNPACK.format("lz4", "unlz4")),
)
"""First bytes of other kinds of archive -> remedy."""
_LISTS = (".txt", ".lst", ".list", ".csv", ".json")
MAX_MEMBER = 128 << 20
"""Members larger than this (bytes) are checked but not kept in memory, and such pictures are not used."""
MAX_TEXT = 16 << 20
"""Captions and metadata larger than this (bytes) are not used: parsed, they take many times their size."""
_LARGE = 8 << 20
"""Of members larger than this (bytes), a process keeps one at a time, however many threads walk archives."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage to a shard: `reason` is the key of the counter, `offset` the byte where the damage starts."""

    reason: str
    offset: int
    detail: str
    size: int = 0
    """Number of bytes lost because of it."""


@dataclass(slots=True)
class Member:
    """One regular file of an archive."""

    name: str
    offset: int
    """Byte of the archive (after decompression) at which the data starts."""
    size: int
    data: bytes
    """Empty if the member is larger than `max_member` of the walk."""
    checksum: int
    """xxh3-64 of the data."""
    link: str = ""
    """Name of the member that this is a link to; it has no data of its own."""
    hard: bool = False
    """Whether it is a hard link, whose target is named from the root of the archive."""
    archive: int = 0
    """Number of the archive, of several in a row, that the member is in."""


@dataclass(slots=True)
class _Header:
    name: str
    size: int
    kind: bytes
    link: str


class _OneAtATime:
    """Lets one thread of this process hold a large member; the others wait.

    A thread that already holds one does not wait for itself, so it may walk several archives in turn.
    """

    def __init__(self) -> None:
        self._lock, self._holder = ForkLock(), 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self._lock.locked() and self._holder == threading.get_ident():
            yield
            return
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    def locked(self) -> bool:
        """Return whether a thread holds a large member."""
        return self._lock.locked()


_large = _OneAtATime()


class Gunzip:
    """Decompresses a gzip stream piece by piece. It ends at damage, which `damage` then describes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._inflate, self._waiting = stream, zlib.decompressobj(31), b""
        self.damage = ""

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes; none at the end."""
        while not self.damage:
            self._waiting = self._waiting or self._stream.read(_PIECE)
            if not self._waiting:
                self.damage = "" if self._inflate.eof else "the gzip data is cut short"
                break
            if self._inflate.eof:
                self._waiting = self._waiting.lstrip(b"\0")  # as gzip itself does: blocks of tapes are padded
                if not self._waiting:
                    continue
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
    """Decompress up to the damage, byte by byte, because zlib discards all output of a call that fails."""
    pieces = []
    with suppress(zlib.error):
        for at in range(len(data)):
            pieces.append(inflate.decompress(data[at : at + 1]))
    return b"".join(pieces)


class _Prefixed:
    """A stream with some bytes put back at its front."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._stream.read(size)


class _Source:
    """Reads exact sizes and keeps the position; decompresses if the stream starts like gzip."""

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
        """Read `size` bytes, fewer only at the end or where the compressed data is damaged."""
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


@dataclass(slots=True)
class _Gap:
    """Consecutive blocks that are not headers."""

    begin: int
    junk_end: int = 0
    """End of the last non-zero block; 0: all blocks are zero."""
    why: str = ""
    zeros_first: int = 0
    """Number of zero blocks before the first non-zero one."""
    zeros: int = 0
    """Number of zero blocks at the end."""

    def add(self, block: bytes, end: int) -> None:
        if block.strip(b"\0"):
            self.zeros_first = self.zeros_first if self.junk_end else self.zeros
            self.junk_end, self.zeros = end, 0
        else:
            self.zeros += 1


def walk(
    stream: Any,
    problems: list[Problem] | None = None,
    *,
    name: str = "shard",
    max_member: int = MAX_MEMBER,
    account: Counter[str] | None = None,
    links: bool = False,
) -> Generator[Member, None, None]:
    """Yield every complete regular member, in archive order. Directories and devices are skipped.

    Args:
        stream: an object with `.read(n)`; memory is bounded by the largest member kept.
        problems: damage is appended here: `empty_shard`, `truncated_shard`, `corrupt_shard` (bytes that belong to no
            member; the walk continues at the next valid header), `unsupported_member`, `end_blocks_inside`,
            `missing_end_blocks`.
        name: name of the archive in errors.
        max_member: members larger than this many bytes are verified but not kept: their `data` is empty.
        account: counts the bytes of `members` (including headers), `skipped` members, the `end` and `problems`, which
            add up to the whole archive.
        links: also yield links, which name another member.

    Raises:
        NotAnArchive: this is not a tar archive at all (for example an error page saved as a shard).
    """
    source = _Source(stream)
    found: list[Problem] = [] if problems is None else problems
    count: Counter[str] = Counter() if account is None else account
    first, started = b"", False
    begin: int | None = None  # where the extended headers of the next member start
    gap: _Gap | None = None
    archive, ahead = 0, b""
    long_name, long_link, pax, global_pax = "", "", {}, {}  # type: str, str, dict[str, str], dict[str, str]

    def report(reason: str, start: int, detail: str) -> None:
        found.append(Problem(reason, start, source.damage or detail, source.position - start))
        count["problems"] += source.position - start

    while True:
        start = source.position - len(ahead)
        block, ahead = ahead or source.read(BLOCK), b""
        first = first or block[:48]
        if len(block) < BLOCK:
            break
        header = None if block == _ZERO else _parse(block, strict=gap is not None or not started)
        if header is None:
            if begin is not None and gap is None:
                gap, begin = _Gap(begin, start, "the member after its extended header is missing"), None
            gap = gap or _Gap(start)
            gap.add(block, source.position)
            long_name, long_link, pax = "", "", {}
            continue
        if gap is not None:
            archive += _close_gap(gap, start, found, count, started)
        started, gap = True, None
        begin = start if begin is None else begin
        if header.kind in b"xgXLK":
            if header.size > _MAX_EXTENDED:
                gap, begin = _Gap(begin, source.position, f"an extended header of {header.size} bytes"), None
                continue
            data = source.read(_padded(header.size))
            if len(data) < _padded(header.size):
                report("truncated_shard", begin, f"the archive ends inside the extended header at byte {start}")
                return
            data = data[: header.size]
            if header.kind == b"L":
                long_name = _text(data.rstrip(b"\0"))
            elif header.kind == b"K":
                long_link = _text(data.rstrip(b"\0"))
            else:
                (global_pax if header.kind == b"g" else pax).update(_parse_pax(data))
                if header.kind == b"g":
                    count["skipped"] += source.position - start
                    begin = None if begin == start else begin
            continue
        records = {**global_pax, **pax}
        member_name = records.get("path") or long_name or header.name
        size = int(records["size"]) if _PAX_SIZE.fullmatch(records.get("size", "")) else header.size
        size = header.size if size < _LARGEST_PLAIN and header.size else size  # the header's is covered by its checksum
        link = records.get("linkpath") or long_link or header.link
        long_name, long_link, pax, since, begin = "", "", {}, begin, None
        if header.kind in _PASSED_OVER:
            if header.kind in b"VD":
                source.read(_padded(size))
            count["skipped"] += source.position - since
            if links and header.kind in b"12":
                yield Member(member_name, since, 0, b"", 0, link, header.kind == b"1", archive)
            continue
        with _large.turn() if _LARGE < size <= max_member else nullcontext():
            member = _read_data(source, member_name, size, max_member)
            if member is None:
                what = f"the archive ends inside {member_name!r}, which begins at byte {start}"
                report("truncated_shard", since, what)
                return
            padding = _padded(size) - size
            rest = source.read(padding)
            whole = len(rest) == padding
            if rest.strip(b"\0") and whole and (last := _last_block(member.data, rest)) and _parse(last, strict=True):
                lost = source.position - BLOCK - since
                detail = (
                    f"the header of the next member stands where the data of {member_name!r}, or its end, should be"
                )
                found.append(Problem("corrupt_shard", since, detail, lost))
                count["problems"] += lost
                ahead = last
                continue
            sparse = _is_sparse(header, records)
            if sparse or header.kind not in b"0\x007":
                what = "a sparse file; pack it without --sparse" if sparse else f"of type {header.kind!r}"
                report("unsupported_member", since, f"{member_name!r} is {what}")
            else:
                count["skipped" if member_name.endswith("/") else "members"] += source.position - since
                if not member_name.endswith("/"):
                    member.archive = archive
                    yield member
            del member  # before the next one is read
        if not whole:
            found.append(Problem("truncated_shard", source.position, f"it ends in the padding after {member_name!r}"))
            return
    if begin is not None:
        report("missing_end_blocks", begin, "the archive ends after an extended header, whose member is missing")
        return
    if source.damage and not started:
        report("truncated_shard", 0, "no member")
    elif not first:
        report("empty_shard", 0, "zero bytes")
    elif not started and not (gap is not None and not gap.junk_end and not block.strip(b"\0")):
        raise _not_a_tar(name, first)
    elif not started:
        report("empty_shard", 0, "no member")
    elif gap is not None:
        if block:
            gap.add(block, source.position)
        _close_end(gap, source, found, count, name)
    elif block:
        report("truncated_shard", start, f"the archive ends inside the header at byte {start}")
    else:
        report("truncated_shard" if source.damage else "missing_end_blocks", start, "no end-of-archive blocks")


def _close_gap(gap: _Gap, end: int, found: list[Problem], count: Counter[str], started: bool) -> bool:
    """Close a gap before a header at byte `end`; it is damage unless it is the end marks between two archives.

    Returns:
        Whether another archive begins at the header, as far as can be told.
    """
    size = end - gap.begin
    if not gap.junk_end and 2 <= gap.zeros <= _LONGEST_END and end % (_RECORD * BLOCK) == 0:
        count["end"] += size
        return True
    count["problems"] += size
    if not gap.junk_end and gap.zeros == 2 and started:
        detail = f"end marks before the header at byte {end}: two archives in a row, or a small member was lost"
        found.append(Problem("end_blocks_inside", gap.begin, detail, size))
        return True
    if gap.junk_end:
        detail = f"{size} bytes before the header at byte {end} belong to no member"
    else:
        detail = f"{size} zero bytes before the header at byte {end}"
    found.append(Problem("corrupt_shard", gap.begin, gap.why or detail, size))
    return False


def _close_end(gap: _Gap, source: _Source, found: list[Problem], count: Counter[str], name: str) -> None:
    """Close a gap at the end of the archive: its end marks, or lost data."""
    end, record = source.position, _RECORD * BLOCK
    if gap.junk_end:
        begin = gap.begin + gap.zeros_first * BLOCK
        if gap.zeros_first >= 2 and begin % record == 0 and end % record and not source.damage and not gap.why:
            # The end marks fill their record; what follows is not whole records and so not part of an archive.
            logger.warning("%s: %d bytes follow the end of the archive", name, end - begin)
            count["end"] += end - gap.begin
            return
        lost = gap.junk_end - gap.begin
        detail = gap.why or f"the last {lost} bytes before byte {gap.junk_end} belong to no member"
        found.append(Problem("corrupt_shard", gap.begin, source.damage or detail, lost))
        count["problems"] += lost
        count["end"] += end - gap.junk_end
        return
    if source.damage:
        found.append(Problem("corrupt_shard", end, source.damage))
    elif end - gap.begin < 2 * BLOCK:
        detail = "a single zero block ends the archive, not two: members may be missing"
        found.append(Problem("missing_end_blocks", gap.begin, detail, end - gap.begin))
        count["problems"] += end - gap.begin
        return
    elif gap.zeros > _LONGEST_END and not _is_record(end // BLOCK, gap.zeros):
        detail = f"nothing but zero bytes from byte {gap.begin} on"
        found.append(Problem("truncated_shard", gap.begin, detail, end - gap.begin))
        count["problems"] += end - gap.begin
        return
    count["end"] += end - gap.begin


def _is_record(blocks: int, zeros: int) -> bool:
    """Return whether the zero blocks are the padding of `tar -b 2**n`. After records of the default size they are not:
    data was lost."""
    sizes = (1 << n for n in range(5, 17))
    return blocks % _RECORD != 0 and any(blocks % size == 0 and zeros <= size + 1 for size in sizes)


def _not_a_tar(name: str, first: bytes) -> DataError:
    words = next((words for magic, words in _PACKED if first.startswith(magic)), "")
    if name.lower().endswith(_LISTS):
        words = f"a list of shards is given as @{name}, with one path or pattern per line"
    elif "/blob/" in name:
        words = "it is a web page about the file: write /resolve/ instead of /blob/"
    words = words or instead(first)
    hint = f"; {words}" if words else ""
    return NotAnArchive(f"{name}: this is not a tar archive (it begins with {first[:24]!r}){hint}")


def _last_block(data: bytes, rest: bytes) -> bytes:
    """Return the last block of a member, given its data and padding; empty if its data is not kept."""
    last = data[len(data) - BLOCK + len(rest) :] if len(data) >= BLOCK else data
    return last + rest if len(last) + len(rest) == BLOCK else b""


def _is_sparse(header: _Header, records: Mapping[str, str]) -> bool:
    return header.kind == b"S" or any(key.startswith("GNU.sparse") for key in records)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read_data(source: _Source, name: str, size: int, keep: int) -> Member | None:
    """Read a member's data and checksum; None if the archive ends inside it."""
    offset = source.position
    if size <= min(_PIECE, keep):
        data = source.read(size)
        return Member(name, offset, size, data, xxhash.xxh3_64_intdigest(data)) if len(data) == size else None
    kept, digest, left = io.BytesIO(), xxhash.xxh3_64(), size  # unlike a join, it does not hold the data twice
    while left:
        piece = source.read(min(_PIECE, left))
        if not piece:
            return None
        digest.update(piece)
        left -= len(piece)
        if size <= keep:
            kept.write(piece)
    return Member(name, offset, size, kept.getvalue(), digest.intdigest())


def _parse(block: bytes, strict: bool) -> _Header | None:
    """Parse a header block; None if its checksum or its numbers are invalid.

    Args:
        strict: also require the ustar magic (or a plausible v7 header), for searching arbitrary data for a header.
    """
    if strict and block[257:262] != b"ustar" and not _plausible_v7(block):
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
    return _Header(_text(name), size, block[156:157], _text(block[157:257].split(b"\0", 1)[0]))


def _plausible_v7(block: bytes) -> bool:
    """Return whether a block looks like a pre-ustar header: a printable name, valid numbers, and nothing after the link
    name."""
    numbers = (block[at : at + 8] for at in (100, 108, 116))
    return (
        block[:1].isascii()
        and block[:1] > b" "
        and block[156:157] in b"\0" + b"01234567V"
        and all(_number(field) is not None for field in numbers)
        and not block[257:].strip(b"\0 0")
    )


def _number(field: bytes) -> int | None:
    """Parse an octal or base-256 number; None if it is neither, -1 if it is negative."""
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
    """Parse the records `LENGTH KEY=VALUE\\n` of a pax extended header, up to the first damaged one."""
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
