"""Writing shards: names that readers would split differently, and full disks."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.writer import ShardWriter, index_shard


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("samples", [1, 40])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, samples: int) -> None:
    with pytest.raises(OSError, match="too large"), largest_file(2048), ShardWriter(str(tmp_path / "a.tar")) as shard:
        for number in range(samples):
            shard.write(str(number), {"jpg": bytes(1000), "txt": b"x"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("key", "extension"),
    [("", "jpg"), ("folder/", "jpg"), ("a.b", "jpg"), ("x/a.b", "jpg"), ("a", ""), ("a", "b/jpg"), ("a\0b", "jpg")],
)
def test_a_name_that_readers_would_split_otherwise_is_refused(tmp_path: Path, key: str, extension: str) -> None:
    with (
        pytest.raises(DataError, match=r"a\.tar: key .* must end in a name without dots"),
        ShardWriter(str(tmp_path / "a.tar")) as shard,
    ):
        shard.write(key, {extension: b"x"})
    assert os.listdir(tmp_path) == []


def test_what_is_not_bytes_leaves_nothing_of_the_sample(tmp_path: Path) -> None:
    members: Any
    with ShardWriter(str(tmp_path / "a.tar")) as shard:
        for members, sentence in (
            ({"jpg": b"x", "txt": "x"}, r"key 'a': member \.txt is str; give bytes"),
            ({"jpg": b"x", "npy": np.zeros(3)}, r"member \.npy is ndarray"),
            ({}, "key 'a': give at least one member"),
        ):
            with pytest.raises(DataError, match=sentence):
                shard.write("a", members)
        members = {"jpg": bytearray(b"x"), "raw": memoryview(np.zeros(3))}
        shard.write("b", members)
        index = shard.close()
    assert shard.close() is index and [index.key(row) for row in range(len(index))] == ["b"]
    assert [part.size for part in index_shard(tmp_path / "a.tar").parts(0)] == [1, 24]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="ShardWriter: path='': give the path of the shard"):
        ShardWriter("")
