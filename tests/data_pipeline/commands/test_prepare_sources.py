"""Folders, tables and shards as sources of `cascade prepare`: what counts as another source, and what remains text."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.commands.prepare_item import read_file
from data_pipeline.commands.prepare_sources import TableSource
from data_pipeline.common.errors import BadSample, DataError, StoreError
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import retry
from tests.data_pipeline.commands.importing import imported, members
from tests.data_pipeline.damage import archive
from tests.data_pipeline.photos import jpegs


def test_unknown_endings_and_columns_that_begin_empty(folder: Path, tmp_path: Path) -> None:
    picture = next(folder.glob("*.jpg"))
    (folder / "pic.jpg_large").write_bytes(picture.read_bytes())
    rows = "".join(f"{picture.name},a caption of some length {n:06d},\n" for n in range(30_000))
    (folder / "table.csv").write_text(f"path,caption,note\npic.jpg_large,first,\n{rows}{picture.name},last,said late\n")
    source = TableSource(str(folder / "table.csv"))
    assert source.read(0).extension == "jpg"
    assert source.read(len(source) - 1).meta["note"] == "said late"


def test_captions_that_look_like_other_values_remain_text(folder: Path, tmp_path: Path) -> None:
    picture = next(folder.glob("*.jpg"))
    captions = ["007", "true", "1.50", "2020-01-01"]
    (folder / "table.csv").write_text("file,Text\n" + "".join(f"{picture.name},{text}\n" for text in captions))
    source = TableSource(str(folder / "table.csv"))
    assert [source.read(number).caption for number in range(4)] == [text.encode() for text in captions]


def test_a_tilde_in_a_source_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ShardWriter("~/out/0.tar") as shard:
        shard.write("a", {"jpg": jpegs()[0], "txt": b"a"})
    assert (tmp_path / "out" / "0.tar").exists()


def test_a_corrected_caption_or_an_added_picture_makes_another_source(folder: Path, tmp_path: Path) -> None:
    imported(tmp_path / "out", "folder", folder)
    caption = next(folder.glob("*.txt"))
    caption.write_text(caption.read_text()[::-1])
    os.utime(caption, ns=(1, 1))
    with pytest.raises(DataError, match="it was prepared with other settings"):
        imported(tmp_path / "out", "folder", folder)
    picture = next(folder.glob("*.jpg"))
    (folder / "table.csv").write_text(f"path,caption\n{picture.name},one\nlater.jpg,two\n")
    assert imported(tmp_path / "table", "table", folder / "table.csv")["dropped"] == {"missing_image": 1}
    (folder / "later.jpg").write_bytes(picture.read_bytes())
    with pytest.raises(DataError, match="it was prepared with other settings"):
        imported(tmp_path / "table", "table", folder / "table.csv")


def test_a_key_that_looks_like_the_second_of_another(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture = jpegs()[0]
    for name, keys in (("a", ["img", "img-2"]), ("b", ["img"]), ("c", ["img-2", "img"])):
        with ShardWriter(str(tmp_path / "in" / f"{name}.tar")) as shard:
            for key in keys:
                shard.write(key, {"jpg": picture, "txt": b"a caption"})
    imported(tmp_path / "out", "shards", tmp_path / "in")
    keys = [name.split(".")[0] for name in members(tmp_path / "out" / "00000.tar") if name.endswith(".txt")]
    assert len(keys) == len(set(keys)) == 5 and keys[:2] == ["img", "img-2"]


def test_captions_of_a_table_that_are_not_utf8_cost_only_their_row(folder: Path, tmp_path: Path) -> None:
    names = [path.name.encode() for path in sorted(folder.glob("*.jpg"))[:3]]
    captions = [b"plain", "ein H\xfcgel".encode("latin-1"), "東京".encode()]
    lines = [b"path,caption"] + [name + b"," + caption for name, caption in zip(names, captions, strict=True)]
    (folder / "table.csv").write_bytes(b"\n".join(lines))
    result = imported(tmp_path / "out", "table", folder / "table.csv")
    assert result["dropped"] == {"bad_text": 1}
    found = members(tmp_path / "out" / "00000.tar")
    assert found["000000000.txt"] == b"plain" and found["000000002.txt"] == "東京".encode()


def test_damaged_pictures_are_dropped_and_reported(folder: Path, tmp_path: Path) -> None:
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>")
    Image.new("RGB", (2, 2)).save(folder / "dot.png")
    for name in ("empty", "page", "dot"):
        (folder / f"{name}.txt").write_text("x")
    result = imported(tmp_path / "out", "folder", folder, max_side=50)
    assert result["dropped"] == {"decode_error": 1, "empty_image": 1, "missing_caption": 1, "too_small": 1}


def test_the_output_is_never_read_as_a_source(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pattern that also matches the output, and an output inside the folder that is read."""
    imported(tmp_path / "in", "folder", folder)
    imported(tmp_path / "in/out", "shards", f"{tmp_path}/in/*.tar")
    with pytest.raises(
        DataError, match=r"prepare.source: .*/\*\*/\*.tar also matches 1 shard in prepare.output=.*in/out"
    ):
        imported(tmp_path / "in/out", "shards", f"{tmp_path}/in/**/*.tar")
    imported(folder / "out", "folder", folder)
    imported(folder / "out", "folder", folder)
    assert ".prepare" not in caplog.text


@pytest.mark.parametrize(
    ("number", "times", "raised"),
    [
        (errno.ESTALE, 2, None),
        (errno.EIO, 99, BadSample),
        (errno.ESTALE, 99, StoreError),
        (errno.EMFILE, 99, OSError),
    ],
)
def test_a_picture_is_not_dropped_for_what_its_disk_or_this_process_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int, raised: type[Exception] | None
) -> None:
    right, failures = Path.read_bytes, iter([1] * times)

    def flaky(path: Path) -> bytes:
        if next(failures, 0):
            raise OSError(number, os.strerror(number), str(path))
        return right(path)

    picture = next(folder.glob("*.jpg"))
    monkeypatch.setattr(Path, "read_bytes", flaky)
    monkeypatch.setattr(retry, "FILE_S", 60.0 if raised is None else 0.0)
    with nullcontext() if raised is None else pytest.raises(raised, match=os.strerror(number)):
        assert read_file(picture) == right(picture)


def test_the_output_is_not_blamed_for_the_limit_of_open_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_files(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(Path, "read_bytes", without_files)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        imported(tmp_path / "out", "folder", folder)


def test_boxes_of_objects_are_no_second_caption_of_a_shard(tmp_path: Path) -> None:
    files = [("0.jpg", jpegs()[0]), ("0.txt", b"0 0.5 0.5 0.1 0.1\n"), ("0.caption", b"one")]
    (tmp_path / "in.tar").write_bytes(archive(files))
    imported(tmp_path / "out", "shards", tmp_path / "in.tar")
    found = members(tmp_path / "out" / "00000.tar")
    assert found["0.txt"] == b"one" and b"captions" not in found["0.json"]
