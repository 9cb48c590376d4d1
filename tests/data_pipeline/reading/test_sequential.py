"""Reading the parts of a shard one by one: a compressed shard is unpacked once, whatever the order of its members."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.reading.sequential import PartReader
from data_pipeline.shards.index import ShardIndex, index_shard
from data_pipeline.storage import store


def packed(path: Path, endings: list[list[str]], count: int = 40) -> ShardIndex:
    """Write a .tar.gz: for each list of endings, the members of all samples in turn; return its index."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for group in endings:
            for number in range(count):
                for ending in group:
                    info = tarfile.TarInfo(f"{number:03d}.{ending}")
                    data = f"{ending} {number} ".encode() * 50
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(out.getvalue()))
    return index_shard(str(path))


def read_all(index: ShardIndex, order: tuple[str, ...]) -> int:
    """Read the parts of all samples in this order and check them; return how often the shard was opened."""
    opened, really = [], store.open_stream

    def open_stream(*arguments: Any, **more: Any) -> Any:
        opened.append(arguments)
        return really(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch, PartReader(store.describe([index.url])[0], index.compressed) as reader:
        patch.setattr(store, "open_stream", open_stream)
        for row in range(len(index)):
            parts = {part.extension: part for part in index.parts(row)}
            for name in order:
                assert reader.read(parts[name]) == f"{name} {row} ".encode() * 50
    return len(opened)


def test_members_in_order_are_read_in_one_pass(tmp_path: Path) -> None:
    assert read_all(packed(tmp_path / "a.tar.gz", [["jpg", "txt"]]), ("jpg", "txt")) == 1


def test_members_packed_by_type_are_unpacked_once(tmp_path: Path) -> None:
    index = packed(tmp_path / "a.tar.gz", [["jpg"], ["txt"]])
    assert read_all(index, ("jpg", "txt")) == 2 and read_all(index, ("txt", "jpg")) == 2
    assert read_all(packed(tmp_path / "b.tar.gz", [["jpg", "txt"]]), ("txt", "jpg")) == 2


def test_a_full_disk_during_unpacking_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = packed(tmp_path / "a.tar.gz", [["jpg"], ["txt"]])
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b"))  # noqa: SIM115
    with pytest.raises(DataError, match=r"TMPDIR=.*: No space left.*make room; .*a\.tar\.gz is unpacked there"):
        read_all(index, ("jpg", "txt"))
