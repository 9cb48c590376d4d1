"""Folders as people have them: other extensions, named parts, metadata tables, pictures that are not read."""

from __future__ import annotations

import io
import json
import logging
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import prepare_folder
from data_pipeline.commands.prepare import main
from data_pipeline.commands.prepare_folder import FolderSource
from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import CaptionConfig, DataConfig, MembersConfig, PrepareConfig
from tests.data_pipeline.commands.importing import Config, dropped, imported, members
from tests.data_pipeline.photos import jpegs

ONE, TWO = jpegs()[:2]


def folder(path: Path, **files: bytes | str) -> Path:
    """Creates files from keywords, in whose names `__` stands for a dot and `_in_` for a slash."""
    for name, data in files.items():
        place = path / name.replace("__", ".").replace("_in_", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


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


def test_an_empty_caption_is_replaced_by_the_one_in_the_json(tmp_path: Path) -> None:
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


def test_every_row_that_describes_a_picture_counts_and_paths_beat_names(tmp_path: Path, caplog: Any) -> None:
    root = folder(tmp_path / "in", a_in_1__jpg=ONE, b_in_2__jpg=TWO)
    rows = [("a/1.jpg", "one"), ("a/1.jpg", "eins"), ("elsewhere/2.jpg", "by its name")]
    (root / "metadata.csv").write_text("file_name,text\n" + "".join(f"{path},{text}\n" for path, text in rows))
    (root / "b" / "metadata.jsonl").write_text('{"file_name": "2.jpg", "text": "two", "source": "web"}\n')
    assert imported(tmp_path / "out", "folder", root)["samples"] == 2
    written = members(tmp_path / "out" / "00000.tar")
    assert (written["000000000.txt"], written["000000001.txt"]) == (b"one", b"two")
    facts = json.loads(written["000000000.json"])
    assert facts["captions"] == ["one", "eins"] and facts["source"] == "a/1.jpg"
    assert json.loads(written["000000001.json"])["source"] == "web"
    assert "1 samples have several captions" in caplog.text


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


def test_files_next_to_the_pictures_are_reported(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    root = folder(tmp_path / "in", a__jpg=ONE, a__story="x", b__jpg=TWO, b__story="x", captions__csv="file,caption\n")
    with pytest.raises(DataError, match="every sample was dropped"):
        imported(tmp_path / "out", "folder", root)
    assert "2 samples were dropped as missing_caption" in caplog.text and "2 .story" in caplog.text
    assert "prepare.kind=table prepare.source=" in caplog.text and "data.members.caption" in caplog.text
    data = DataConfig(members=MembersConfig(caption=["story"]))
    settings = PrepareConfig(kind="folder", source=str(root), output=str(tmp_path / "again"))
    assert main(Config(settings, data=data))["samples"] == 2


def test_a_picture_is_recognized_by_its_content(tmp_path: Path) -> None:
    assert found(FolderSource(str(folder(tmp_path, IMG_0001=ONE, IMG_0001__txt="x", a__image=TWO, a__txt="y")))) == {
        "IMG_0001": "x",
        "a.image": "y",
    }


@pytest.mark.parametrize(
    "files",
    [
        {"images_in_1__jpg": ONE, "captions_in_1__txt": "one"},
        {"train_in_images_in_1__jpg": ONE, "train_in_captions_in_1__txt": "one", "val_in_captions_in_2__txt": "no"},
        {"photos_in_1_in_a__jpg": ONE, "texts_in_1_in_a__txt": "one", "texts_in_2_in_a__txt": "no"},
        {"a_in_photo__jpg": ONE, "a_in_caption__txt": "one"},
    ],
)
def test_captions_in_a_parallel_folder_or_under_one_name_are_joined(tmp_path: Path, files: dict[str, Any]) -> None:
    source = FolderSource(str(folder(tmp_path, **files)))
    assert list(found(source).values()) == ["one"] and "1 pictures take their captions from" in source.remarks()[0]


@pytest.mark.parametrize(
    "files",
    [
        {"images_in_1__jpg": ONE, "labels_in_1__txt": "0 0.5 0.5 1 1"},
        {"images_in_1__jpg": ONE, "captions_in_1__txt": "one", "notes_in_1__txt": "two"},
        {"a_in_1__jpg": ONE, "a_in_2__jpg": TWO, "a_in_caption__txt": "one"},
        {"a_in_1__jpg": ONE, "a_in_readme__txt": "one"},
        {"cats_in_1__jpg": ONE, "dogs_in_1__txt": "one", "dogs_in_2__jpg": TWO},
        {"photos_in_1_in_a__jpg": ONE, "texts_in_2_in_a__txt": "one"},
        {"photos_in_1_in_a__jpg": ONE, "texts_in_a__txt": "one"},
        {"cats_in_1__jpg": ONE, "dogs_in_1__txt": "one", "cats_in_2__jpg": TWO, "cats_in_2__txt": ""},
    ],
)
def test_captions_are_not_guessed(tmp_path: Path, files: dict[str, Any]) -> None:
    assert set(found(FolderSource(str(folder(tmp_path, **files)))).values()) == {""}


def test_names_of_folders_and_files_are_captions_on_request(tmp_path: Path, caplog: Any) -> None:
    place = folder(tmp_path / "in", big_dog_in_1__jpg=ONE, cat_in_a_grey_one__jpg=TWO, cat_in_b__jpg=TWO)
    (place / "cat" / "b.txt").write_text("its own")
    folders = found(FolderSource(str(place), captions="folder"))
    assert folders == {"big_dog/1.jpg": "big dog", "cat/a_grey_one.jpg": "cat", "cat/b.jpg": "its own"}
    assert found(FolderSource(str(place), captions="name"))["cat/a_grey_one.jpg"] == "a grey one"
    (place / "cat" / "b.txt").unlink()
    with pytest.raises(DataError):
        imported(tmp_path / "out", "folder", place)
    assert "prepare.captions=folder" in caplog.text
    result = imported(tmp_path / "out2", "folder", place, captions="folder")
    assert result["samples"] == 3 and members(tmp_path / "out2" / "00000.tar")["000000000.txt"] == b"big dog"
    with pytest.raises(DataError, match="captions was folder"):
        imported(tmp_path / "out2", "folder", place, captions="name")


def test_names_in_other_unicode_forms_meet(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301.jpg").write_bytes(ONE)
    (tmp_path / "caf\u00e9.txt").write_text("one")
    assert list(found(FolderSource(str(tmp_path))).values()) == ["one"]


def test_a_caption_in_another_encoding_is_read_when_it_is_named(tmp_path: Path, caplog: Any) -> None:
    place = folder(tmp_path / "in", **{"1__jpg": ONE, "1__txt": "caf\u00e9".encode("cp1252")})
    with pytest.raises(DataError):
        imported(tmp_path / "out", "folder", place)
    assert "data.captions.encoding" in caplog.text
    settings = PrepareConfig(kind="folder", source=str(place), output=str(tmp_path / "out2"))
    data = DataConfig(captions=CaptionConfig(encoding="cp1252"))
    assert main(Config(settings, data=data))["samples"] == 1
    assert members(tmp_path / "out2" / "00000.tar")["000000000.txt"].decode() == "caf\u00e9"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pics.zip", b"PK", "unpack it and give the folder"),
        ("in/pics.zip", b"PK", "unpack pics.zip"),
        ("in/pics.tar.gz", b"", "unpack pics.tar.gz$"),
        ("in/list.csv.gz", b"", "there is a table: use prepare.kind=table .*list.csv.gz"),
        ("list.csv.gz", b"", "it is a file; a table of pictures is read with prepare.kind=table"),
        ("pics.tar.gz", b"", "it is an archive: .* tar shards are read with prepare.kind=shards"),
        ("in/data/train.arrow", b"x", "prepare.kind=table"),
    ],
)
def test_a_source_that_is_no_folder_of_pictures_names_the_remedy(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    place = tmp_path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    with pytest.raises(DataError, match=words):
        FolderSource(str(tmp_path / name.partition("/")[0]))


def test_labels_and_unfinished_downloads_are_neither_captions_nor_pictures(tmp_path: Path, caplog: Any) -> None:
    labels = {f"{name}__jpg": ONE for name in "abc"} | {f"{name}__txt": "0 0.5 0.5 0.1 0.1\n" for name in "abc"}
    place = folder(tmp_path / "in", **labels, c__json='{"caption": "of c"}', d__jpg__part=TWO, d__txt="of d")
    assert imported(tmp_path / "out", "folder", place)["dropped"] == {"missing_caption": 2, "unfinished_download": 1}
    assert members(tmp_path / "out" / "00000.tar")["000000002.txt"] == b"of c"
    assert "the texts beside 3 pictures hold boxes of objects" in caplog.text
    assert ".part marks a file that is not complete yet" in dropped(tmp_path / "out")[2]["detail"]
    assert imported(tmp_path / "named", "folder", place, captions="name")["samples"] == 3


def test_names_that_differ_in_case_or_end_with_a_space_are_pairs_and_hidden_pictures_are_counted(
    tmp_path: Path,
) -> None:
    folder(tmp_path, **{"B__JPG": ONE, "b__txt": "of B", "c__jpg": TWO, "c__txt ": "of c"})
    folder(
        tmp_path,
        rest__zip=b"PK",
        **{"D__jpg": ONE, "d__jpg": TWO, "d__txt": "of d", "__e__jpg": ONE, "___x__jpg": "of macOS"},
    )
    source = FolderSource(str(tmp_path))
    assert found(source) == {"B.JPG": "of B", "D.jpg": "", "c.jpg": "of c", "d.jpg": "of d"}
    assert source.remarks() == [
        f"1 archives are not read, such as {tmp_path}/rest.zip: unpack them",
        f"1 pictures are hidden by their names and not used, such as {tmp_path}/.e.jpg",
    ]


def test_captions_beside_labels_of_the_same_name_are_found(tmp_path: Path) -> None:
    folder(tmp_path, images_in_1__jpg=ONE, captions_in_1__txt="one", labels_in_1__txt="0 0.5 0.5 0.1 0.1\n")
    folder(tmp_path, k__jpg=TWO, k__txt="7 0.5 0.5 0.1 0.1\n", k__caption="two")
    assert found(FolderSource(str(tmp_path))) == {"images/1.jpg": "one", "k.jpg": "two"}
    source = FolderSource(str(folder(tmp_path, more_in_1__txt="which?")))
    assert "it is not clear which 1.txt belongs to 1.jpg: put the caption" in source.advice("missing_caption")


def test_a_text_file_that_is_a_dangling_link_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match="it contains no pictures"):
        FolderSource(str(tmp_path))


def test_many_folders_of_texts_and_of_pictures_are_not_compared_one_by_one(tmp_path: Path) -> None:
    for number in range(300):
        for kind, name, content in (("photos", "main.jpg", jpegs()[0]), ("texts", "main.txt", b"one")):
            place = tmp_path / kind / str(number) / name
            place.parent.mkdir(parents=True)
            place.write_bytes(content)
    calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename == prepare_folder.__file__

    sys.setprofile(count)
    try:
        source = FolderSource(str(tmp_path))
    finally:
        sys.setprofile(None)
    assert source.remarks() == ["300 pictures take their captions from a sibling folder or a caption.txt"]
    assert calls < 100 * 300


def test_pictures_that_are_pointers_to_files_elsewhere_are_recognized(tmp_path: Path, caplog: Any) -> None:
    place = folder(tmp_path / "in", **{"1__jpg": "version https://git-lfs.github.com/spec/v1\n", "1__txt": "one"})
    with pytest.raises(DataError):
        imported(tmp_path / "out", "folder", place)
    assert "git lfs pull" in caplog.text


def test_a_table_with_the_name_of_a_text_is_recognized(tmp_path: Path, caplog: Any) -> None:
    place = folder(tmp_path / "in", **{"1__jpg": ONE, "captions__txt": "1.jpg,one\n"})
    with pytest.raises(DataError):
        imported(tmp_path / "out", "folder", place)
    assert "prepare.kind=table prepare.source=" in caplog.text and "captions.txt" in caplog.text


def test_captions_named_after_their_picture_are_found(tmp_path: Path) -> None:
    source = FolderSource(str(folder(tmp_path, a__jpg=ONE, a_caption__txt="of a", b__jpg=TWO, b__txt="of b")))
    assert found(source) == {"a.jpg": "of a", "b.jpg": "of b"}


def test_captions_with_other_names_are_distinguished_from_other_endings(tmp_path: Path) -> None:
    source = FolderSource(str(folder(tmp_path, a__jpg=ONE, other__txt="of a")))
    assert "found 1 .txt; a caption must have its picture's name: a.txt for a.jpg, not other.txt" in source.advice(
        "missing_caption"
    )


def test_a_field_of_the_json_is_named_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = folder(tmp_path / "in", a__jpg=ONE, a__json='{"blip_caption": "a cat", "n": 1}')
    with pytest.raises(DataError, match="every sample was dropped"):
        imported(tmp_path / "no", "folder", pictures)
    assert "fields with text are blip_caption; 'data.captions.sources={\"json:blip_caption\": 1}'" in caplog.text
    sources = DataConfig(captions=CaptionConfig(sources={"json:blip_caption": 1.0}))
    settings = PrepareConfig(kind="folder", source=str(pictures), output=str(tmp_path / "out"))
    assert main(Config(settings, data=sources))["samples"] == 1
    assert members(tmp_path / "out" / "00000.tar")["000000000.txt"] == b"a cat"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://bucket/pictures", "only local folders are read: copy it first"),
        ("{place}/a.jpg", "give its folder"),
        ("{place}/list.csv", "prepare.kind=table"),
        ("{place}/*.jpg", "give the folder itself, without a pattern"),
    ],
)
def test_a_source_that_is_no_folder_says_what_to_give(tmp_path: Path, source: str, words: str) -> None:
    folder(tmp_path, a__jpg=ONE, list__csv="image,caption")
    with pytest.raises(DataError, match=words):
        FolderSource(source.format(place=tmp_path))


def test_a_raw_picture_that_is_a_tiff_inside_has_a_remedy(tmp_path: Path) -> None:
    source = FolderSource(str(folder(tmp_path, a__jpg=ONE, a__txt="x", b__dng=b"II*\0" + bytes(50))))
    with pytest.raises(BadSample, match="dng: develop it first"):
        source.read(1)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_several_captions_of_a_picture_are_all_kept(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.jpg": ONE, "a.0.txt": b"one", "a.1.txt": b"two", "b.jpg": TWO, "b.txt": b"same", "b.caption": b"same"}
    source = folder(tmp_path / "in", **{name.replace(".", "__"): data for name, data in files.items()})
    if kind == "shards":
        (tmp_path / "in.tar").write_bytes(archive(files))
        source = tmp_path / "in.tar"
    assert imported(tmp_path / "out", kind, source)["samples"] == 2
    written = members(tmp_path / "out" / "00000.tar")
    first, second = sorted(name for name in written if name.endswith(".json"))
    assert json.loads(written[first])["captions"] == ["one", "two"] and "captions" not in json.loads(written[second])
    assert "1 samples have several captions" in caplog.text and "dropped" not in caplog.text


def test_copies_in_folders_of_the_system_are_not_part_of_the_data_set(tmp_path: Path, caplog: Any) -> None:
    for name in ("", ".ipynb_checkpoints/", "__MACOSX/", "@eaDir/a.jpg/", "sub/.thumbnails/"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "a.jpg").write_bytes(ONE) if name != "@eaDir/a.jpg/" else None
        (tmp_path / name / "a.txt").write_text("one")
    assert found(FolderSource(str(tmp_path))) == {"a.jpg": "one"}
    assert "are not searched" in caplog.text and "and 1 more" in caplog.text


def test_linked_folders_are_searched_once_and_loops_end(tmp_path: Path) -> None:
    folder(tmp_path, own_in_a__jpg=ONE, own_in_a__txt="one", own_in_deep_in_b__jpg=TWO, own_in_deep_in_b__txt="two")
    folder(tmp_path, elsewhere_in_c__jpg=ONE, elsewhere_in_c__txt="three")
    own = tmp_path / "own"
    (own / "linked").symlink_to(tmp_path / "elsewhere")
    (own / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(own)
    (own / "deep" / "loop").symlink_to(own)
    (own / "again").symlink_to(own / "deep")
    (own / "lost.jpg").symlink_to(tmp_path / "none.jpg")
    source = FolderSource(str(own))
    names = [source.name(number) for number in range(len(source))]
    assert names == ["a.jpg", "deep/b.jpg", "linked/c.jpg", "lost.jpg"]
    with pytest.raises(BadSample, match=r"lost\.jpg: No such file"):
        source.read(3)


@pytest.mark.parametrize(("names", "warned"), [(("train", "test"), True), (("train", "trains"), False)])
def test_several_splits_in_one_folder_are_reported(tmp_path: Path, caplog: Any, names: Any, warned: bool) -> None:
    for name in names:
        folder(tmp_path / name / "cat", a__jpg=ONE, a__txt="one")
    assert len(FolderSource(str(tmp_path))) == 2
    assert ("it contains several splits (test, train)" in caplog.text) == warned
