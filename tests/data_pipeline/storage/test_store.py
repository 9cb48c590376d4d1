from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.storage import store
from data_pipeline.storage.folder import open_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tgz", "00000.parquet", ".00003.tar", "sub/00004.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("", ["00000.tar", "00001.tar", "00002.tgz"]),
        ("*.tar", ["00000.tar", "00001.tar"]),
        ("{00000..00001}.tar", ["00000.tar", "00001.tar"]),
        ("{00001,00000}.tar", ["00001.tar", "00000.tar"]),
        ("**/*4.tar", ["sub/00004.tar"]),
        ("0000[12].t*", ["00001.tar", "00002.tgz"]),
        ("0*", ["00000.tar", "00001.tar", "00002.tgz"]),
        ("{00000,0000?}.tar", ["00000.tar", "00001.tar"]),
    ],
)
def test_expand(folder: Path, pattern: str, expected: list[str]) -> None:
    assert store.expand(os.path.join(folder, pattern)) == [os.path.join(folder, name) for name in expected]


def test_expand_a_list_without_repetition(folder: Path) -> None:
    found = store.expand([str(folder / "00001.tar"), str(folder / "*.tar")])
    assert [os.path.basename(url) for url in found] == ["00001.tar", "00000.tar"]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("", r"data\.shards: it is not set"),
        ("{folder}/*.zip", "no .tar shards found"),
        ("{folder}/{{0,9}}*.tar", r"9\*\.tar: no .tar shards found"),
        ("{folder}/none/*.tar", "no .tar shards found .*none' does not exist"),
        ("{folder}/{{0..1.tar", "no .tar shard|brace"),
        ("{folder}/00001.t{{ar,ar.gz}}", r"00001\.tar and \S*00001\.tar\.gz may be one shard twice"),
        ("ftp://host/0.tar", "only file paths and s3://"),
        ("s3:///x.tar", "it has no bucket"),
    ],
)
def test_expand_says_what_is_wrong(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        store.describe(store.expand(pattern.format(folder=folder)))


@pytest.mark.parametrize(("url", "right"), [("S3://b/x", "s3://b/x"), ("s3:/b/x", "s3://b/x"), ("GS://b", "gs://b")])
def test_an_almost_correct_url_is_not_taken_for_a_path(
    url: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"write {right}$"):
        store.write_bytes(url, b"x")
    with pytest.raises(DataError, match=f"write {right}$"):
        open_folder(url).names()
    assert not os.listdir()


def test_missing_shards_of_a_pattern_are_named_and_counted(folder: Path) -> None:
    with pytest.raises(DataError, match=r"00002\.tar and 2 more of 5: no such file"):
        store.describe(store.expand(f"{folder}/{{00000..00004}}.tar"))


def test_read_and_write(tmp_path: Path) -> None:
    url = str(tmp_path / "deep" / "file.bin")
    store.write_bytes(url, b"0123456789")
    assert store.read_bytes(url) == b"0123456789"
    assert store.read_range(url, 3, 6) == b"345"
    assert store.size(url) == 10
    with store.open_stream(url, 2, 8) as stream:
        assert [stream.read(4), stream.read(4), stream.read(4)] == [b"2345", b"67", b""]
    with pytest.raises(DataError, match="ends at byte 10 instead of 12; repeat the command"):
        store.read_range(url, 8, 12)
    store.write_bytes(url, b"new")
    assert store.read_bytes(url) == b"new"
    assert store.list_dir(str(tmp_path / "deep")) == ["file.bin"]


def test_exists_list_and_remove(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b.bin")
    store.write_bytes(url, b"x")
    assert store.exists(url) and store.exists(str(tmp_path / "a")) and not store.exists(url + "x")
    assert store.list_dir(str(tmp_path / "nothing")) == []
    store.remove(str(tmp_path / "a"))
    store.remove(str(tmp_path / "a"))
    assert not store.exists(url)


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"/nowhere/x\.tar: no such file"):
        store.read_bytes("/nowhere/x.tar")


def test_names() -> None:
    assert store.parent("s3://bucket/a/b.tar") == "s3://bucket/a"
    assert store.join("s3://bucket/a/", "b") == "s3://bucket/a/b"
    assert store.basename("s3://bucket/a/b/") == "b"
    assert store.parent("b.tar") == "."


@pytest.mark.parametrize("links", [True, False])
def test_of_several_that_create_one_name_one_succeeds(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    place = str(tmp_path / "deep/name")
    with ThreadPoolExecutor(8) as pool:
        os.makedirs(tmp_path / "deep")
        won = list(pool.map(lambda i: store.create(place, str(i).encode()), range(8)))
    assert won.count(True) == 1 and store.read_bytes(place) == str(won.index(True)).encode()
    assert store.sizes(str(tmp_path)) == {"deep": -1} and store.sizes(str(tmp_path / "deep")) == {"name": 1}
    store.remove_files(str(tmp_path / "deep"), ["name", "missing"])
    assert store.sizes(str(tmp_path / "deep")) == {} == store.sizes(str(tmp_path / "none"))


def test_a_folder_may_end_in_slashes() -> None:
    joined = [store.join(folder, "x") for folder in ("a", "a/", "a//", "/", "//", "", "s3://b/a//", "s3://b")]
    assert joined == ["a/x", "a/x", "a/x", "/x", "/x", "x", "s3://b/a/x", "s3://b/x"]


def test_a_file_removed_while_sizes_are_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    @contextmanager
    def slow(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with real(path) as entries:
            found = list(entries)
        (tmp_path / "going").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", slow)
    for sizes in (lambda: store.sizes(str(tmp_path)), open_folder(str(tmp_path)).sizes):
        for name in ("going", "staying"):
            (tmp_path / name).write_bytes(b"x")
        assert sizes() == {"staying": 1}


def test_shards_of_a_directory_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.tar", "b.tar.part", "below/c.tar"):
        (tmp_path / name).write_bytes(b"")
    assert store.expand(str(tmp_path)) == [f"{tmp_path}/a.tar"]
    assert "1 files such as b.tar.part are not complete yet and are skipped" in caplog.text
    assert f"below/c.tar, are not read: '{tmp_path}/**/*.tar' names all" in caplog.text
    assert len(caplog.records) == 2 and store.expand(str(tmp_path)) and len(caplog.records) == 2
