"""Which rank did not join which collective: torch's flight recorder keeps the last collectives of each rank, and the
records of a hang are compared here. Importing this file does not import torch."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.storage.atomic import replacing
from training.processes.ranks import named

LAST = 8
"""Collectives to keep per process group, besides unfinished ones."""
PATTERN = "collectives-rank-*.json"
NOT_OURS = ("/torch/", "/deepspeed/", "/contextlib.py")
"""Parts of the paths of source files that never say what a collective was for."""
APART_S = 1800.0
"""Records of one hang are not further apart than this: each rank writes its own when it has stood still for long."""


class Stuck(NamedTuple):
    """What the records of a hang say.

    Attributes:
        rank, node: the rank that the others wait for, and its node; None if there are several, or it left no record.
        sentence: in words.
    """

    rank: int | None
    node: str | None
    sentence: str


def record_of(log_file: Path) -> Path:
    """Return the file for the record of a rank, next to its log."""
    return log_file.with_name(f"collectives-{log_file.stem}.json")


def put_records_aside(logs: Path) -> None:
    """Rename the records that an earlier start has left, so that they are not taken for this start's."""
    for path in logs.glob(PATTERN):
        with suppress(OSError):
            path.replace(path.with_name(f"earlier-{path.name}"))


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the last collectives of this process.

    Args:
        path: the file.
        facts: what else to write: rank, world_size, node, phase, step, time.
    """
    text = json.dumps({**facts, "groups": _groups()}, indent=1)
    with suppress(OSError), replacing(path, durable=False) as file:
        file.write(text.encode())


def _groups() -> dict[str, Any]:
    """Return by process group: its description, and its last collectives."""
    from torch._C import _distributed_c10d as c10d

    found: dict[str, Any] = {}
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):  # gloo's, and NCCL's where torch has it
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        trace = pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
        for entry in trace.get("entries") or ():
            if entry["is_p2p"]:
                continue
            group, description = entry["process_group"]
            place: dict[str, Any] = {"description": description, "collectives": []}
            status = trace.get("pg_status", {}).get(str(entry["pg_id"]), {})
            done = entry["collective_seq_id"] <= status.get("last_completed_collective", -1)
            found.setdefault(f"{name}/{group}", place)["collectives"].append(_brief(entry, done))
    for group in found.values():
        own = group["collectives"]
        group["collectives"] = [one for one in own[:-LAST] if not one["done"]] + own[-LAST:]
    return found


def _brief(entry: Mapping[str, Any], done: bool) -> dict[str, Any]:
    frames = [f"{one['filename']}:{one['line']} {one['name']}" for one in entry.get("frames", ())]
    ours = [one for one in frames if not any(part in one for part in NOT_OURS)]
    return {
        "number": entry["collective_seq_id"],
        "name": entry["profiling_name"].rpartition(":")[2],
        "done": done or entry["state"] == "completed",  # gloo's stay "scheduled"
        "sizes": entry["input_sizes"],
        "frames": (ours or frames)[:6],
    }


# ---------------------------------------------------------------------------------------------- reading them


def who_is_missing(logs: Path) -> Stuck | None:
    """Compare the records of all ranks in a directory; None if they do not tell who is missing."""
    records = []
    for path in logs.glob(PATTERN):
        with suppress(OSError, ValueError):
            records.append(json.loads(path.read_text()))
    newest = max((record["time"] for record in records), default=0.0)
    return compare_records([record for record in records if record["time"] > newest - APART_S])


def compare_records(records: Sequence[Mapping[str, Any]]) -> Stuck | None:
    """Return who is missing in the collective that most ranks wait in; None if no rank waits in one.

    Args:
        records: as `write_record` writes them, of some or all ranks.
    """
    waiting: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        for group, found in record["groups"].items():
            last = found["collectives"][-1]
            if not last["done"]:
                waiting.setdefault((group, last["number"]), []).append(record)
    if not waiting:
        return None
    (group, number), there = max(waiting.items(), key=lambda one: (len(one[1]), one[0][1]))
    here = {record["rank"] for record in there}
    call = there[0]["groups"][group]["collectives"][-1]
    others = [record for record in records if record["rank"] not in here and _reached(record, group) < number]
    where = f"{call['name']} {number}" + (f" ({call['frames'][0]})" if call["frames"] else "")
    waits = f"{named(sorted(here))} in {where}"
    if others:
        said = "; ".join(f"rank {other['rank']} on {other['node']} was in {other['phase']}" for other in others[:4])
        one = others[0] if len(others) == 1 else {}
        return Stuck(one.get("rank"), one.get("node"), f"{said}, and did not join {waits}")
    silent = sorted({*range(there[0]["world_size"])} - {record["rank"] for record in records})
    if silent:
        return Stuck(None, None, f"{named(silent)} left no record, and did not join {waits}")
    return None


def _reached(record: Mapping[str, Any], group: str) -> int:
    found = record["groups"].get(group, {}).get("collectives") or [{"number": -1}]
    return int(found[-1]["number"])
