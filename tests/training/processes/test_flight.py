"""Which ranks are missing from a collective, according to the records of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.processes import flight
from training.processes.flight import compare_records, who_is_missing


def record(rank: int, number: int, done: bool = False, phase: str = "step", **more: Any) -> dict[str, Any]:
    last = [{"number": n, "name": "all_reduce", "done": True, "frames": []} for n in range(number - 2, number)]
    last.append({"number": number, "name": "all_reduce", "done": done, "frames": ["engine.py:310 _add_up"]})
    groups = {"_dump_fr_trace/0": {"description": "default_pg", "collectives": last}}
    return {"rank": rank, "world_size": 4, "node": f"n{rank}", "phase": phase, "time": 1.0, "groups": groups, **more}


def test_a_rank_that_did_not_arrive() -> None:
    found = compare_records([record(0, 57), record(1, 57), record(2, 56, True, "data"), record(3, 57)])
    assert found is not None and (found.rank, found.node) == (2, "n2")
    assert found.sentence == (
        "rank 2 on n2 was in data, and did not join ranks 0, 1, 3 in all_reduce 57 (engine.py:310 _add_up)"
    )


def test_a_rank_that_has_never_run_a_collective() -> None:
    found = compare_records([record(0, 3), record(1, 3, groups={}, phase="imports")])
    assert found is not None and found.rank == 1


def test_several_ranks_that_did_not_arrive_and_one_without_a_record() -> None:
    found = compare_records([record(0, 57), record(1, 57), record(2, 56, True), record(3, 55, True)])
    assert found is not None and found.rank is None and "rank 2 on n2 was in step; rank 3 on n3" in found.sentence
    found = compare_records([record(0, 57), record(1, 57), record(3, 57)])
    assert found is not None and found.node is None
    assert found.sentence.startswith("rank 2 left no record, and did not join ranks 0, 1, 3 in all_reduce 57")


def test_no_rank_is_named_when_all_arrived() -> None:
    assert compare_records([record(rank, 57) for rank in range(4)]) is None, "the network, then"
    assert compare_records([record(rank, 57, True, "data") for rank in range(4)]) is None
    assert compare_records([]) is None


def test_records_of_a_hang_before_do_not_count(tmp_path: Path) -> None:
    for one in (record(0, 57, time=1e9), record(1, 3, True, time=1e9 - 2 * flight.APART_S)):
        (tmp_path / f"collectives-rank-{one['rank']}.json").write_text(json.dumps(one))
    (tmp_path / "collectives-rank-2.json").write_text('{"rank": 2, ')
    found = who_is_missing(tmp_path)
    assert found is not None and "left no record" in found.sentence
    flight.put_records_aside(tmp_path)
    assert who_is_missing(tmp_path) is None and len(list(tmp_path.glob("earlier-*"))) == 3
