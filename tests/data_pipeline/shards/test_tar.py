from __future__ import annotations

import contextlib
import gzip
import io
import tarfile

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.common.errors import DataError
from data_pipeline.shards.tar import Problem, walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SAMPLES = [(f"{i:03d}.{ext}", bytes([65 + i]) * (300 + 700 * i)) for i in range(4) for ext in ("jpg", "txt")]


def archive(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, mtime: float = 0) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def read(data: bytes) -> tuple[list[tuple[str, bytes]], list[str]]:
    problems: list[Problem] = []
    members = [(member.name, member.data) for member in walk(io.BytesIO(data), problems)]
    return members, [problem.reason for problem in problems]


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150
)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=3000)), min_size=1, max_size=6),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    zipped=st.booleans(),
)
def test_reads_what_tarfile_writes(members: list[tuple[str, bytes]], form: int, zipped: bool) -> None:
    data = archive(members, form, mtime=1.5)
    assert read(gzip.compress(data) if zipped else data) == (members, [])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_offsets_and_checksums(form: int) -> None:
    data = archive(SAMPLES, form)
    for member in walk(io.BytesIO(data)):
        content = data[member.offset : member.offset + member.size]
        assert content == member.data
        assert xxhash.xxh3_64_intdigest(content) == member.checksum


def test_small_pieces_from_the_stream() -> None:
    class Dribble(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(7 if size is None or size < 0 else min(size, 7))

    assert [member.name for member in walk(Dribble(archive(SAMPLES)))] == [name for name, _ in SAMPLES]


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(512, len(archive(SAMPLES)) - 1))
def test_a_cut_archive_gives_its_whole_members_and_is_reported(cut: int) -> None:
    members, problems = read(archive(SAMPLES)[:cut])
    assert members == SAMPLES[: len(members)]
    whole = archive(SAMPLES).rstrip(b"\0")
    if cut < len(whole):
        assert problems and problems[-1] in ("truncated_shard", "missing_end_blocks")


def test_a_cut_at_a_header_is_told_from_a_missing_trailer_only_by_the_count() -> None:
    data = archive(SAMPLES)
    end_of_first = 512 + 512
    assert read(data[:end_of_first]) == (SAMPLES[:1], ["missing_end_blocks"])


@settings(max_examples=60, deadline=None)
@given(victim=st.integers(0, len(SAMPLES) - 1), byte=st.integers(0, 499), value=st.integers(1, 255))
def test_a_damaged_header_costs_one_member_and_is_reported(victim: int, byte: int, value: int) -> None:
    data = bytearray(archive(SAMPLES, tarfile.USTAR_FORMAT))
    header = next(m.offset for m in walk(io.BytesIO(bytes(data))) if m.name == SAMPLES[victim][0]) - 512
    data[header + byte] = (data[header + byte] + value) % 256
    if 148 <= byte < 156 and read(bytes(data)) == (SAMPLES, []):
        return  # another way to write the same checksum
    members, problems = read(bytes(data))
    assert problems == ["corrupt_shard"]
    assert members == SAMPLES[:victim] + SAMPLES[victim + 1 :]


def test_a_header_of_zeros_is_reported() -> None:
    data = bytearray(archive(SAMPLES))
    header = next(m.offset for m in walk(io.BytesIO(bytes(data))) if m.name == "002.jpg") - 512
    data[header : header + 512] = bytes(512)
    members, problems = read(bytes(data))
    assert problems == ["corrupt_shard"]
    assert members == [member for member in SAMPLES if member[0] != "002.jpg"]


def test_two_archives_in_a_row_are_both_read() -> None:
    assert read(archive(SAMPLES[:4]) + archive(SAMPLES[4:])) == (SAMPLES, [])


def test_junk_after_the_end_is_ignored() -> None:
    assert read(archive(SAMPLES) + b"junk" * 1000) == (SAMPLES, [])


def test_links_directories_and_devices_are_skipped() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"member{kind!r}")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    assert read(out.getvalue()) == ([("real.txt", b"ok")], [])


def test_sizes_in_base_256_and_in_pax() -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 8 << 30
    gnu = info.tobuf(tarfile.GNU_FORMAT)
    assert gnu[124] & 0x80
    members, problems = read(gnu + b"x" * 2000)
    assert (members, problems) == ([], ["truncated_shard"])  # the size was understood: the data ends too early
    pax = info.tobuf(tarfile.PAX_FORMAT)
    assert read(pax + b"x" * 2000) == ([], ["truncated_shard"])


def test_a_large_member_is_checked_but_not_kept() -> None:
    data = archive([("large.bin", b"z" * 5000), ("small.txt", b"ok")])
    large, small = walk(io.BytesIO(data), max_member=1000)
    assert (large.data, large.size, large.checksum) == (b"", 5000, xxhash.xxh3_64_intdigest(b"z" * 5000))
    assert small.data == b"ok"


def test_an_old_v7_archive_is_read() -> None:
    data = bytearray(archive(SAMPLES[:1], tarfile.USTAR_FORMAT))
    data[257:512] = bytes(255)
    data[148:156] = b" " * 8
    data[148:155] = b"%06o\0" % sum(data[:512])
    assert read(bytes(data)) == (SAMPLES[:1], [])


@pytest.mark.parametrize("data", [b"<html>403 Forbidden</html>", b"\x89PNG" + bytes(range(256)) * 40, b"{}"])
def test_what_is_no_archive_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match=r"00007\.tar: this is not a tar archive") as caught:
        list(walk(io.BytesIO(data), name="00007.tar"))
    assert ("error page" in str(caught.value)) == data.lstrip().startswith((b"<", b"{"))


def test_empty() -> None:
    assert read(b"") == ([], ["empty_shard"])
    assert read(bytes(10240)) == ([], ["empty_shard"])


def test_cut_gzip_gives_what_is_whole() -> None:
    zipped = gzip.compress(archive([(name, bytes(range(256)) * 40) for name, _ in SAMPLES]), 0)
    members, problems = read(zipped[: len(zipped) // 2])
    assert 0 < len(members) < len(SAMPLES)
    assert problems == ["truncated_shard"]


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=3000), at=st.integers(0, 9000))
def test_nothing_crashes_the_walk(data: bytes, at: int) -> None:
    whole = archive(SAMPLES)
    with contextlib.suppress(DataError):
        read(whole[:at] + data + whole[at + len(data) // 2 :])
