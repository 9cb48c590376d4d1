"""What a run does when a rank hangs or is slow, when it is asked to stop at an odd moment, and when a store fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from slurm.supervise import read_end
from tests.training.runs import chaos, experiment, metrics, newest, store
from training.processes.flight import who_is_missing


@pytest.mark.parametrize("phase", ["data", "forward"])
def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path, shards: str, phase: str) -> None:
    config = experiment(tmp_path, shards, train__stall_s=1.0, train__timeout_s=5.0)
    running = chaos(config, 2, {"what": "sleep", "rank": 1, "step": 4, "phase": phase, "seconds": 600})
    began = time.monotonic()
    codes = running.codes(grace_s=3)
    assert codes[0] == 78 and codes[1] in (78, -9), running.text
    assert time.monotonic() - began < 300, "not the default time-outs"
    assert f"rank 1 is in step 4, phase {phase}" in running.text, "rank 0 knows who it is"
    assert "another rank died or did not respond within the time-outs (step 4" in running.text
    stacks = (Path(config.run.dir) / "logs" / "rank-1.log").read_text()
    assert f"rank 1 has been in step 4, phase {phase}" in stacks and "in strike" in stacks
    assert newest(config).step == 3
    missing = who_is_missing(Path(config.run.dir) / "logs")
    assert missing is not None and missing.rank == 1
    assert missing.sentence.startswith(f"rank 1 on {missing.node} was in {phase}, and did not join rank 0 in ")
    assert chaos(config, 2).codes() == [0, 0], "the same command resumes"
    assert who_is_missing(Path(config.run.dir) / "logs") is None, "it is no record of this start"


@pytest.mark.parametrize(
    ("rank", "when", "says"),
    [
        (0, -1, "phase meeting rank 0 at 127.0.0.1:"),
        (0, 0, "(rank 0 has not responded for"),
        (1, 0, "(rank 1 has not reported for"),
    ],
)
def test_a_rank_that_freezes_during_the_start_is_named(
    tmp_path: Path, shards: str, rank: int, when: int, says: str
) -> None:
    """It is stopped (SIGSTOP) before the ranks have met, or after: the other rank ends the run and names it."""
    config = experiment(tmp_path, shards, train__stall_s=1.0, train__timeout_first_s=3.0 if when else 8.0)
    running = chaos(config, 2, {"what": "freeze", "rank": rank, "step": when})
    codes = running.codes(grace_s=2)
    assert codes[1 - rank] == 78 and codes[rank] == -9, running.text
    assert says in running.text and "Traceback" not in running.text


def test_a_rank_that_dies_while_the_others_end_for_another_reason(tmp_path: Path, shards: str) -> None:
    """All ranks wait for the checkpoint of step 3, of which rank 1 writes a half, to end with an error of
    step 4."""
    config = experiment(tmp_path, shards)
    events: list[dict[str, Any]] = [{"what": "error", "rank": rank, "step": 4} for rank in (0, 1)]
    events += [{"what": what, "rank": 1, "step": 3, "seconds": 3.0} for what in ("write", "slow write")]
    running = chaos(config, 2, *events)
    assert running.codes() == [78, -9], running.text
    assert "another rank died or did not respond within the time-outs (step" in running.text
    assert "Traceback" not in running.text


def test_a_gpu_that_fails_is_blamed_on_its_node(tmp_path: Path, shards: str) -> None:
    """The rank reports it, and leaves a note for the job script; it does not matter that the other one ends first."""
    says = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
    config, notes = experiment(tmp_path, shards), tmp_path / "notes"
    notes.mkdir()
    where = {"CASCADE_NOTES": str(notes), "SLURMD_NODENAME": "n7"}
    running = chaos(config, 2, {"what": "gpu error", "rank": 1, "step": 4, "says": says}, **where)
    assert running.codes(grace_s=3)[1] == 80, running.text
    assert "rank 1: its GPU or the connection to it has failed, n7: CUDA error: uncorrectable ECC" in running.text
    end = read_end(notes, 143, asked=False, job="7")
    assert (end.code, end.rank, end.node) == (80, 1, "n7") and "uncorrectable ECC error" in end.why


def test_a_gpu_that_fails_during_the_start_is_blamed_by_all_ranks(tmp_path: Path, shards: str) -> None:
    """All ranks raise the error of the rank whose GPU failed; no other rank takes it for an error of its own GPU."""
    config, notes = experiment(tmp_path, shards), tmp_path / "notes"
    notes.mkdir()
    event = {"what": "gpu error", "rank": 1, "step": 0, "says": "CUDA error: device busy or unavailable"}
    running = chaos(config, 2, event, CASCADE_NOTES=str(notes))
    assert running.codes() == [80, 80], running.text
    line = running.text.splitlines()[-1]
    assert line.startswith("rank 1: its GPU or the connection to it has failed, "), line
    assert "rank 0: its GPU" not in running.text
    said = [json.loads(path.read_text())["why"] for path in sorted(notes.iterdir())]
    assert len(said) == 2 and said[0] == said[1] and line.startswith(said[0])


def test_a_slow_rank_is_named(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=6)
    running = chaos(config, 2, {"what": "sleep", "rank": 1, "step": -1, "phase": "forward", "seconds": 0.4})
    assert running.codes() == [0, 0], running.text
    assert "rank 1 is slow: its data and forward pass take" in running.text
    assert metrics(config)[-1]["slow_rank"] == 1


@pytest.mark.parametrize("phase", ["begin", "forward", "validation", "samples", "checkpoint"])
def test_a_signal_at_an_odd_moment(tmp_path: Path, shards: str, phase: str) -> None:
    """It saves at the next step boundary, by a decision of all ranks."""
    config = experiment(
        tmp_path, shards, validation__every=3, validation__samples=8, train__sample_every=3,
        evaluation__reference=shards.replace("train", "heldout"),
    )  # fmt: skip
    at = {"begin": 0, "forward": 0}.get(phase, 3)
    running = chaos(config, 2, {"what": "stop", "rank": 1, "step": at, "phase": phase})
    assert running.codes() == [75, 75], running.text
    assert f"stopped by SIGTERM after step {at + 1}" in running.text
    assert newest(config).step == at + 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_waits_for_data_reacts_to_a_signal(tmp_path: Path, shards: str, ranks: int) -> None:
    """It does not wait for the store's deadline (600 s), and no step is lost."""
    config = experiment(tmp_path, shards, train__steps=10_000, data__own_process=True)
    running = chaos(config, ranks, {"what": "silence", "rank": ranks - 1, "step": 2})
    assert running.codes() == [75] * ranks, running.text
    step = newest(config).step
    assert f"stopped by SIGTERM after step {step}; everything is saved" in running.text and step >= 2


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path, shards: str) -> None:
    """Nothing can be written from step 2 to step 5, neither logs nor output: the checkpoint of step 3 fails, later
    ones are there."""
    config = experiment(tmp_path, shards)
    events = [{"what": "small files", "rank": rank, "step": 2, "bytes": 0} for rank in (0, 1)]
    events += [{"what": "room", "rank": rank, "step": 5} for rank in (0, 1)]
    running = chaos(config, 2, *events)
    assert running.codes() == [0, 0], running.text
    assert "the checkpoint of step 3 was not written (rank 0" in running.text and "free up space" in running.text
    assert store(config).steps() == [10, 9]
    assert {1, 2, 6, 7, 8, 9, 10} <= {line["step"] for line in metrics(config)}
    assert "metrics.jsonl cannot be written" in running.text


@pytest.mark.parametrize("stopped", [False, True])
def test_a_disk_that_stays_full_ends_with_an_error(tmp_path: Path, shards: str, stopped: bool) -> None:
    config = experiment(tmp_path, shards)
    events = [{"what": "small files", "rank": rank, "step": 4, "bytes": 100_000} for rank in (0, 1)]
    running = chaos(config, 2, *events, *[{"what": "sigterm", "rank": 0, "step": 8}] * stopped)
    assert running.codes() == ([75, 75] if stopped else [1, 1]), running.text
    end = "which could not be saved" if stopped else "all 10 steps are done, but the last checkpoint was not written"
    assert end in running.text and "the same command resumes from step 3" in running.text
    assert newest(config).step == 3
    unfinished = [path for path in (Path(config.run.dir) / "checkpoints").glob("step-*/*") if "00003" not in str(path)]
    assert not unfinished, "what is of no use takes no room"


def test_a_store_that_is_gone_and_comes_back(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, checkpoint__every=2, checkpoint__keep_last=5)
    events = [{"what": what, "rank": 0, "step": step} for what, step in (("gone", 3), ("back", 5))]
    running = chaos(config, 2, *events)
    assert running.codes() == [0, 0], running.text
    assert "the checkpoint of step 4 was not written" in running.text
    assert store(config).steps() == [10, 8, 6, 2]
