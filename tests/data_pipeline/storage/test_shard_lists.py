"""Lists of shards as other tools write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import DataError, ShardsError
from data_pipeline.storage import store
from data_pipeline.storage.shard_lists import plain_patterns, store_address


def nothing(place: str) -> bytes:
    raise AssertionError(place)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("s3://b/{0..1}.tar::s3://c/{0..1}.tar", ["s3://b/{0..1}.tar", "s3://c/{0..1}.tar"]),
        ("pipe:aws s3 cp s3://b/{000..009}.tar -", ["s3://b/{000..009}.tar"]),
        ("pipe:aws s3 cp --quiet 's3://b/x.tar' - --endpoint=a", ["s3://b/x.tar"]),
        ("pipe:cat 'a b/0.tar'::file:c.tar", ["a b/0.tar", "c.tar"]),
    ],
)
def test_the_equivalent_in_our_syntax(pattern: str, expected: list[str]) -> None:
    assert plain_patterns(pattern, nothing) == expected


@pytest.mark.parametrize("command", ["gunzip < a.tar.gz", "cat a.tar | tee b", "curl s3://a s3://b", "echo 'a"])
def test_commands_are_not_run(command: str) -> None:
    with pytest.raises(DataError, match="commands are not run; give the URL"):
        plain_patterns(f"pipe:{command}", nothing)


def test_a_list_of_shards_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (tmp_path / "lists").mkdir()
    for name in ("0", "1", "2"):
        (tmp_path / "lists" / f"{name}.tar").write_bytes(b"")
    (tmp_path / "lists" / "all.txt").write_text("# mine\n{0..1}.tar\n\n@more.txt\r\n")
    (tmp_path / "lists" / "more.txt").write_text("2.tar\n")
    monkeypatch.chdir(tmp_path)
    expected = [f"lists/{name}.tar" for name in "012"]
    (tmp_path / "lists" / "all.txt").write_text("# mine\n{0..1}.tar\n\n@lists/more.txt\r\n")
    assert store.expand("@lists/all.txt") == expected
    monkeypatch.chdir(tmp_path / "lists")
    (tmp_path / "lists" / "all.txt").write_text("{0..1}.tar\n2.tar\n")
    assert store.expand("@all.txt") == ["0.tar", "1.tar", "2.tar"]
    assert "more than once" not in caplog.text
    assert store.expand(["@all.txt", "./1.tar", str(tmp_path / "lists" / "*.tar")]) == ["0.tar", "1.tar", "2.tar"]
    assert "2.tar, perhaps among others, is named more than once" in caplog.text


def test_lists_that_cannot_be_read_are_reported_in_one_sentence(tmp_path: Path) -> None:
    for name, content, words in (("empty", b"\n", "is empty"), ("tar", b"\xff\xfe\xfd", "text file")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            store.expand(f"@{tmp_path / name}")
    (tmp_path / "loop").write_text(f"@{tmp_path / 'loop'}")
    with pytest.raises(DataError, match="include each other"):
        store.expand(f"@{tmp_path / 'loop'}")
    with pytest.raises(DataError, match="no such file"):
        store.expand(f"@{tmp_path / 'nowhere'}")


def test_gaps_are_counted_at_once(tmp_path: Path) -> None:
    for number in (0, 2, 5):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    urls = store.expand(str(tmp_path / "{00000..00009}.tar"))
    with pytest.raises(DataError, match=r"00001\.tar and 6 more of 10: no such file \(also 00003\.tar.*a glob"):
        store.describe(urls)


@pytest.mark.parametrize(
    ("name", "pattern", "words"),
    [
        ("a/x.tar.zst", "{place}/a", "only plain and gzip-compressed tars are read"),
        ("a/b/0.tar", "{place}/a", r"contains some: '.*/a/\*\*/\*\.tar' names all below"),
        ("0.tar", "{place}/0.tar ", "the path alone, without blanks around it: '.*/0.tar'"),
        ("0.tar", "{place}/0.tar 4", "the path alone, without blanks around it: '.*/0.tar'"),
        ("0.tar", "s3a://b/0.tar", "write s3://b/0.tar"),
        ("0.tar", "S3://b/0.tar", "write s3://b/0.tar"),
    ],
)
def test_an_almost_correct_pattern_is_answered_with_the_correct_one(
    tmp_path: Path, name: str, pattern: str, words: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=words):
        store.expand(pattern.format(place=tmp_path))


def test_shards_of_a_folder_in_capitals_count_and_packed_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0.tar", "1.TAR", "2.tar.zst"):
        (tmp_path / name).write_bytes(b"")
    assert [os.path.basename(url) for url in store.expand(str(tmp_path))] == ["0.tar", "1.TAR"]
    assert "1 shards such as 2.tar.zst are skipped" in caplog.text


@pytest.mark.parametrize(
    ("page", "place"),
    [
        ("https://my-bucket.s3.eu-west-1.amazonaws.com/a/b/*.tar", "s3://my-bucket/a/b/*.tar"),
        ("https://my.bucket.s3.amazonaws.com/a%20b/", "s3://my.bucket/a b/"),
        ("https://s3.us-east-1.amazonaws.com/bucket/a", "s3://bucket/a"),
        ("https://eu-west-1.console.aws.amazon.com/s3/buckets/bucket?region=x&prefix=a/b/&tab=y", "s3://bucket/a/b/"),
        ("https://storage.googleapis.com/bucket/a/*.tar", "gs://bucket/a/*.tar"),
        ("https://console.cloud.google.com/storage/browser/bucket/a;tab=objects?project=x", "gs://bucket/a"),
        ("https://huggingface.co/datasets/o/r/tree/main/data", "hf://datasets/o/r/data"),
        ("https://huggingface.co/datasets/o/r/blob/v2/a.tar", "hf://datasets/o/r@v2/a.tar"),
        ("https://bucket.s3.amazonaws.com/{000..002}.tar", ""),
        ("https://bucket.s3.amazonaws.com/0.tar?X-Amz-Signature=x", ""),
        ("https://huggingface.co/datasets/o/r/resolve/main/a.tar?download=true", ""),
        ("https://example.org/set/", ""),
    ],
)
def test_web_pages_of_stores_are_not_shards(page: str, place: str) -> None:
    assert store_address(page) == place
    if place:
        with pytest.raises(ShardsError, match=re.escape(f"write {place}")):
            store.expand(page)
