"""Which files make a sample, and which of them is the picture, the caption, the facts."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands.verify import main as verify
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.config import CaptionConfig, DataConfig, MembersConfig
from data_pipeline.content.members import picture_kind, split_samples
from data_pipeline.reading.loader import Loader
from data_pipeline.shards.dataset import load_or_build
from data_pipeline.shards.index import index_shard, load_index
from data_pipeline.shards.samples import rows_of
from data_pipeline.shards.tar import Member, Problem, walk
from tests.data_pipeline.damage import archive
from tests.data_pipeline.photos import jpegs
from tests.data_pipeline.verifying import Config

JPEG = jpegs()[0]
CONTENT = {"jpg": JPEG, "png": b"\x89PNG\r\n\x1a\n" + bytes(16), "txt": b"a cat", "json": b'{"caption": "a dog"}'}


def member(name: str, data: bytes | None = None) -> Member:
    data = CONTENT.get(name.rpartition(".")[2].lower(), b"a cat") if data is None else data
    return Member(name, 0, len(data), data, hash(data) & 0xFFFF)


def rows(*names: str, **settings: list[str]) -> tuple[dict[str, str], dict[str, str | None], list[str]]:
    """Maps each sample's key to its layout and to its problem; also returns the other findings."""
    problems: list[Problem] = []
    found = rows_of([member(name) for name in names], problems, MembersConfig(**settings))
    return (
        {row["key"]: row["layout"] for row in found},
        {row["key"]: row["problem"] for row in found if row["problem"]},
        [problem.reason for problem in problems],
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["k.image.jpg", "k.caption.txt", "k.meta.json"], {"k": "jpg/txt/json"}),
        (["k.input.jpg", "k.outputs.txt"], {"k": "jpg/txt"}),
        (["d/k.jpg", "d/k.caption.txt"], {"d/k": "jpg/txt"}),
        (["k.image.jpg", "k.mask.png", "k.txt"], {"k": "jpg/mask.png/txt"}),
        (["k.JPG", "k.TXT"], {"k": "jpg/txt"}),
        (["k.jpg", "k.caption"], {"k": "jpg/txt"}),
        (["k.jpg", "k.jpg.txt"], {"k": "jpg/txt"}),
        (["photo.v2.jpg", "photo.v2.txt", "photo.jpg", "photo.txt"], {"photo": "jpg/txt", "photo.v2": "jpg/txt"}),
        (["a.b.jpg", "a.b.jpg.txt", "a.c.jpg", "a.c.jpg.txt"], {"a.b": "jpg/txt", "a.c": "jpg/txt"}),
        (["img.1.jpg", "img.2.jpg", "img.3.jpg"], {"img.1": "jpg", "img.2": "jpg", "img.3": "jpg"}),
        (["k.img", "README", "k.txt"], {"k": "img/txt"}),
        # a picture without its caption and a caption without its picture, next to a complete sample
        (["v.1_a.jpg", "v.1_a.txt", "v.1_b.jpg", "v.1_c.txt"], {"v.1_a": "jpg/txt", "v.1_b": "jpg", "v.1_c": "txt"}),
        (["v.1.jpg", "v.2.txt"], {"v.1": "jpg", "v.2": "txt"}),
        (["v.1.jpg", "v.2.json", "v.c.txt"], {"v.1": "jpg", "v.2": "json", "v.c": "txt"}),
        (["v.jpg", "v.2.jpg", "v.2.json", "v.3.json"], {"v": "jpg", "v.2": "jpg/json", "v.3": "json"}),
        (["v.jpg", "v.m.json", "v.2.jpg", "v.2.txt", "v.3.txt"], {"v": "jpg/json", "v.2": "jpg/txt", "v.3": "txt"}),
    ],
)
def test_the_members_of_a_sample_are_found_by_their_names(names: list[str], expected: dict[str, str]) -> None:
    assert rows(*names)[0] == expected


def test_a_picture_without_a_known_ending_is_recognized_by_its_content() -> None:
    found = rows_of([member("k.img", JPEG), member("k.txt"), member("bare", JPEG), member("README", b"x")], [])
    assert [(row["key"], row["layout"], row["problem"]) for row in found] == [
        ("k", "jpg/txt", None),
        ("bare", "jpg", None),
    ]
    assert found[0]["width"] > 0


def test_names_given_by_the_settings_come_first() -> None:
    both = ["k.input.jpg", "k.output.jpg", "k.a.txt", "k.b.txt"]
    assert rows(*both)[1] == {"k": "ambiguous_image"}
    assert rows(*both, image=["output.jpg"], caption=["b"])[0] == {"k": "input.jpg/jpg/a.txt/txt"}
    assert rows("k.jpg", "k.png", "k.txt", image=["png"])[0] == {"k": "unused.jpg/png/txt"}
    assert rows("k.jpg", "k.story", caption=["story"])[0] == {"k": "jpg/txt"}
    assert rows("k.a.jpg", "k.a.txt", "k.b.txt", image=["a.jpg"], caption=["b.txt"])[0] == {"k": "jpg/a.txt/txt"}


def test_members_that_are_not_used_are_reported() -> None:
    assert rows("photo.jpg", "photo.txt", "photo.v2.jpg")[2] == ["unused_image"]
    assert rows(".hidden.jpg", "k.jpg")[2] == ["hidden_image"]
    assert rows("k.heic", "k.txt")[1] == {"k": "unsupported_image"}
    assert rows("k.txt")[1] == {"k": "missing_image"}
    for name in ("k.jpg.crdownload", "k.png.part", "k.tmp", "k.jpg.aria2"):
        found = rows_of([member(name, JPEG), member("k.txt"), *[member("k.jpg", JPEG)] * name.endswith("aria2")], [])
        assert [row["problem"] for row in found] == ["unfinished_download"], name
    assert rows("k.jpg", "k.jpg.part", "k.txt")[1] == {}
    assert rows("k.jpg.part", "k.txt", image=["jpg.part"])[1] == {}


@pytest.mark.parametrize(
    ("parts", "expected", "found"),
    [
        ([["1.jpg"], ["1.txt", "1.jpg"]], [("1", "jpg"), ("1", "txt/jpg")], ["duplicate_key"]),
        ([["1.txt"], ["1.jpg", "1.txt"]], [("1", "txt"), ("1", "jpg/txt")], ["duplicate_key"]),
        ([["1.jpg"], ["1.txt", "1.png"]], [("1", "jpg"), ("1", "txt/png")], ["duplicate_key"]),
        ([["1.jpg", "2.jpg"], ["1.mask.png"], ["2.txt", "1.txt"]], [("1", "jpg/mask.png/txt"), ("2", "jpg/txt")], []),
    ],
)
def test_concatenated_archives_do_not_share_captions(
    parts: list[list[str]], expected: list[tuple[str, str]], found: list[str]
) -> None:
    data = b"".join(archive([(name, CONTENT[name.rpartition(".")[2]]) for name in part]) for part in parts)
    problems: list[Problem] = []
    samples = rows_of(walk(io.BytesIO(data), problems), problems)
    assert [(row["key"], row["layout"]) for row in samples] == expected
    assert [one.reason for one in problems if one.reason != "unused_image"] == found


def test_an_empty_txt_is_replaced_by_another_caption() -> None:
    found = rows_of([member("k.jpg"), member("k.txt", b" \n"), member("k.caption", b"a cat")], [])
    assert found[0]["layout"] == "jpg/unused.txt/txt" and found[0]["caption_length"] == 5


def test_names_like_img_1_jpg_take_linear_time() -> None:
    def calls(count: int) -> int:
        members = [member(f"img.{i:06d}.{ending}", b"x") for i in range(count) for ending in ("jpg", "txt")]
        events: Counter[str] = Counter()
        sys.setprofile(lambda frame, event, argument: events.update([event]))
        try:
            found = rows_of(members, [])
        finally:
            sys.setprofile(None)
        assert len(found) == count
        return events.total()

    calls(10)
    assert calls(400) < 3 * calls(200)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"P6\n# by hand\n640 480\n255\n", "ppm"),
        (b"P6 is a nice name", None),
        (b"BM" + bytes(12) + b"\x28\0\0\0", "bmp"),
        (b"BMW and other cars", None),
        (b"\0\0\0\x20ftypavif", "avif"),
        (b"\0\0\0\x20ftypheic", "heic"),
        (b"\xff\x0a\xfa", "jxl"),
        (b"II+\0\x08\0\0\0", "tif"),
        (b"<?xml version='1.0'?>\n<svg xmlns=''>", "svg"),
        (b"a caption", None),
        (b"", None),
    ],
)
def test_pictures_are_recognized_by_their_first_bytes(data: bytes, kind: str | None) -> None:
    assert picture_kind(data) == kind


def shard(path: Path, *names: str, count: int = 8) -> str:
    path.write_bytes(
        archive([(f"{i:03d}.{name}", CONTENT[name.rpartition(".")[2]]) for i in range(count) for name in names])
    )
    return str(path)


def test_the_settings_reach_index_verify_and_training(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", "in.jpg", "out.jpg", "x.txt", "y.txt")
    with pytest.raises(DataError, match=r"left \(8 ambiguous_image.*their members are \.in\.jpg.*data\.members"):
        load_or_build([path], DataConfig(shards=path))
    names = MembersConfig(image=["out.jpg"], caption=["y"])
    loader = Loader(DataConfig(shards=path, members=names, global_batch=2), image_size=16)
    assert next(loader)[0].captions == ["a cat"] * 2
    loader.close()
    assert load_index(path, names=names) is not None and load_index(path) is not None, "each has an index of its own"
    assert index_shard(path, names=names).digest != index_shard(path).digest
    result = verify(Config(path, tmp_path / "out", members=names))
    assert result["delivered"] == 8


def test_the_setting_that_helps_is_named_for_shards_that_are_mostly_dropped(tmp_path: Path, caplog: Any) -> None:
    CONTENT["heic"] = b"\0\0\0\x20ftypheic"
    path = shard(tmp_path / "a.tar", "heic", "txt")
    result = verify(Config(path, tmp_path / "out"))
    assert result["dropped"] == {"unsupported_image": 8}
    assert "pillow-heif" in caplog.text


def test_captions_of_the_json_stand_in_for_an_empty_txt(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", "jpg", "json")
    result = verify(Config(path, tmp_path / "out"))
    assert result["delivered"] == 8 and result["captions.sources"] == {"json:caption": 8}
    with_text = shard(tmp_path / "b.tar", "jpg", "json", "txt")
    assert verify(Config(with_text, tmp_path / "out"))["captions.sources"] == {"txt": 8}


def test_missing_captions_are_reported_with_the_members_next_to_them(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", "jpg", "json")
    result = verify(Config(path, tmp_path / "out", captions=CaptionConfig(sources={"json:title": 1.0})))
    assert result["dropped"] == {"missing_caption": 8}
    line = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()[0])
    assert "fields of the .json with text: caption" in line["detail"]


@pytest.mark.parametrize(
    ("names", "words"), [(["."], "image: a name is empty"), ("jpg", r"image=jpg: it must be a list: \[jpg\]")]
)
def test_names_that_match_nothing_are_refused(names: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.members\.{words}"):
        MembersConfig(image=names)


class _Counted(str):
    """A name that counts comparisons."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        _Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_many_names_with_one_beginning_are_split_in_linear_time() -> None:
    names = [f"{number:06d}.{kind}" for number in range(1000) for kind in ("jpg", "txt")]
    kinds = {_Counted(name): "image" if name.endswith("jpg") else "text" for name in names}
    _Counted.compared = 0
    samples = split_samples("img", kinds, MembersConfig())
    assert [key for key, _ in samples if key != "img"] == [f"img.{number:06d}" for number in range(1000)]
    assert _Counted.compared < 20 * len(names)
