"""Writes to a full disk: the message names the file and the remedy, and no partial file remains."""

from __future__ import annotations

import errno
import io
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.commands import index, prepare, verify
from data_pipeline.common.errors import CascadeError, DataError, UserError, of_file
from data_pipeline.config import DataConfig, DrawConfig, PrepareConfig
from data_pipeline.shards.embeddings import SidecarWriter
from data_pipeline.storage.atomic import replacing
from tests.data_pipeline.small_shards import write_shards


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond this size (EFBIG), much as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with files_up_to(100), pytest.raises(OSError) as caught, replacing(path) as file:
        file.write(b"x" * 100_000)
    assert str(of_file(caught.value)) == f"{path}: File too large; a file may not become so large here, see ulimit -f"
    assert (path.read_text(), files(tmp_path)) == ("old", ["report.html"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_other_faults_of_a_disk_are_named_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def broken(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError) as caught, replacing(tmp_path / "step.safetensors") as file:
        file.write(b"x")
    said = str(of_file(caught.value))
    assert said.startswith(f"{tmp_path}/step.safetensors: {os.strerror(number)}; ") and "debug" not in said
    assert files(tmp_path) == []


def settings(**sections: Any) -> Any:
    return SimpleNamespace(seed=0, json=True, **sections)


def test_prepare_names_the_shard_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    draw = DrawConfig(count=40, heldout=0, size=32)
    config = settings(data=DataConfig(), prepare=PrepareConfig(kind="draw", output=str(tmp_path / "o"), draw=draw))
    with files_up_to(20_000), pytest.raises(DataError, match=r"train-00000.tar: File too large; .*ulimit -f"):
        prepare.main(config)
    assert files(tmp_path) == ["settings.json"]
    assert prepare.main(config)["samples"] == 40, "the same command resumes"


def test_an_index_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / "set", [6])
    for path in (tmp_path / "set").glob("*.parquet"):
        path.unlink()
    with files_up_to(100), pytest.raises(CascadeError, match=r"index.parquet: File too large; set data.index_dir"):
        index.main(settings(data=DataConfig(shards=str(tmp_path / "set"))))
    assert not [name for name in files(tmp_path) if not name.endswith(".tar")]


def test_verify_names_its_quarantine_file(tmp_path: Path) -> None:
    write_shards(tmp_path / "set", [6])
    for shard in (tmp_path / "set").glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff", b"xxx").replace(b"PNG", b"xxx"))
    config = settings(
        data=DataConfig(shards=str(tmp_path / "set")), output=str(tmp_path / "v"), report=False,
        stage=SimpleNamespace(image_size=16, low_res_size=0, crop_size=0),
    )  # fmt: skip
    with files_up_to(10), pytest.raises(OSError) as caught:
        verify.main(config)
    assert isinstance(of_file(caught.value), UserError) and caught.value.filename.endswith("v/quarantine.jsonl")


def test_embeddings_name_the_directory_of_temporary_files(tmp_path: Path) -> None:
    writer = SidecarWriter(str(tmp_path / "a.safetensors"), {}, 64)
    with files_up_to(100), pytest.raises(OSError) as caught:
        for number in range(100):
            writer.add(str(number), "a", np.ones((20, 64), np.float32))
    assert str(of_file(caught.value)).startswith(f"TMPDIR={tempfile.gettempdir()}: File too large; ")
    assert files(tmp_path) == []


def test_a_table_that_cannot_be_unpacked_for_lack_of_space_is_not_called_bad(tmp_path: Path) -> None:
    import gzip

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    (tmp_path / "a.png").write_bytes(picture.getvalue())
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"image,caption\n" + b"a.png,a picture\n" * 100_000))
    config = settings(
        data=DataConfig(),
        prepare=PrepareConfig(kind="table", source=str(tmp_path / "t.csv.gz"), output=str(tmp_path / "o")),
    )
    with files_up_to(1_000), pytest.raises(DataError, match=r"TMPDIR=.*: File too large; .*t.csv.gz is unpacked there"):
        prepare.main(config)
