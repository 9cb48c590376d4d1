"""What a real Slurm and the script of a job do when ranks die."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from slurm.supervise import history
from tests.slurm.conftest import Slurm, until
from tests.slurm.launching import TWO_NODES, launch

ONE_NODE = [word for word in TWO_NODES if not word.startswith("cluster.nodes")]
COUNT = "n=$(cat starts 2>/dev/null | wc -l)\necho start >> starts\n"
"""n: how many starts there were before."""


def log_of(answer: dict) -> Path:
    return Path(answer["log"].replace("%j", str(answer["job_id"])))


@pytest.mark.slurm
def test_a_killed_rank_restarts_all_ranks_in_the_allocation(on_cluster: Slurm, here: Path, program) -> None:
    program(
        'echo "$MASTER_PORT" >> ports.$SLURM_PROCID\n'
        'if [ "$(wc -l < ports.$SLURM_PROCID)" = 2 ]; then echo "went on"; exit 0; fi\n'
        "[ $SLURM_PROCID = 0 ] || { sleep 1; kill -9 $$; }\nsleep 100"
    )
    answer = launch(*TWO_NODES, "run=runs/a", "data.shards=x")
    log = log_of(answer)
    assert on_cluster.wait(answer["job_id"], log=log) == "COMPLETED"
    assert on_cluster.field(answer["job_id"], "Restarts") == "0", "no queue"
    text = log.read_text()
    assert "rank 1 on n2 was killed by signal 9: restart in this allocation" in text
    assert text.count("went on") == 2
    (end,) = history(here / "runs/a")
    assert (end.rank, end.node, end.code, end.action) == (1, "n2", 137, "restart")
    first, second = (here / "ports.0").read_text().split()
    assert first != second and (here / "ports.1").read_text().split() == [first, second]


@pytest.mark.slurm
def test_a_node_that_failed_twice_is_left_out(on_cluster: Slurm, here: Path, program) -> None:
    program(COUNT + 'echo "on $SLURMD_NODENAME"\n[ $n -lt 2 ] || exit 0\nkill -9 $$')
    answer = launch(*ONE_NODE, "run=runs/a", "data.shards=x")
    log = log_of(answer)
    assert on_cluster.wait(answer["job_id"], log=log) == "COMPLETED"
    bad, again, other = re.findall(r"on (n\d)", "\n".join(re.findall(r"^on n\d", log.read_text(), re.M)))
    assert bad == again != other
    assert on_cluster.field(answer["job_id"], "ExcNodeList") == bad
    assert f"{bad} has failed 2 times: requeue without it" in log.read_text()


@pytest.mark.slurm
def test_it_gives_up_without_progress(on_cluster: Slurm, here: Path, program) -> None:
    program(COUNT + "exit 78")
    answer = launch(*ONE_NODE, "run=runs/a", "data.shards=x", "cluster.max_restarts_without_progress=1")
    assert on_cluster.wait(answer["job_id"], log=log_of(answer)) == "FAILED"
    assert on_cluster.field(answer["job_id"], "ExitCode") == "78:0"
    assert "gave up: 2 ends in a row without a checkpoint after the beginning" in log_of(answer).read_text()
    assert (here / "starts").read_text().count("start") == 2


@pytest.mark.slurm
def test_srun_killed_leaves_no_second_copy(on_cluster: Slurm, here: Path, program) -> None:
    program(COUNT + "[ $n = 0 ] || exit 0\necho up\nsleep 1000")
    answer = launch(*ONE_NODE, "run=runs/a", "data.shards=x")
    log = log_of(answer)
    until(lambda: log.exists() and "up\n" in log.read_text(), 30)
    found = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if _is_srun(path, here)]
    assert found
    for pid in found:
        with suppress(ProcessLookupError):  # srun is two processes, and the second may end with the first
            os.kill(int(pid), signal.SIGKILL)
    assert on_cluster.wait(answer["job_id"], log=log) == "COMPLETED"
    assert "srun ended with code 137: restart in this allocation" in log.read_text()


def _is_srun(cmdline: Path, here: Path) -> bool:
    try:
        words = cmdline.read_bytes().split(b"\0")
    except OSError:
        return False
    return words[0].endswith(b"srun") and str(here).encode() in b" ".join(words)


@pytest.mark.slurm
def test_a_site_that_exports_nothing(on_cluster: Slurm, here: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    program('echo "FOO=$FOO CASCADE_SRUN=$CASCADE_SRUN"')
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1000000")
    answer = launch(*TWO_NODES, "run=50%n of ö", "data.shards=x", "cluster.setup=[export FOO=bar]")
    log = log_of(answer)
    assert on_cluster.wait(answer["job_id"], log=log) == "COMPLETED"
    assert log.read_text().count("FOO=bar CASCADE_SRUN=1") == 2
    assert json.loads((here / "50%n of ö/launch/jobs.jsonl").read_text())["job"] == answer["job_id"]
