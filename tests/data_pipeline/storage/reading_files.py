"""Reads shards and tables in several ways while failing_files.c makes calls fail; prints the outcomes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.commands.prepare_files import NamedFiles
from data_pipeline.commands.prepare_folder import FolderSource
from data_pipeline.commands.prepare_item import hash_file
from data_pipeline.config import DataConfig
from data_pipeline.reading.rows import RowReader
from data_pipeline.shards.mixture import open_dataset
from data_pipeline.storage import store
from data_pipeline.tables.base import Rows
from data_pipeline.tables.table import open_table
from tests.data_pipeline.storage.failing_files import tried


def main(place: str, cases: list[list[Any]]) -> dict[str, list[str]]:
    folder = f"{place}/a set"
    one = Path(folder) / "one"
    shard = str(one / "00000.tar")
    config = DataConfig(shards=shard)
    dataset = open_dataset(config)
    dataset.index(0)
    opened = {name: open_table(one / name) for name in ("t.csv", "t.jsonl", "t.parquet", "t.arrow", "t.stream")}
    ways: dict[str, Callable[[], Any]] = {
        "sample": lambda: RowReader(dataset, config).read(0, 1),
        "stream": lambda: store.read_bytes(shard),
        "folder": lambda: store.list_dir(str(one)),
        "glob": lambda: store.expand(f"{folder}/*/*.tar"),
        "nested": lambda: store.expand(f"{folder}/**/*.tar"),
        "directory": lambda: store.expand(str(one)),
        "exists": lambda: store.exists(shard),
        **{f"rows of {name}": partial(rows, table) for name, table in opened.items()},
        **{
            name: partial(opened_rows, one / name) for name in ("t.csv", "t.csv.gz", "t.parquet", "t.arrow", "t.stream")
        },
        "hash": lambda: hash_file(one / "t.csv"),
        "picture": lambda: NamedFiles(Path(folder)).find("one/00000.tar"),
        "unnamed": lambda: len(FolderSource(str(one / "pictures"))),
        "found": lambda: NamedFiles(Path(folder)).find("elsewhere/a.jpg"),
    }
    return tried(ways, "a set/one", cases)


def opened_rows(path: Path) -> list[Any]:
    return rows(open_table(path))


def rows(table: Rows) -> list[Any]:
    return [table.row(number) for number in range(0, len(table), 7)]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
