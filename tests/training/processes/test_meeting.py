"""How ranks find each other, and what is refused before a process group forms."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError
from tests.training import forks
from tests.training.runs import chaos, experiment
from training.config.experiment import ClusterConfig
from training.processes import devices
from training.processes.devices import own_device
from training.processes.endings import DeviceLost, RankLost
from training.processes.launcher import free_port
from training.processes.meeting import Card, check_cards, meet, missing_interface
from training.processes.ranks import Ranks

SLURM, LOCAL = ClusterConfig(kind="slurm"), ClusterConfig()


def gpu(rank: int, node: str = "n1") -> Card:
    return Card(rank, node, f"cuda:{rank}", f"GPU-{rank}")


def cpu(rank: int, node: str = "n1") -> Card:
    return Card(rank, node, "cpu", why="torch is a CPU build")


@pytest.mark.parametrize(
    ("cards", "cluster", "sentence"),
    [
        ([gpu(0), cpu(1, "n2")], LOCAL, "rank 1 on n2 has no GPU (torch is a CPU build), but rank 0 on n1 has one"),
        ([cpu(0), gpu(1)], LOCAL, "rank 0 on n1 has no GPU"),
        ([cpu(0, "n7")], SLURM, "rank 0 on n7 has no GPU (torch is a CPU build), but cluster.gpus=true asks for one"),
        ([gpu(0), Card(1, "n1", "cuda:0", "GPU-0")], SLURM, "ranks 0 and 1 share one GPU on n1"),
        (
            [cpu(0), Card(1, "n2", "cpu", no_interface="ib9")],
            LOCAL,
            "GLOO_SOCKET_IFNAME=ib9: n2 (rank 1) has no network",
        ),
        ([cpu(0), Card(1, "n2", "cpu", files=100)], LOCAL, "rank 1 on n2 may open 100 files (ulimit -Hn)"),
    ],
)
def test_refused(cards: list[Card], cluster: ClusterConfig, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        check_cards(cards, cluster)


def test_interfaces() -> None:
    assert missing_interface("") == missing_interface("lo") == "" and missing_interface("lo,ib9") == "ib9"


def test_accepted() -> None:
    check_cards([gpu(0), gpu(1)], SLURM)
    check_cards([cpu(0), cpu(1)], LOCAL)
    check_cards([cpu(0), cpu(1)], ClusterConfig(kind="slurm", gpus=False))


LOST = "CUDA unknown error - this may be due to an incorrectly set up environment"


@pytest.mark.parametrize(
    ("cards", "node", "sentence"),
    [
        ([gpu(0), Card(1, "n2", "cpu", why=f"torch sees no GPU: {LOST}")], "n2", f"no GPU (torch sees no GPU: {LOST})"),
        ([Card(0, "n7", "cpu", why="torch sees no GPU", given=8)], "n7", "but cluster.gpus=true asks for one"),
        (
            [gpu(0), *(Card(n, "n1", f"cuda:{n % 7}", f"GPU-{n % 7}", visible=7, given=8) for n in range(1, 8))],
            "n1",
            "ranks 0 and 7 would share one GPU on n1, where torch sees 7 of the 8 GPUs in CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_a_node_that_has_lost_a_gpu_is_to_blame(cards: list[Card], node: str, sentence: str) -> None:
    with pytest.raises(DeviceLost, match=re.escape(sentence)) as error:
        check_cards(cards, SLURM)
    assert (error.value.node, error.value.exit_code) == (node, 80)


def test_a_rank_without_its_gpu_ends_all_before_a_group_forms(tmp_path: Path, shards: str) -> None:
    """On every rank, with one sentence, and notes that blame the node of that rank, whoever writes first."""
    config, notes = experiment(tmp_path, shards), tmp_path / "notes"
    notes.mkdir()
    events = [{"what": "gpus", "rank": 0, "count": 2}, {"what": "gpus", "rank": 1, "count": 0, "says": LOST}]
    running = chaos(config, 2, *events, CASCADE_NOTES=str(notes), SLURMD_NODENAME="n7", CUDA_VISIBLE_DEVICES="0,1")
    assert running.codes() == [80, 80], running.text
    (line,) = running.text.splitlines()
    assert line.startswith(f"rank 1 on n7 has no GPU (torch sees no GPU: {LOST}), but rank 0 on n7 has one")
    said = [json.loads(path.read_text()) for path in sorted(notes.iterdir())]
    assert [(note["code"], note["node"], note["why"]) for note in said] == [(80, "n7", line.partition(": fix")[0])] * 2
    assert not Path(config.run.dir, "logs").exists(), "before the run directory is opened"


def test_a_job_on_one_gpu_does_not_fall_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device(LOCAL, 0, 0) == own_device(ClusterConfig(kind="slurm", gpus=False), 0, 0) == "cpu"
    with pytest.raises(ConfigError, match="torch is a CPU build"):
        own_device(SLURM, 0, 0)
    monkeypatch.setattr(devices, "see_gpu", lambda rank: devices.Gpu(why="torch sees no GPU", given=1))
    with pytest.raises(DeviceLost, match="has no GPU"):
        own_device(SLURM, 0, 0)
    old = devices.Gpu(why="torch sees no GPU: The NVIDIA driver on your system is too old", given=1)
    monkeypatch.setattr(devices, "see_gpu", lambda rank: old)
    with pytest.raises(ConfigError, match="too old"):
        own_device(SLURM, 0, 0)


def test_a_gpu_that_was_asked_for_and_is_not_there(tmp_path: Path, shards: str) -> None:
    """On every rank, before a group forms: code 2 and one sentence, instead of training on the CPU."""
    config = experiment(tmp_path, shards, cluster__kind="slurm")
    running = forks.start(config, 2)
    assert running.codes() == [2, 2], running.text
    assert f"rank 0 on {socket.gethostname()} has no GPU" in running.text and running.text.count("\n") == 1


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> int:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_ranks_that_do_not_arrive_are_named(place: int) -> None:
    with pytest.raises(RankLost, match=f"ranks 1, 2 did not arrive within 1 s .*meeting rank 0 at 127.0.0.1:{place}"):
        meet(Ranks(0, 0, 3), cpu(0), 1.0)


def test_a_port_that_is_taken_is_named(place: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", place))
        other.listen()
        with pytest.raises(RankLost, match=f"cannot open MASTER_PORT={place}"):
            meet(Ranks(0, 0, 2), cpu(0), 5.0)


def limits(soft: int, hard: int, world_size: int) -> list[int]:
    program = """
import resource, sys
from training.processes.meeting import allow_files, needed_files
soft, hard, world_size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(allow_files(needed_files(world_size)), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    words: list[Any] = [sys.executable, "-c", program, str(soft), str(hard), str(world_size)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    return [int(word) for word in done.stdout.split()]


def test_the_soft_limit_of_open_files_follows_the_number_of_ranks() -> None:
    assert limits(300, 4000, 256) == [2304, 2304]
    assert limits(300, 1024, 256) == [1024, 1024], "what the hard limit allows; check_cards refuses it"
    assert limits(1000, 4000, 2) == [272, 1000], "never lowered"
