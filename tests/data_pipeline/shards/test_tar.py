from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.common.errors import DataError, NotAnArchive
from data_pipeline.shards import tar as tars
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
def test_a_truncated_archive_gives_its_complete_members_and_is_reported(cut: int) -> None:
    members, problems = read(archive(SAMPLES)[:cut])
    assert members == SAMPLES[: len(members)]
    whole = archive(SAMPLES).rstrip(b"\0")
    if cut < len(whole):
        assert problems and problems[-1] in ("truncated_shard", "missing_end_blocks")


def test_only_the_count_distinguishes_a_cut_at_a_header_from_a_missing_trailer() -> None:
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


@pytest.mark.parametrize("size", [15, 700])
def test_the_header_of_the_next_member_is_not_data(size: int) -> None:
    data = archive([("1.txt", b"a" * size), ("2.jpg", b"b" * 99), ("2.txt", b"c")])
    found: list[Problem] = []
    count: Counter[str] = Counter()
    members = [one.name for one in walk(io.BytesIO(data[:512] + data[1024:]), found, account=count)]
    assert members == ["2.jpg", "2.txt"] and [(one.reason, one.offset) for one in found] == [("corrupt_shard", 0)]
    assert "the header of the next member" in found[0].detail and count.total() == len(data) - 512


def test_two_concatenated_archives_are_both_read() -> None:
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


def test_sizes_in_base_256_and_in_pax_records_are_read() -> None:
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


@pytest.mark.parametrize(
    "data", [b"<html>403 Forbidden</html>", b"\x89PNG" + bytes(range(256)) * 40, b"{}", b"PK\x03\x04" * 200]
)
def test_a_file_that_is_not_an_archive_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match=r"00007\.tar: this is not a tar archive") as caught:
        list(walk(io.BytesIO(data), name="00007.tar"))
    assert ("error page" in str(caught.value)) == data.lstrip().startswith((b"<", b"{"))
    assert ("unpack it" in str(caught.value)) == data.startswith(b"PK")


def test_empty_archives_have_no_members() -> None:
    assert read(b"") == ([], ["empty_shard"])
    assert read(bytes(10240)) == ([], ["empty_shard"])


@pytest.mark.parametrize("zeros", [1, 511, 3 << 20])
def test_zero_bytes_after_or_between_gzip_members_are_padding(zeros: int) -> None:
    data = archive(SAMPLES)
    parts = gzip.compress(data[:700]) + bytes(zeros) + gzip.compress(data[700:]) + bytes(zeros)
    assert read(parts) == read(data) and read(parts)[1] == []


def test_a_truncated_gzip_gives_its_complete_members() -> None:
    zipped = gzip.compress(archive([(name, bytes(range(256)) * 40) for name, _ in SAMPLES]), 0)
    members, problems = read(zipped[: len(zipped) // 2])
    assert 0 < len(members) < len(SAMPLES)
    assert problems == ["truncated_shard"]


def hole(size: int, fill: bytes, at: int, data: bytes) -> bytes:
    return data[:at] + (fill * size)[:size] + data[at + size :]


@pytest.mark.parametrize("form", FORMATS.values())
@pytest.mark.parametrize("zeros", [1, 2, 3, 20, 22, 40, 64])
def test_a_hole_of_zeros_with_junk_to_the_end_is_reported(form: int, zeros: int) -> None:
    """Even where that many zero blocks could be end marks."""
    whole = archive([(f"{i}.jpg", b"x" * 5000) for i in range(12)], form)
    begin = next(m.offset for m in walk(io.BytesIO(whole)) if m.name == "2.jpg") - 512
    data = whole[:begin] + bytes(512 * zeros) + b"\xa5" * (len(whole) - begin - 512 * zeros)
    members, problems = read(data)
    assert [name for name, _ in members] == ["0.jpg", "1.jpg"]
    assert problems == ["corrupt_shard"]


EDITS = st.tuples(
    st.sampled_from(["zero", "junk", "flip", "cut", "remove", "insert", "zero to the end"]),
    st.integers(0, 40_000),
    st.integers(1, 6000),
    st.booleans(),
)


@example(edits=[("cut", 1536, 1, False), ("zero to the end", 264, 1, False)], form=tarfile.GNU_FORMAT, zipped=False)
@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(EDITS, min_size=1, max_size=3), form=st.sampled_from(list(FORMATS.values())), zipped=st.booleans()
)
def test_every_byte_is_accounted_for(edits: list[tuple[str, int, int, bool]], form: int, zipped: bool) -> None:
    """Whatever happens to an archive, its delivered, skipped, trailing and reported bytes add up to all of it, and no
    member is missing without a report."""
    members = [(f"{i:03d}.{ext}", bytes([65 + i]) * (300 + 700 * i)) for i in range(6) for ext in ("jpg", "txt")]
    data = archive(members, form)
    for kind, at, size, aligned in edits:
        at = min(at, len(data)) // 512 * 512 if aligned else min(at, len(data))
        size = size // 512 * 512 if aligned else size
        size = min(size, len(data) - at)
        if kind == "zero":
            data = hole(size, b"\0", at, data)
        elif kind == "junk":
            data = hole(size, b"\xa5jpg", at, data)
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "remove":
            data = data[:at] + data[at + size :]
        elif kind == "insert":
            data = data[:at] + b"\xa5" * size + data[at:]
        elif kind == "zero to the end":
            data = data[:at] + bytes(len(data) - at)
    account: Counter[str] = Counter()
    problems: list[Problem] = []
    stream = io.BytesIO(gzip.compress(data, 1) if zipped else data)
    try:
        found = list(walk(stream, problems, account=account))
    except DataError:
        return
    assert account.total() == len(data), (account, problems)
    assert account["problems"] == sum(problem.size for problem in problems)
    lost = len(members) - len(found)
    if lost > 0 and not problems:  # then the bytes are those of a complete archive, and the change cannot be detected
        end = found[-1].offset + -(-found[-1].size // 512) * 512
        zeros = (len(data) - len(data[end:].lstrip(b"\0")) - end) // 512
        assert zeros >= 2 and (not data[end:].strip(b"\0") or (end + 512 * zeros) % 10240 == 0), lost


GNU_TAR = pytest.mark.skipif(
    shutil.which("tar") is None or b"GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True).stdout,
    reason="needs GNU tar",
)


@GNU_TAR
@pytest.mark.parametrize(
    "options",
    ["--format=v7", "--format=oldgnu", "--format=ustar", "--format=posix", "-b 2048", "-b 64", "-b 1", "--label=L",
     "--format=posix --label=L", "-g snapshot", "--format=posix -g snapshot", "-b 512 -g snapshot --label=L", "-z"],
)  # fmt: skip
def test_archives_written_by_gnu_tar_are_complete(tmp_path: Path, options: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in SAMPLES:
        (folder / name).write_bytes(data)
    words = [word.replace("snapshot", str(tmp_path / "snapshot")) for word in options.split()]
    subprocess.run(["tar", *words, "-cf", tmp_path / "x.tar", "pictures"], cwd=tmp_path, check=True)
    members, problems = read((tmp_path / "x.tar").read_bytes())
    assert sorted(members) == [(f"pictures/{name}", data) for name, data in sorted(SAMPLES)]
    assert problems == []


def test_a_flipped_digit_in_a_pax_size_costs_nothing() -> None:
    """The plain header's size has a checksum; the record's has none."""
    info = tarfile.TarInfo("a.jpg")
    info.size = 1000
    info.pax_headers = {"size": "1000"}
    data = info.tobuf(tarfile.PAX_FORMAT) + bytes(b"x" * 1000).ljust(1024, b"\0") + archive([("b.jpg", b"y")])
    assert b"size=1000" in data
    assert read(data.replace(b"size=1000", b"size=5000")) == read(data)
    assert [name for name, _ in read(data)[0]] == ["a.jpg", "b.jpg"]


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=3000), at=st.integers(0, 9000))
def test_nothing_crashes_the_walk(data: bytes, at: int) -> None:
    whole = archive(SAMPLES)
    with contextlib.suppress(DataError):
        read(whole[:at] + data + whole[at + len(data) // 2 :])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.tar.zst", b"\x28\xb5\x2f\xfd", "compressed with zstd.*zstd -d"),
        ("x.zip", b"PK\x03\x04", "prepare.kind=folder"),
        ("shards.txt", b"a.tar\nb.tar\n", "given as @shards.txt"),
        ("wids.json", b'{"shardlist": []}', "given as @wids.json"),
        ("https://h/x/blob/main/0.tar", b"<!doctype html>", "write /resolve/ instead of /blob/"),
    ],
)
def test_a_file_that_is_no_tar_names_the_remedy(name: str, data: bytes, words: str) -> None:
    with pytest.raises(NotAnArchive, match=words):
        list(walk(io.BytesIO(data + bytes(600)), name=name))


def test_a_thread_that_walks_two_archives_alternately_does_not_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_LARGE", 100)
    data = archive([(f"{n}.jpg", bytes([n]) * 200) for n in range(3)])
    pairs = list(zip(walk(io.BytesIO(data)), walk(io.BytesIO(data)), strict=True))
    assert len(pairs) == 3 and all(one.data == other.data for one, other in pairs)
    assert not tars._large.locked()


def test_large_members_of_several_threads_are_held_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_LARGE", 100)
    data, held, most = archive([(f"{n}.jpg", bytes([n]) * 200) for n in range(3)]), [0], [0]

    def consume(_: int) -> int:
        count = 0
        for member in walk(io.BytesIO(data)):
            held[0] += 1
            most[0] = max(most[0], held[0])
            count += len(member.data)
            time.sleep(0.001)
            held[0] -= 1
        return count

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(consume, range(20))) == [600] * 20
    assert most == [1]
