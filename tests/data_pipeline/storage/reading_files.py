"""Reads the shards of a directory in several ways while failing_files.c makes calls fail; prints what came of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from data_pipeline.common.errors import CascadeError
from data_pipeline.config import DataConfig
from data_pipeline.reading.rows import RowReader
from data_pipeline.shards.mixture import open_dataset
from data_pipeline.storage import retry, store


def main(folder: str, cases: list[list[Any]]) -> dict[str, list[str]]:
    shard = f"{folder}/one/00000.tar"
    ways: dict[str, Callable[[], Any]] = {
        "sample": lambda: RowReader(dataset, config).read(0, 1),
        "stream": lambda: store.read_bytes(shard),
        "folder": lambda: store.list_dir(f"{folder}/one"),
        "glob": lambda: store.expand(f"{folder}/*/*.tar"),
        "nested": lambda: store.expand(f"{folder}/**/*.tar"),
    }
    config = DataConfig(shards=shard)
    dataset = open_dataset(config)
    dataset.index(0)
    right = {name: read() for name, read in ways.items()}
    found = {}
    for way, call, number, count in cases:
        name = f"{way} {call} {number} {count}"
        given = {"CASE": name, "CALL": call, "ERRNO": str(number), "COUNT": str(count), "PATH": "a set/one"}
        os.environ.update({f"FAULT_{key}": value for key, value in given.items()})
        retry.FILE_S = 60.0 if count < 10 else 0.02
        try:
            found[name] = ["same" if ways[way]() == right[way] else "different"]
        except CascadeError as error:
            found[name] = [type(error).__name__, str(error)]
        os.environ["FAULT_PATH"] = ""
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
