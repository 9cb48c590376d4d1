"""Tables as people have them: separators, headers, quotes, encodings, JSON, Parquet with pictures; damage named by
line."""

from __future__ import annotations

import base64
import bz2
import contextlib
import csv
import gzip
import io
import json
import logging
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.commands.prepare_sources import FolderSource, TableSource
from data_pipeline.common.errors import BadSample, DataError
from data_pipeline.config import MembersConfig
from data_pipeline.tables.arrow import ArrowRows
from data_pipeline.tables.table import open_table
from tests.data_pipeline.commands.importing import dropped, imported, members
from tests.data_pipeline.photos import jpegs

ONE, TWO = jpegs()[:2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "1.jpg").write_bytes(ONE)
    (tmp_path / "2.jpg").write_bytes(TWO)
    return tmp_path


def captions(source: TableSource) -> list[str]:
    found = []
    for number in range(len(source)):
        item = source.read(number)
        assert item.image in (ONE, TWO)
        found.append((item.caption or b"").decode())
    return found


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("list.csv", data)
    return out.getvalue()


CSV = b"file_name,text\n1.jpg,one\n2.jpg,two\n"
LOCKED = zipped(CSV).replace(b"PK\x01\x02" + bytes([20, 3, 20, 0, 0]), b"PK\x01\x02" + bytes([20, 3, 20, 0, 1]))
"""An archive whose entry is marked as encrypted."""
COCO = {
    "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
    "annotations": [{"image_id": 8, "caption": "two"}, {"image_id": 7, "caption": "one"}],
}
KARPATHY = {"images": [{"filename": f"{i}.jpg", "sentences": [{"raw": text}]} for i, text in ((1, "one"), (2, "two"))]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"image, caption\n1.jpg, A dragon flying\n2.jpg, A cat\n", ["A dragon flying", "A cat"]),
        ("a.csv", b"image,caption\n1.jpg,A cat, asleep, at home\n2.jpg,two\n", ["A cat, asleep, at home", "two"]),
        ("a.csv", b"caption,image\nA cat, asleep,1.jpg\ntwo,2.jpg\n", ["A cat, asleep", "two"]),
        ("a.csv", b"image;caption\n1.jpg;A dragon\n2.jpg;A cat, asleep\n", ["A dragon", "A cat, asleep"]),
        ("a.csv", b"image,caption\n'1.jpg','A cat, it''s late'\n'2.jpg',two\n", ["A cat, it's late", "two"]),
        ("a.csv", b"'image';'caption'\n'1.jpg';'one; and\nmore'\n'2.jpg';'it\\'s'\n", ["one; and\nmore", "it's"]),
        ("a.csv", b'image,caption\n\'1.jpg\',"say, ""hi"""\n\'2.jpg\',"two"\n', ['say, "hi"', "two"]),
        ("a.csv", b"'1.jpg','one'\n'2.jpg','two'\n", ["one", "two"]),
        ("a.csv", b"image,caption\n1.jpg,'tis the season\n2.jpg,'one'\n", ["'tis the season", "'one'"]),
        ("a.csv", b"sep=;\r\nimage;caption\r\n1.jpg;one\r\n2.jpg;two\r\n", ["one", "two"]),
        ("a.csv", b"image,caption\n1.jpg,on\0e\n2.jpg,a caption without any\n", ["on\0e", "a caption without any"]),
        ("a.csv", b"# from x\n# of 2024, with text\nimage,caption\n1.jpg,one\n2.jpg,two\n", ["one", "two"]),
        ("a.csv", b'"# exported"\r\n\r\nimage;caption\r\n1.jpg;one\r\n2.jpg;two\r\n', ["one", "two"]),
        ("a.csv", b"\xef\xbb\xbfMy pictures\nimage,caption\n1.jpg,one\n2.jpg,two\n", ["one", "two"]),
        ("a.tsv", b"#image\tcaption\n1.jpg\tone\n2.jpg\ttwo\n", ["one", "two"]),
        ("a.tsv", b"// from x\n1.jpg\tone\n2.jpg\ttwo\n", ["one", "two"]),
        ("a.txt", b"image,caption\n1.jpg,one\n2.jpg,two\n", ["one", "two"]),
        ("a.txt", b"1.jpg#0\tone\n2.jpg#0\ttwo\n", ["one", "two"]),
        ("a.txt", b"1.jpg A child in pink\n2.jpg A girl, asleep\n", ["A child in pink", "A girl, asleep"]),
        (
            "a.csv",
            b"image_name| comment_number| comment\n1.jpg| 0| one\n2.jpg| 1| two | three\n",
            ["one", "two | three"],
        ),
        (
            "a.csv",
            b'"image","caption"\n"1.jpg","say ""hi"", please"\n"2.jpg","two\nlines"\n',
            ['say "hi", please', "two\nlines"],
        ),
        ("a.csv", b'image,caption\n1.jpg,"A 5 inch pipe\n2.jpg,two\n', ['"A 5 inch pipe', "two"]),
        ("a.csv", b'text,image\n"one\nat x.jpg",1.jpg\n"two\n",2.jpg\n', ["one\nat x.jpg", "two\n"]),
        ("a.csv", b'image,caption\n1.jpg,A 5" pipe\n2.jpg,two\n', ['A 5" pipe', "two"]),
        ("a.csv", b'image,caption\n1.jpg,one\n2.jpg,"never closed\n', ["one", '"never closed']),
        ("a.csv", b"\xef\xbb\xbfimage,caption\r\n1.jpg,one\r\n2.jpg,two", ["one", "two"]),
        ("a.csv", b"image,caption\r1.jpg,one\r2.jpg,two\r", ["one", "two"]),
        ("a.csv", b"image,caption\n1.jpg,one\r2.jpg,two\n", ["one", "two"]),
        ("a.csv", b"image,caption\r1.jpg,one\n2.jpg,two\r\n", ["one", "two"]),
        (
            "a.csv",
            b'image,caption\n1.jpg,"say \\"hi\\", please"\n2.jpg,"a 5\\" pipe"\n',
            ['say "hi", please', 'a 5" pipe'],
        ),
        ("a.csv", b"image,caption,caption\n1.jpg,one,uno\n2.jpg,,two\n", ["one", "two"]),
        ("a.csv", b"image,caption,caption_0\n1.jpg,one,uno\n2.jpg,,two\n", ["one", "two"]),
        ("a.csv", b"\n\nImage Path,Image-Caption\n1.jpg,one\n\n2.jpg,two\n\n", ["one", "two"]),
        ("a.csv", "image,caption\n1.jpg,ein Hügel\n2.jpg,two\n".encode("cp1252"), ["ein Hügel", "two"]),
        ("a.csv", "image,caption\n1.jpg,東京\n2.jpg,two\n".encode("utf-16"), ["東京", "two"]),
        ("a.csv", "image,caption\n1.jpg,one\n2.jpg,two\n".encode("utf-16-le"), ["one", "two"]),
        ("a.tsv", b"caption\tpath\none\t1.jpg\ntwo\t2.jpg\n", ["one", "two"]),
        ("a.csv", b"image,caption,,\n1.jpg,one,,\n2.jpg,two,,\n", ["one", "two"]),
        ("a.csv", b"image,caption\n1.jpg,one,,\n2.jpg,two\n", ["one", "two"]),
        ("a.csv", b"image,caption\n1.jpg,\"['one', 'other']\"\n2.jpg,two\n", ["one", "two"]),
        ("a.csv", b"image;caption\n1.jpg;{'text': 'one'}\n2.jpg;[{\"raw\": \"two\"}]\n", ["one", "two"]),
        ("a.csv", b"image;caption\n1.jpg;{not a list}\n2.jpg;[1, 2]\n", ["{not a list}", "[1, 2]"]),
        ("a.csv", b"image,caption\nC:\\photos\\1.jpg,one\n.\\2.jpg,two\n", ["one", "two"]),
        ("a.csv", b"image,caption\n1.jpg,nan\n2.jpg,two\n", ["", "two"]),
        ("a.tsv", b"image\tcaption\n1.jpg\t\\N\n2.jpg\ttwo\n", ["", "two"]),
        ("a.csv", b"image,caption\n1.jpg,one\n2.jpg,\xe2\x80\x8b\n", ["one", ""]),
        ("a.csv", b"image_id,caption\n1.0,one\n2.0,two\n", ["one", "two"]),
        ("a.csv.gz", gzip.compress(CSV, mtime=0), ["one", "two"]),
        ("a.csv.bz2", bz2.compress(CSV), ["one", "two"]),
        ("a.csv.xz", lzma.compress(CSV), ["one", "two"]),
        ("a.zip", zipped(CSV), ["one", "two"]),
        ("a.jsonl", b'{"file_name": "1.jpg", "text": "one"}\r\n{"file_name": "2.jpg", "text": "two"}', ["one", "two"]),
        ("a.json", b'[{"image": "1.jpg", "caption": "one"}, {"image": "2.jpg", "caption": "two"}]', ["one", "two"]),
        ("a.json", json.dumps(COCO, indent=1).encode(), ["one", "two"]),
        ("a.json", json.dumps(KARPATHY).encode(), ["one", "two"]),
        ("a.json", b'{"1.jpg": "one", "2.jpg": ["two", "zwei"]}', ["one", "two"]),
        ("a.json", b'{"1.jpg": ["one", "eins"], "2.jpg": ["two", "zwei"]}', ["one", "two"]),
        ("a.csv", b"image,caption\n%31.jpg,one\nfile%3A///x/2.jpg,two\n", ["one", "two"]),
        ("a.json", b'{"1.jpg": {"caption": "one"}, "2.jpg": {"caption": "two", "x": 1}}', ["one", "two"]),
        ("a.json", b'{"image": ["1.jpg", "2.jpg"], "prompt": ["one", "two"]}', ["one", "two"]),
        (
            "a.json",
            b'{"info": {}, "data": [{"path": "1.jpg", "text": "one"}, {"path": "2.jpg", "text": "two"}]}',
            ["one", "two"],
        ),
        ("a.jsonl", b'{"image": {"path": "1.jpg"}, "caption": {"text": "one"}}\n', ["one"]),
        ("a.jsonl", b'{"image": "1.jpg", "captions": ["one", "eins"], "tags": ["a", "b"]}\n', ["one"]),
        ("a.jsonl", b'{"image": "1.jpg", "caption": "one", "objects": [{"caption": "a box"}]}\n', ["one"]),
        ("a.jsonl", b'{"image": "1.jpg", "conversations": [{"from": "gpt", "value": "one"}]}\n', ["one"]),
        ("a.jsonl", b'["1.jpg", "one"]\n["2.jpg", "two"]\n', ["one", "two"]),
        ("a.json", b'[["image", "score", "text"], ["1.jpg", 1, "one"], ["2.jpg", 2, "two"]]', ["one", "two"]),
        (
            "a.json",
            b'{"train": [{"image": "1.jpg", "text": "one"}], "val": [{"image": "2.jpg", "text": "two", "x": 1}]}',
            ["one", "two"],
        ),
        ("a.json", b'{"path": "1.jpg",\n "text": "one"}\n{"path": "2.jpg",\n "text": "two"}\n', ["one", "two"]),
    ],
)
def test_the_kind_of_a_table_is_detected_from_its_content(
    place: Path, name: str, content: bytes, expected: list[str]
) -> None:
    (place / name).write_bytes(content)
    assert captions(TableSource(str(place / name))) == expected


def embedded(column: str) -> pa.Array:
    rows: dict[str, list[Any]] = {
        "struct": [{"bytes": ONE, "path": "a.jpg"}, {"bytes": TWO, "path": None}],
        "list of structs": [[{"bytes": ONE, "path": None}], [{"bytes": TWO, "path": None}]],
        "binary": [ONE, TWO],
        "list of binary": [[ONE], [TWO]],
        "struct with paths": [{"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}],
        "base64": [base64.b64encode(ONE).decode(), "data:image/jpeg;base64," + base64.b64encode(TWO).decode()],
        "base64 for URLs": [base64.urlsafe_b64encode(one).decode().rstrip("=") for one in (ONE, TWO)],
        "hexadecimal": [ONE.hex(), "\\x" + TWO.hex()],
        "as Python writes it": [str(ONE), str(TWO)],
        "paths": ["1.jpg", "2.jpg"],
        "list of numbers": [list(ONE), list(TWO)],
    }
    return pa.array(rows[column])


@pytest.mark.parametrize("name", ["image", "images", "jpg", "foto"])
@pytest.mark.parametrize(
    "column",
    [
        "struct",
        "list of structs",
        "binary",
        "list of binary",
        "struct with paths",
        "base64",
        "base64 for URLs",
        "hexadecimal",
        "as Python writes it",
        "paths",
        "list of numbers",
    ],
)
def test_pictures_in_parquet_are_used(place: Path, column: str, name: str) -> None:
    table = pa.table({"text": ["one", "two"], name: embedded(column), "embedding": [b"\0" * 99, b"\1\0"]})
    pq.write_table(table, place / "a.parquet", row_group_size=1)
    result = imported(place / "out", "table", place / "a.parquet")
    assert result["samples"] == 2 and not result["dropped"]
    found = members(place / "out" / "00000.tar")
    assert [found["000000000.jpg"], found["000000001.jpg"]] == [ONE, TWO]
    facts = json.loads(found["000000000.json"])
    assert set(facts) == {"source", "width", "height"}, "binary data does not go into the .json"


def test_rows_of_an_arrow_stream_in_about_their_order_are_read_once(place: Path, monkeypatch: Any) -> None:
    table = pa.table({"image": [f"{number}.jpg" for number in range(600)], "caption": ["one"] * 600})
    with pa.ipc.new_stream(place / "a.arrow", table.schema) as out:
        out.write_table(table, 1)
    rows, opened, real = open_table(place / "a.arrow"), list[int](), ArrowRows._opened

    def counted(self: ArrowRows, first: int) -> Any:
        opened.append(first)
        return real(self, first)

    monkeypatch.setattr(ArrowRows, "_opened", counted)
    order = [min(number ^ 63, 599) for number in range(600)]
    assert [rows.row(number)["image"] for number in order] == [f"{number}.jpg" for number in order]
    assert len(opened) == 1


def test_a_table_of_pictures_alone_says_what_is_missing(place: Path) -> None:
    pq.write_table(pa.table({"image": embedded("struct")}), place / "a.parquet")
    with pytest.raises(DataError, match=r"one of captions.* it has image; name them with 'data.members"):
        TableSource(str(place / "a.parquet"))


def test_several_tables_are_one(place: Path) -> None:
    (place / "data").mkdir()
    for number, (picture, text) in enumerate(((ONE, "one"), (TWO, "two"))):
        part = place / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.table({"image": [{"bytes": picture, "path": None}], "text": [text]}), part)
    assert captions(TableSource(str(place / "data" / "*.parquet"))) == ["one", "two"]
    (place / "data").rename(place / "data.parquet")  # as Spark calls the folder
    (place / "data" / "_delta_log").mkdir(parents=True)
    (place / "data.parquet").rename(place / "data" / "all.parquet")
    for other in ("._train-00000-of-00002.parquet", "_delta_log/0.checkpoint.parquet"):
        (place / "data" / other).write_bytes(b"of macOS, of Delta Lake")
    assert captions(TableSource(str(place / "data"))) == ["one", "two"]
    (place / "text").mkdir()
    (place / "text" / "part-0.csv").write_bytes(CSV)
    with pytest.raises(DataError, match=r"give one of its tables; '.*/text/\*\*/\*\.csv' names all its \.csv files"):
        TableSource(str(place / "text"))


def test_parquet_rows_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tables.arrow._BATCH_BYTES", 1 << 14)
    rows = [{"image": {"bytes": ONE, "path": f"{n}.jpg"}, "text": f"number {n}"} for n in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=150, use_dictionary=False)
    source = TableSource(str(tmp_path / "a.parquet"))
    order = [*range(400), 0, 399, 149, 150, 151, 10]
    assert [source.read(number).caption for number in order] == [f"number {number}".encode() for number in order]
    (part,) = source.parts
    assert len(part._kept) <= 3 and max(len(batch) for _, batch in part._kept) <= 32  # type: ignore[attr-defined]


def test_damage_inside_parquet_names_the_table_and_the_row(place: Path) -> None:
    rows = {"path": ["1.jpg"] * 400, "caption": [f"number {number}" for number in range(400)]}
    pq.write_table(pa.table(rows), place / "a.parquet", row_group_size=100, use_dictionary=False)
    with (place / "a.parquet").open("r+b") as file:
        file.seek(pq.read_metadata(place / "a.parquet").row_group(2).column(1).data_page_offset)
        file.write(b"\xff" * 40)
    source = TableSource(str(place / "a.parquet"))
    assert source.read(199).caption == b"number 199"
    with pytest.raises(
        DataError, match=r"a\.parquet: not a readable table \(it is damaged at or after row 201: .*again"
    ):
        source.read(200)


def test_row_groups_may_be_empty(place: Path) -> None:
    table = pa.table({"path": ["1.jpg", "2.jpg"], "caption": ["one", "two"]})
    with pq.ParquetWriter(place / "a.parquet", table.schema) as out:
        for part in (table[:0], table[:1], table[:0], table[:0], table[1:], table[:0]):
            out.write_table(part)
    assert captions(TableSource(str(place / "a.parquet"))) == ["one", "two"]


def test_lists_of_captions_are_alternatives(place: Path, caplog: Any) -> None:
    pq.write_table(
        pa.table({"path": ["1.jpg", "2.jpg"], "caption": [["a dog", "a small dog"], ["a cat"]]}), place / "a.parquet"
    )
    assert imported(place / "out", "table", place / "a.parquet")["samples"] == 2
    found = members(place / "out" / "00000.tar")
    assert (found["000000000.txt"], found["000000001.txt"]) == (b"a dog", b"a cat")
    assert json.loads(found["000000000.json"])["captions"] == ["a dog", "a small dog"]
    assert "data.captions.sources={json:captions: 1}" in caplog.text


def test_rows_that_cannot_be_parsed_are_named_by_their_line(place: Path) -> None:
    (place / "a.csv").write_text('score,image,caption\n1,1.jpg,one\n2.jpg\n\n3,2.jpg,"two\nlines"\n4\n')
    result = imported(place / "out", "table", place / "a.csv")
    assert result["samples"] == 2 and result["dropped"] == {"bad_row": 2}
    assert [line["detail"][:8] for line in dropped(place / "out")] == ["line 3: ", "line 7: "]
    (place / "b.jsonl").write_text('{"image": "1.jpg", "text": "one"}\n{"image": broken\n\n[1]\n')
    result = imported(place / "out2", "table", place / "b.jsonl")
    assert result["samples"] == 1 and result["dropped"] == {"bad_row": 2}
    assert [line["detail"][:8] for line in dropped(place / "out2")] == ["line 2: ", "line 4: "]


def test_broken_pictures_in_a_table_do_not_fill_the_report(place: Path) -> None:
    rows = [
        {"image": {"bytes": b"\xff\xd8\xff" + bytes(200_000), "path": None}, "text": "x"},
        {"image": None, "text": "y"},
    ]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"image": {"bytes": ONE, "path": None}, "text": "z"}]), place / "a.parquet"
    )
    result = imported(place / "out", "table", place / "a.parquet")
    assert result["samples"] == 1 and sum(result["dropped"].values()) == 2
    assert (place / "out" / "dropped.jsonl").stat().st_size < 1000
    assert dropped(place / "out")[0]["sample"] == "a.parquet#1"


def test_bytes_that_are_not_a_picture_are_not_taken_for_a_path(place: Path) -> None:
    pq.write_table(
        pa.table({"image": [b"<html>gone</html>", b"1.jpg", b"\xff\xd8\0"], "text": ["x"] * 3}), place / "a.parquet"
    )
    assert imported(place / "out", "table", place / "a.parquet")["dropped"] == {"decode_error": 2}
    assert "error page" in dropped(place / "out")[0]["detail"]
    pq.write_table(pa.table({"image": [[1, 2], [2, 1]], "text": ["x"] * 2}), place / "pixels.parquet")
    with pytest.raises(BadSample, match="neither a path nor a picture"):
        TableSource(str(place / "pixels.parquet")).read(0)


def coco(place: Path) -> Path:
    """annotations/captions_val2017.json, its pictures in val2017."""
    for name in ("annotations", "val2017"):
        (place / name).mkdir()
    for name in ("1.jpg", "2.jpg"):
        (place / name).rename(place / "val2017" / name)
    (place / "annotations" / "captions_val2017.json").write_text(json.dumps(COCO))
    return place / "annotations" / "captions_val2017.json"


def flickr(place: Path) -> Path:
    """captions.txt, its pictures in Images."""
    (place / "Images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (place / name).rename(place / "Images" / name)
    (place / "captions.txt").write_text("image,caption\n1.jpg,one\n2.jpg,two\n")
    return place / "captions.txt"


def numbered(place: Path) -> Path:
    """Numbers of COCO's pictures, as a notebook writes them."""
    for number in (1, 2):
        (place / f"{number}.jpg").rename(place / f"{number:012}.jpg")
    (place / "a.csv").write_text("image_id,caption\n1,one\n2,two\n")
    return place / "a.csv"


@pytest.mark.parametrize("layout", [coco, flickr, numbered])
def test_pictures_in_another_folder_are_found(place: Path, layout: Callable[[Path], Path]) -> None:
    assert captions(TableSource(str(layout(place)))) == ["one", "two"]


def test_a_row_that_names_an_unfinished_download_is_refused(place: Path) -> None:
    (place / "x.jpg.part").write_bytes(ONE)
    (place / "a.csv").write_text("image,caption\nx.jpg.part,one\n")
    with pytest.raises(BadSample, match=r"unfinished_download: \.part marks a file that is not complete yet"):
        TableSource(str(place / "a.csv")).read(0)


def test_a_folder_of_pictures_can_be_named_and_equal_names_are_not_guessed(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    for folder, picture in (("a", ONE), ("b", TWO)):
        (place / folder / "x.jpg").write_bytes(picture)
    (place / "list.csv").write_text("image,caption\nx.jpg,one\n")
    with pytest.raises(BadSample, match=r"several files have this name.*prepare\.images"):
        TableSource(str(place / "list.csv")).read(0)
    assert TableSource(str(place / "list.csv"), images=str(place / "b")).read(0).image == TWO
    with pytest.raises(DataError, match=r"prepare\.images=nowhere"):
        TableSource(str(place / "list.csv"), images="nowhere")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"cats/x.jpg": "no", "dogs/x.jpg": "one"}, ["one"]),
        ({"dogs/x.jpg": "one", "cats/x.jpg": "no"}, ["one"]),
        ({"/home/me/cats/x.jpg": "no", "/home/me/dogs/x.jpg": "one"}, ["one"]),
        ({"C:\\a\\x.jpg": "no", "C:\\b\\x.jpg": "no"}, []),
        ({"x.jpg#0": "one", "x.jpg#1": "two"}, ["one", "two"]),
        ({"/home/me/downloads/x.jpg": "one"}, ["one"]),
        ({"dogs/x.jpg": "one", "/home/me/dogs/x.jpg": "two", "/home/me/cats/x.jpg": "no"}, ["one", "two"]),
        ({"/home/me/pets/dogs/x.jpg": "one"}, ["one"]),
    ],
)
@pytest.mark.parametrize("kind", ["table", "folder"])
def test_a_picture_that_is_missing_is_not_replaced_by_one_of_its_name(
    tmp_path: Path, rows: dict[str, str], expected: list[str], kind: str, caplog: Any
) -> None:
    (tmp_path / "in" / "dogs").mkdir(parents=True)
    (tmp_path / "in" / "dogs" / "x.jpg").write_bytes(ONE)
    table = tmp_path / "in" / "metadata.jsonl"
    table.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows.items()))
    if kind == "table":
        source = TableSource(str(table))
        found = []
        for number in range(len(source)):
            with contextlib.suppress(BadSample):
                found.append(source.read(number).caption)
        assert found == [text.encode() for text in expected]
    else:
        item = FolderSource(str(tmp_path / "in")).read(0)
        assert [item.caption or b""] == [text.encode() for text in expected[:1] or [""]]
        assert item.meta.get("captions", expected[:1]) == expected
        lost = len(rows) - len(expected)
        assert (f"{lost} of {len(rows)} rows describe no picture of this folder" in caplog.text) == (lost > 0)


@pytest.mark.parametrize(("folders", "other"), [("dogs", "/me/dogs/z.jpg"), ("dogs cats", "/me/birds/none.jpg")])
def test_folders_that_agree_elsewhere_or_exist_distinguish_pictures(tmp_path: Path, folders: str, other: str) -> None:
    for folder in folders.split():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "z.jpg").write_bytes(TWO)
    (tmp_path / "dogs" / "x.jpg").write_bytes(ONE)
    (tmp_path / "a.csv").write_text(f"image,caption\n/me/cats/x.jpg,no\n{other},two\n")
    with pytest.raises(
        BadSample, match=r"cats/x\.jpg: there is no such file; .*dogs/x\.jpg has the same name but is a different"
    ):
        TableSource(str(tmp_path / "a.csv")).read(0)


def test_further_pictures_and_captions_of_a_table_are_reported(place: Path, caplog: Any) -> None:
    (place / "a.jsonl").write_text('{"images": ["1.jpg", "2.jpg"], "text": "one"}\n')
    source = TableSource(str(place / "a.jsonl"))
    assert captions(source) == captions(source) == ["one"]
    assert source.remarks() == ["1 rows hold several pictures, of which the first is used"]
    more = [{"image_id": 9, "caption": "of none"}, {"image_id": 8.0, "caption": "zwei"}]
    (place / "a.json").write_text(json.dumps({**COCO, "annotations": COCO["annotations"] + more}))
    assert TableSource(str(place / "a.json")).read(1).meta["captions"] == ["two", "zwei"]
    assert "a.json: captions whose image_id is not among the images are not used: 1" in caplog.text
    (place / "b.json").write_text('{"image": "1.jpg",\n"text": "one"}\n{"image": "2.jpg",\n"text": "two"}\n{"image" 3}')
    assert captions(TableSource(str(place / "b.json"))) == ["one", "two"]
    assert "it cannot be parsed from line 5 on" in caplog.text


def test_columns_are_named_by_the_settings(place: Path) -> None:
    (place / "a.csv").write_text("Foto,Bildtext,text\n1.jpg,one,no\n2.jpg,two,no\n")
    assert captions(TableSource(str(place / "a.csv"), MembersConfig(image=["foto"], caption=["bildtext"]))) == [
        "one",
        "two",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"<!doctype html>", "error page"),
        ("a.jsonl", b'# from x\n{"image": "1.jpg", "caption": "one"}\n', "stand above the JSON: remove them"),
        ("a.db", b"SQLite format 3\0", "SQLite"),
        ("a.xlsx", b"PK\x03\x04junk", "not a readable table"),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)[:20], "not a readable table"),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)[:10] + b"\xff" * 30, "not a readable table .*invalid"),
        ("a.zip", LOCKED, "password required for extraction; unpack the archive and give the table"),
        ("a.json", b'{"a": [1, 2', "JSON"),
        ("a.jsonl", b"{'image': '1.jpg'}\n{'image': '2.jpg'}\n", "line 1: .* enclosed in double quotes"),
        ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", "download or export it again"),
        ("a.json", b'{"image": ["1.jpg", "2.jpg"], "text": ["a", "b", "c"]}', "2 in image, 3 in text"),
        ("a.csv", b"url,caption\nhttp://x/1.jpg,one\n", "URLs; download the pictures with img2dataset"),
        ("a.csv", b"url,caption\nhttp://x/%s.jpg,one\n" % (b"1" * 300), "URLs; download the pictures with img2dataset"),
        ("a.csv", b"image,caption\n", "it has no rows"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.pkl", b"\x80\x04\x95" + bytes(99), "pickle"),
        ("a.feather", b"FEA1" + bytes(99), r"Feather file of version 1: save it as \.parquet"),
        ("a.yaml", b"1.jpg: one\n2.jpg: two\n", r"a \.yaml file: save it as \.json"),
    ],
)
def test_a_file_that_is_no_table_is_reported_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        TableSource(str(tmp_path / name))


PAIRS = [("1.jpg", "one"), ("2.jpg", "two")]


@pytest.mark.parametrize(
    "value",
    [
        {"columns": ["image", "caption"], "index": [0, 1], "data": [list(pair) for pair in PAIRS]},
        {"image": {"0": "1.jpg", "1": "2.jpg"}, "caption": {"0": "one", "1": "two"}},
        {"1": "one", "2": "two"},
        [{"data": {"image": name}, "meta": {"caption": text, "score": 1}} for name, text in PAIRS],
        [
            {
                "image": name,
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe."},
                    {"from": "gpt", "value": text},
                ],
            }
            for name, text in PAIRS
        ],
        [{"image": name, "texts": [{"user": "Describe.", "assistant": text}]} for name, text in PAIRS],
        [{"image_id": int(name[0]), "caption": text} for name, text in PAIRS],
        [{"url": f"https://there/{name}?w=9", "caption": text} for name, text in PAIRS],
        [{"image": f"file:///gone/{name}", "Caption 1": text, "Caption 2": "other"} for name, text in PAIRS],
    ],
)
def test_json_as_other_programs_write_it(place: Path, value: Any) -> None:
    (place / "a.json").write_text(json.dumps(value))
    assert captions(TableSource(str(place / "a.json"))) == ["one", "two"]


def test_numbered_columns_are_alternatives_and_nan_is_not_a_caption(place: Path) -> None:
    (place / "a.csv").write_text("image,caption_1,caption_2\n1.jpg,one,uno\n2.jpg,,dos\n")
    source = TableSource(str(place / "a.csv"))
    assert captions(source) == ["one", "dos"] and source.read(0).meta["captions"] == ["one", "uno"]
    (place / "b.jsonl").write_text('{"image": "1.jpg", "caption": NaN}\n{"image": "2.jpg", "caption": "two"}\n')
    assert captions(TableSource(str(place / "b.jsonl"))) == ["", "two"]


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_other_compressions_are_unpacked(place: Path, codec: str) -> None:
    (place / "a.csv").write_bytes(pa.compress(CSV, "lz4" if codec == "lz4" else codec, asbytes=True))
    if codec == "lz4":
        with pa.CompressedOutputStream(str(place / "a.csv"), "lz4") as out:
            out.write(CSV)
    assert captions(TableSource(str(place / "a.csv"))) == ["one", "two"]


def test_columns_that_python_cannot_hold_or_that_occur_twice_do_no_harm(place: Path) -> None:
    columns = [
        pa.array([ONE, TWO]),
        pa.array(["one", "two"]),
        pa.array(["x", "y"]),
        pa.array([1, 2], pa.timestamp("ns")),
        pa.array([{"at": 1}, {"at": 2}], pa.struct([("at", pa.timestamp("ns"))])),
    ]
    pq.write_table(pa.table(columns, names=["image", "text", "text", "made", "deep"]), place / "a.parquet")
    source = TableSource(str(place / "a.parquet"))
    assert captions(source) == ["one", "two"] and "1970" in source.read(0).meta["made"]


def test_a_saved_dataset_and_its_class_names_are_read(place: Path, caplog: Any) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["grey_cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": ONE}, {"bytes": TWO}], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split, part in (("train", table[:1]), ("validation", table[1:])):
        (place / "saved" / split).mkdir(parents=True)
        with pa.ipc.new_stream(str(place / "saved" / split / "data-00000-of-00001.arrow"), table.schema) as out:
            out.write_table(part)
        (place / "saved" / split / "cache-123.arrow").write_bytes(b"of datasets.map")
    assert captions(TableSource(str(place / "saved"))) == ["grey cat", "dog"]
    assert "several splits (train, validation), all of which are read" in caplog.text
    pq.write_table(table, place / "a.parquet")
    assert captions(TableSource(str(place / "a.parquet"))) == ["grey cat", "dog"]


def test_a_remedy_is_named_when_most_samples_are_dropped(place: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    (place / "a.csv").write_text("image,caption\nx.jpg,one\ny.jpg,two\n1.jpg,three\n")
    imported(place / "out", "table", place / "a.csv")
    assert "2 samples were dropped as missing_image" in caplog.text and "prepare.images" in caplog.text


def test_the_encoding_of_a_table_may_be_given(place: Path) -> None:
    (place / "a.csv").write_bytes("image,caption\n1.jpg,\u4e2d\u6587\n2.jpg,two\n".encode("gb18030"))
    assert captions(TableSource(str(place / "a.csv"), encoding="gb18030")) == ["\u4e2d\u6587", "two"]


def test_a_long_cell_needs_no_change_of_a_limit_that_all_threads_share(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "a.csv").write_bytes(b'image,caption\n1.jpg,"' + b"long " * 40_000 + b'"\n')
    source = TableSource(str(place / "a.csv"))
    monkeypatch.setattr(csv, "field_size_limit", None)
    assert len(source.read(0).caption or b"") == 200_000


def test_joined_captions_are_counted_once(place: Path) -> None:
    (place / "a.csv").write_bytes(b"image,caption\n1.jpg,a red, round ball\n2.jpg,two\n")
    source = TableSource(str(place / "a.csv"))
    assert captions(source) == captions(source) == ["a red, round ball", "two"]
    assert source.remarks()[0].startswith("1 captions contain unquoted separators")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.orc", b"ORC\x08", "ORC file: export the table as .parquet"),
        ("a.json", b'{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"bbox": [1]}]}', "one of captions"),
    ],
)
def test_tables_without_captions_or_of_other_programs(place: Path, name: str, content: bytes, words: str) -> None:
    (place / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        TableSource(str(place / name))


def test_pictures_of_a_table_that_are_not_read_have_a_remedy(place: Path) -> None:
    (place / "x.dng").write_bytes(b"II*\0" + bytes(50))
    (place / "a.csv").write_bytes(b"image,caption\nx.dng,raw\n")
    with pytest.raises(BadSample, match="dng: develop it first"):
        TableSource(str(place / "a.csv")).read(0)


def test_a_long_url_among_paths_costs_only_its_row(place: Path) -> None:
    (place / "a.csv").write_bytes(b"image,caption\n1.jpg,one\nhttp://x/%s.jpg,two\n" % (b"1" * 300))
    source = TableSource(str(place / "a.csv"))
    assert source.read(0).image == ONE
    with pytest.raises(BadSample, match="only local paths are read"):
        source.read(1)


def test_half_a_character_is_left_out(place: Path) -> None:
    (place / "metadata.jsonl").write_text('{"file_name": "1.jpg", "text": "a \\ud83d\\ude00 and half: \\ud83d"}\n')
    sources = TableSource(str(place / "metadata.jsonl")), FolderSource(str(place))
    assert [source.read(0).caption for source in sources] == ["a \U0001f600 and half: ".encode()] * 2


def test_maps_of_captions_are_their_values_not_their_names(place: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    told = pa.array([[("en", "one"), ("de", "eins")], [("text", "two")]], kind)
    pq.write_table(pa.table({"image": ["1.jpg", "2.jpg"], "caption": told}), place / "a.parquet")
    assert captions(TableSource(str(place / "a.parquet"))) == ["one", "two"]


def test_a_row_far_down_that_ends_with_a_carriage_return_is_named(place: Path) -> None:
    rows = "1.jpg,one\n" * 8000 + "1.jpg,one\r2.jpg,two\n"  # beyond what is read to detect the format
    (place / "a.csv").write_bytes(f"image,caption\n{rows}".encode())
    source = TableSource(str(place / "a.csv"))
    with pytest.raises(BadSample, match="line 8002: a row ends inside it with a carriage return"):
        source.read(8000)
