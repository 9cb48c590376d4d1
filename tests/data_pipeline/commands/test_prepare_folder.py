"""Folders as people have them: other endings, named parts, metadata tables, pictures that are not read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands.prepare import main
from data_pipeline.commands.prepare_folder import FolderSource
from data_pipeline.common.errors import DataError
from data_pipeline.config import DataConfig, MembersConfig, PrepareConfig
from tests.data_pipeline.commands.importing import Config, dropped, imported, members
from tests.data_pipeline.photos import jpegs

ONE, TWO = jpegs()[:2]


def folder(path: Path, **files: bytes | str) -> Path:
    """Files by their names, in which `__` stands for a dot and `_in_` for a slash."""
    for name, data in files.items():
        place = path / name.replace("__", ".").replace("_in_", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def found(source: FolderSource) -> dict[str, str]:
    items = [source.read(number) for number in range(len(source))]
    return {item.name: (item.caption or b"").decode().strip() for item in items}


def test_captions_under_other_endings_in_any_case_are_found(tmp_path: Path) -> None:
    endings = {"a": "caption", "b": "TXT", "c": "text", "d": "cap", "e": "jpg.txt", "f": "prompt", "g": "JPG.caption"}
    for stem, ending in endings.items():
        (tmp_path / f"{stem}.jpg").write_bytes(ONE)
        (tmp_path / f"{stem}.{ending}").write_text(f"of {stem}")
    source = FolderSource(str(tmp_path))
    assert found(source) == {f"{stem}.jpg": f"of {stem}" for stem in endings}


def test_named_parts_and_dotted_names_are_found(tmp_path: Path) -> None:
    source = FolderSource(
        str(
            folder(
                tmp_path,
                k__image__jpg=ONE, k__caption__txt="named",
                photo__jpg=ONE, photo__txt="plain", photo__v2__jpg=TWO, photo__v2__txt="second",
                deep_in_x__JPG=ONE, deep_in_x__png=TWO, deep_in_x__txt="shared",
            )
        )
    )  # fmt: skip
    assert found(source) == {
        "k.image.jpg": "named",
        "photo.jpg": "plain",
        "photo.v2.jpg": "second",
        "deep/x.JPG": "shared",
        "deep/x.png": "shared",
    }


def test_an_empty_caption_leaves_its_place_to_the_json(tmp_path: Path) -> None:
    folder(tmp_path / "in", a__jpg=ONE, a__txt=" \n", a__json='{"text": "of the json"}')
    assert imported(tmp_path / "out", "folder", tmp_path / "in")["samples"] == 1
    assert members(tmp_path / "out" / "00000.tar")["000000000.txt"] == b"of the json"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "train/metadata.jsonl"])
def test_metadata_tables_give_captions(tmp_path: Path, name: str) -> None:
    root = tmp_path / "in"
    place = root / Path(name).parent
    folder(place, a__jpg=ONE, deep_in_b__jpg=TWO, c__jpg=ONE, c__txt="its own")
    rows = [("a.jpg", "of a"), ("deep/b.jpg", "of b"), ("c.jpg", "of c")]
    if name.endswith("csv"):
        text = "file_name,text,extra\n" + "".join(f"{path},{words},1\n" for path, words in rows)
    else:
        text = "".join(json.dumps({"file_name": path, "text": words, "extra": 1}) + "\n" for path, words in rows)
    (root / name).write_text(text)
    assert imported(tmp_path / "out", "folder", root)["samples"] == 3
    shard = members(tmp_path / "out" / "00000.tar")
    assert [shard[f"{n:09d}.txt"] for n in range(3)] == [b"of a", b"its own", b"of b"]
    assert json.loads(shard["000000000.json"])["extra"] == 1


def test_pictures_that_are_not_used_are_counted_once_with_what_helps(tmp_path: Path, caplog: Any) -> None:
    root = folder(
        tmp_path / "in",
        a__jpg=ONE, a__txt="x", a__mask__png=TWO, b__HEIC=b"\0\0\0\x20ftypheic", b__txt="x", b__mov=b"x",
        c__svg="<svg/>", d__x__jpg=ONE, d__y__jpg=TWO, d__txt="x",
        e__jpg=b"\0\0\0\x20ftypheic" + bytes(50), e__txt="x",
    )  # fmt: skip
    result = imported(tmp_path / "out", "folder", root)
    assert result["samples"] == 1
    assert result["dropped"] == {"ambiguous_image": 2, "unsupported_image": 3, "unused_image": 1}
    details = {line["sample"]: line["detail"] for line in dropped(tmp_path / "out")}
    assert "pillow-heif" in details["b.HEIC"] and "rsvg-convert" in details["c.svg"] and "heic" in details["e.jpg"]
    assert "data.members.image" in details["d.x.jpg"] and "data.members.image" in details["a.mask.png"]


def test_what_lies_beside_the_pictures_is_said(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    root = folder(tmp_path / "in", a__jpg=ONE, a__story="x", b__jpg=TWO, b__story="x", captions__csv="file,caption\n")
    with pytest.raises(DataError, match="every sample was dropped"):
        imported(tmp_path / "out", "folder", root)
    assert "2 samples were dropped as missing_caption" in caplog.text and "2 .story" in caplog.text
    assert "prepare.kind=table prepare.source=" in caplog.text and "data.members.caption" in caplog.text
    data = DataConfig(members=MembersConfig(caption=["story"]))
    settings = PrepareConfig(kind="folder", source=str(root), output=str(tmp_path / "again"))
    assert main(Config(settings, data=data))["samples"] == 2


def test_a_picture_is_one_by_its_content(tmp_path: Path) -> None:
    assert found(FolderSource(str(folder(tmp_path, IMG_0001=ONE, IMG_0001__txt="x", a__image=TWO, a__txt="y")))) == {
        "IMG_0001": "x",
        "a.image": "y",
    }
