from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from data_pipeline.shards import index as shard_index
from data_pipeline.shards.index import (
    ShardIndex,
    build_index,
    cached_index_url,
    image_size,
    index_shard,
    index_url,
    load_index,
    load_meta,
    read_index,
    save_index,
    store_index,
)
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import store
from tests.data_pipeline.small_shards import PHOTOS, write_shards


def tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def layouts(index: ShardIndex) -> dict[str, str]:
    return dict(zip(index.column("key").to_pylist(), index.column("layout").to_pylist(), strict=True))


def test_photographs_as_img2dataset_writes_them() -> None:
    path = str(PHOTOS / "00000.tar")
    index = index_shard(path)
    assert index.problems == {}
    with tarfile.open(path) as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    data = Path(path).read_bytes()
    assert sum(len(index.parts(row)) for row in range(len(index))) == len(contents)
    for row in range(len(index)):
        key = index.key(row)
        for part in index.parts(row):
            assert data[part.offset : part.offset + part.size] == contents[f"{key}.{part.extension}"]
        with Image.open(io.BytesIO(contents[f"{key}.jpg"])) as picture:
            assert picture.size == (index.column("width")[row].as_py(), index.column("height")[row].as_py())
        caption = contents[f"{key}.txt"].decode().strip()
        assert index.column("caption_length")[row].as_py() == len(caption)


def test_members_in_any_order_even_apart(tmp_path: Path) -> None:
    names = ["b.txt", "a.json", "a.jpg", "b.jpg", "c.JPG", "a.txt", "c.txt"]
    index = index_shard(tar(tmp_path / "x.tar", [(name, b"{}") for name in names]))
    assert layouts(index) == {"b": "txt/jpg", "a": "json/jpg/txt", "c": "jpg/txt"}


def test_a_repeated_key_begins_a_new_sample(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"]
    index = index_shard(tar(tmp_path / "x.tar", [(name, b"x") for name in names]))
    assert index.column("key").to_pylist() == ["a", "b", "a"]
    assert index.problems == {"duplicate_key": 1}


@pytest.mark.parametrize(
    "names, expected",
    [
        (["p.v1.2.jpg", "p.v1.2.txt"], {"p.v1.2": "jpg/txt"}),
        (["p.v1.jpg", "p.v1.txt", "p.v2.jpg", "p.v2.txt"], {"p.v1": "jpg/txt", "p.v2": "jpg/txt"}),
        (["p.jpg", "p.seg.png", "p.txt"], {"p": "jpg/seg.png/txt"}),
        (["../up/p.jpg", "/abs/p.jpg"], {"../up/p": "jpg", "/abs/p": "jpg"}),
        ([".hidden.jpg", "._p.jpg", "README", "p.jpg"], {"p": "jpg"}),
        (["café 猫.jpg", "café 猫.txt"], {"café 猫": "jpg/txt"}),
    ],
)
def test_keys(tmp_path: Path, names: list[str], expected: dict[str, str]) -> None:
    assert layouts(index_shard(tar(tmp_path / "x.tar", [(name, b"x") for name in names]))) == expected


def test_scores_in_any_case_and_samples_that_can_never_be_used(tmp_path: Path) -> None:
    facts = {"AESTHETIC_SCORE": 5.5, "PWatermark": 0.25, "punsafe": 0, "Similarity": None, "caption": " héllo "}
    path = tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"x"),
            ("a.json", json.dumps(facts).encode()),
            ("b.txt", b"no picture"),
            ("c.jpg", b""),
            ("d.jpg", b"x"),
            ("d.json", b"{not json"),
        ],
    )
    index = index_shard(path)
    row = index.table.slice(0, 1).to_pylist()[0]
    assert (row["aesthetic"], row["watermark"], row["unsafe"], row["similarity"]) == (5.5, 0.25, 0.0, None)
    assert row["caption_length"] == 5
    assert index.column("problem").to_pylist() == [None, "missing_image", "empty_image", None]
    assert index.problems == {"bad_json": 1, "empty_image": 1, "missing_image": 1}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_image_size_from_the_header(form: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (37, 21)).save(out, form)
    assert image_size(out.getvalue()) == (37, 21)


def test_content_that_is_not_a_picture_has_no_image_size() -> None:
    for data in (b"", b"\xff\xd8\xff", b"<html>", b"\x89PNG\r\n\x1a\n"):
        assert image_size(data) == (None, None)


def test_the_saved_index_is_the_same_and_next_to_the_shard(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [5])[0]
    assert index_url(path) == str(tmp_path / "00000.index.parquet")
    loaded = load_index(path)
    fresh = index_shard(path)
    assert loaded is not None
    assert loaded.table.equals(fresh.table) and loaded.meta == fresh.meta
    assert loaded.meta["size"] == os.path.getsize(path)


def test_a_changed_shard_makes_its_index_stale(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [5])[0]
    data = bytearray(Path(path).read_bytes())
    second = index_shard(path).parts(1)[0]
    data[second.offset] ^= 1
    Path(path).write_bytes(data)
    assert load_index(path) is None
    rebuilt = build_index(store.describe([path])[0])
    assert rebuilt.parts(1)[0].checksum != second.checksum
    assert load_index(path) is not None
    Path(path).write_bytes(data + bytes(512))
    assert load_index(path) is None


def test_a_copy_of_an_indexed_shard_is_not_walked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_shards(tmp_path, [5])[0]
    before = load_index(path)
    os.utime(path, ns=(1, 1))
    assert load_index(path) is None
    monkeypatch.setattr(shard_index, "walk", None)
    copy = build_index(store.describe([path])[0])
    assert before is not None and copy.table.equals(before.table) and copy.digest == before.digest
    assert load_index(path) is not None


@pytest.mark.parametrize("content", [b"", b"PAR1 broken", b"PAR1" + bytes(64) + b"PAR1"])
def test_a_broken_index_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = write_shards(tmp_path, [3])[0]
    Path(index_url(path)).write_bytes(content)
    assert load_index(path) is None and load_meta(store.describe([path])[0]) is None


def test_no_flipped_byte_of_an_index_file_changes_what_it_says(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [6])[0]
    place = Path(index_url(path))
    whole, index = place.read_bytes(), load_index(path)
    assert index is not None
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        place.write_bytes(damaged)
        read = read_index(path, str(place))
        assert read is None or (read.table.equals(index.table) and read.meta == index.meta), at


def test_an_index_whose_rows_contradict_each_other_is_ignored(tmp_path: Path) -> None:
    """As after a flipped bit that no Parquet checksum covers."""
    path = write_shards(tmp_path, [6])[0]
    index = load_index(path)
    assert index is not None
    at = index.table.schema.get_field_index("offsets")
    table = index.table.set_column(at, index.table.schema.field(at), pa.array([[1]] * 6, pa.list_(pa.int64())))
    save_index(ShardIndex(path, table, index.meta), index_url(path))
    assert read_index(path, index_url(path)) is None


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"successes": 1e999}', b'{"successes": null}', b"\xff"])
def test_a_broken_count_next_to_the_shard_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = write_shards(tmp_path, [3])[0]
    (tmp_path / "00000_stats.json").write_bytes(content)
    assert index_shard(path).meta["expected"] is None


def test_the_digest_does_not_depend_on_the_location(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = write_shards(tmp_path / "a", [4])[0], write_shards(tmp_path / "b", [4])[0]
    assert index_shard(one).digest == index_shard(other).digest
    different = write_shards(tmp_path / "b", [4], seed=1)[0]
    assert index_shard(one).digest != index_shard(different).digest


def test_an_index_goes_to_the_cache_when_the_directory_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path, [3])[0]
    index = index_shard(path)
    os.unlink(index_url(path))
    (tmp_path / "00000.index.parquet").mkdir()  # root may write anywhere, but cannot replace a directory
    cache = str(tmp_path / "cache")
    assert store_index(index, cache) == cached_index_url(path, cache)
    loaded = load_index(path, cache)
    assert loaded is not None and loaded.table.equals(index.table)


def test_the_writer_is_deterministic_and_leaves_nothing_on_failure(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, [4])
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()
    with pytest.raises(RuntimeError), ShardWriter(str(tmp_path / "c" / "0.tar")) as shard:
        shard.write("k", {"txt": b"x"})
        raise RuntimeError
    assert os.listdir(tmp_path / "c") == []


def test_links_inside_the_archive_are_followed_and_others_named(tmp_path: Path) -> None:
    """As tar stores files with several names: hard links relative to the root, symbolic links relative to their
    folder."""
    files = {"x/a.jpg": b"\xff\xd8\xff", "x/a.txt": b"a", "./x/late.jpg": b"\xff\xd8\xff2"}
    symbolic, hard = tarfile.SYMTYPE, tarfile.LNKTYPE
    links = [
        ("z.jpg", "x/late.jpg", symbolic),
        ("z.txt", "x/a.txt", hard),
        ("x/c.jpg", "a.jpg", symbolic),
        ("x/c.txt", "../x/a.txt", symbolic),
        ("n" * 150 + ".jpg", "./x/a.jpg", hard),
        ("gone.jpg", "/data/x.jpg", symbolic),
        ("LICENSE", "x/a.txt", symbolic),
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, target, kind in [*links[:1], *((name, "", tarfile.REGTYPE) for name in files), *links[1:]]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(files.get(name, b""))
            archive.addfile(info, io.BytesIO(files.get(name, b"")))
    index = index_shard(str(tmp_path / "a.tar"))
    found = {index.key(row): {p.extension: p.offset for p in index.parts(row)} for row in range(len(index))}
    assert found.keys() == {"x/a", "./x/late", "z", "x/c", "n" * 150}
    assert found["x/c"] == found["x/a"] and found["z"] == found["./x/late"] | {"txt": found["x/a"]["txt"]}
    assert index.problems == {"link_outside": 1} and "'gone.jpg' is a link to" in index.meta["details"][0]
    data = (tmp_path / "a.tar").read_bytes()
    assert data[found["z"]["jpg"] :][:4] == b"\xff\xd8\xff2"


def test_names_with_accents_in_either_unicode_form_are_one_sample(tmp_path: Path) -> None:
    members = [("caf\u00e9.jpg", b"\xff\xd8\xff"), ("cafe\u0301.txt", b"x"), ("metadata.jsonl", b"{}")]
    index = index_shard(tar(tmp_path / "a.tar", members))
    assert layouts(index) == {"caf\u00e9": "jpg/txt", "metadata": "jsonl"}
    assert index.problems == {"missing_image": 1, "unused_table": 1}
