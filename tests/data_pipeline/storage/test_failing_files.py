"""Files on a server that fails for a moment, or for good."""

from __future__ import annotations

import errno
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data_pipeline.small_shards import write_shards
from tests.data_pipeline.storage.failing_files import outcomes

READS = [("sample", "open"), ("sample", "read"), ("stream", "open"), ("stream", "read"), ("folder", "list")]
READS += [("exists", "stat")]
READS += [(f"rows of {name}", "read") for name in ("t.csv", "t.jsonl", "t.parquet", "t.arrow", "t.stream")]
READS += [
    (name, call) for name in ("t.csv", "t.csv.gz", "t.parquet", "t.arrow", "t.stream") for call in ("open", "read")
]
LISTS = [("glob", "list"), ("nested", "list")]
LENIENT = [("hash", "open"), ("hash", "read"), ("directory", "stat"), ("picture", "stat"), ("found", "list")]
LENIENT += [("unnamed", "open"), ("unnamed", "read")]
"""Without another attempt, existing files would be reported as missing."""
PASSING = [(*way, number) for way in READS + LISTS + LENIENT for number in (errno.ESTALE, errno.EIO)]
ROWS = 20_000


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Maps each case to its outcome: "same" (as without faults), or the type and the message of the error."""
    folder = tmp_path_factory.mktemp("failing")
    one = folder / "a set/one"
    write_shards(one, [3])
    (one / "a.jpg").write_bytes(b"")
    (one / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(one / "pictures/without-an-ending", "png")
    (one / "pictures/without-an-ending.txt").write_text("a square")
    text = "image,caption\n" + "".join(f"{number}.jpg,the caption of {number}\n" for number in range(ROWS))
    (one / "t.csv").write_text(text)
    (one / "t.csv.gz").write_bytes(gzip.compress(text.encode(), 1))
    rows = [{"image": f"{number}.jpg", "caption": f"the caption of {number}"} for number in range(ROWS)]
    (one / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, one / "t.parquet", row_group_size=ROWS // 4)
    for name, opened in (("t.arrow", pa.ipc.new_file), ("t.stream", pa.ipc.new_stream)):
        with opened(one / name, table.schema) as out:
            out.write_table(table, ROWS // 4)
    cases = [[*case, 2] for case in PASSING]
    cases += [[way, call, errno.EIO, 10_000] for way, call in (*READS, *LISTS)]
    cases += [[way, call, errno.EACCES, 10_000] for way, call in LISTS]
    return outcomes("tests.data_pipeline.storage.reading_files", folder, cases)


@pytest.mark.parametrize(("way", "call", "number"), PASSING)
def test_a_server_that_comes_back_costs_nothing(said: dict[str, list[str]], way: str, call: str, number: int) -> None:
    assert said[f"{way} {call} {number} 2"] == ["same"]


@pytest.mark.parametrize(("way", "call"), [*READS, *LISTS])
def test_a_server_that_stays_away_ends_the_command_with_the_file_named(
    said: dict[str, list[str]], way: str, call: str
) -> None:
    kind, message = said[f"{way} {call} {errno.EIO} 10000"]
    assert kind == "StoreError" and "Input/output error" in message and "a set/one" in message
    assert "giving up" in message and message.endswith("check the disk, or the mount of the file server")


@pytest.mark.parametrize(("way", "call"), LISTS)
def test_a_glob_skips_no_directory_silently(said: dict[str, list[str]], way: str, call: str) -> None:
    kind, message = said[f"{way} {call} {errno.EACCES} 10000"]
    assert kind == "DataError" and "one" in message and "Permission denied; give this user access" in message
