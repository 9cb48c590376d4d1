"""Reads W&B's offline files with W&B's own message classes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.run.directory import RunDir


def wandb_records(path: Path) -> Iterator[bytes]:
    """The whole records of a .wandb file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB; checksum,
    length, type). W&B's own process may still be writing: a record that is cut off is left for the next reading."""
    data, at, parts = path.read_bytes(), 7, b""
    assert b":W&B".startswith(data[:4])
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield parts
            parts = b""


def whole_wandb(path: Path) -> list[Any]:
    """All records, decoded by W&B's own message classes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    records: list[Any] = []
    while not any(record.HasField("exit") for record in records):  # W&B's own process may still be writing
        records = [Record.FromString(data) for data in wandb_records(path)]
        time.sleep(0.02)
    return records


def read_wandb(run: RunDir) -> list[tuple[str, dict[str, Any]]]:
    """(run id, values) of every record in the offline files."""
    found: list[tuple[str, dict[str, Any]]] = []
    files = run.path.glob("wandb/offline-run-*/run-*.wandb")
    for path in sorted(files, key=lambda path: path.parent.name):  # ...-1 is the second one of a second
        run_id = ""
        for record in whole_wandb(path):
            if record.HasField("run"):
                run_id = record.run.run_id
                items = {i.key: json.loads(i.value_json) for i in record.run.config.update}
                found.append((run_id, {"config": items}))
            if record.HasField("history"):
                names = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
                found.append((run_id, {key: json.loads(value) for key, value in names.items()}))
            if record.HasField("artifact"):
                places = [entry.ref for entry in record.artifact.manifest.contents]
                found.append((run_id, {"artifact": record.artifact.name, "places": places}))
    return found
