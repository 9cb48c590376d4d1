"""What a real Slurm and the script of a job do when ranks die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from slurm import script
from slurm.supervise import history
from tests.slurm.conftest import SCRIPT, Slurm, until
from tests.slurm.launching import ONE_TASK, TWO_NODES, cascade, launch

ONE_NODE = [word for word in TWO_NODES if not word.startswith("cluster.nodes")]
COUNT = "n=$(cat starts 2>/dev/null | wc -l)\necho start >> starts\n"
"""n: the number of earlier starts."""


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
def test_a_node_whose_gpu_and_rank_failed_is_left_out(on_cluster: Slurm, here: Path, program) -> None:
    abort = "echo 'Process group watchdog thread terminated with exception: CUDA error: unspecified launch failure' >&2"
    program(
        COUNT
        + f'echo "on $SLURMD_NODENAME"\n[ $n -lt 2 ] || exit 0\n[ $n = 1 ] || {{ {abort}; kill -ABRT $$; }}\nkill -9 $$'
    )
    answer = launch(*ONE_NODE, "run=runs/a", "data.shards=x")
    log = log_of(answer)
    assert on_cluster.wait(answer["job_id"], log=log) == "COMPLETED"
    bad, again, other = re.findall(r"on (n\d)", "\n".join(re.findall(r"^on n\d", log.read_text(), re.M)))
    assert bad == again != other
    assert on_cluster.field(answer["job_id"], "ExcNodeList") == bad
    assert f"{bad} has failed 2 times: requeue without it" in log.read_text()
    lost, killed = history(here / "runs/a")
    assert (lost.code, lost.node, killed.code, killed.node) == (80, bad, 137, bad)
    assert lost.why == f"rank 0 on {bad} was aborted: CUDA error: unspecified launch failure"


@pytest.mark.slurm
def test_a_job_gives_up_without_progress(on_cluster: Slurm, here: Path, program) -> None:
    program(COUNT + "exit 78")
    answer = launch(*ONE_NODE, "run=runs/a", "data.shards=x", "cluster.max_restarts_without_progress=1")
    assert on_cluster.wait(answer["job_id"], log=log_of(answer)) == "FAILED"
    assert on_cluster.field(answer["job_id"], "ExitCode") == "78:0"
    assert "gave up: 2 failures in a row without a checkpoint after the beginning" in log_of(answer).read_text()
    assert (here / "starts").read_text().count("start") == 2


@pytest.mark.slurm
def test_a_killed_srun_leaves_no_second_copy(on_cluster: Slurm, here: Path, program) -> None:
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
    why = r"(srun ended with code 137|rank 0 on n1 was killed by signal 9)"  # whether the rank's note is in time
    assert re.search(f"{why}: restart in this allocation", log.read_text())


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


@pytest.mark.slurm
def test_a_task_with_the_number_of_its_array_leaves_the_others_alone(on_cluster: Slurm, here: Path, program) -> None:
    """Slurm gives that number to the last task, whose restart and requeue must not affect all tasks."""
    program(
        "task=$SLURM_ARRAY_TASK_ID\necho start >> starts.$task\n"
        "case $task.$(wc -l < starts.$task) in\n"
        "1.1) until [ -e starts.0 ]; do sleep 0.1; done; exit 78 ;;\n"  # restarts in the allocation
        "1.2) exit 75 ;;\n"  # asks to be requeued
        "1.*) touch done ;;\n"
        "0.*) until [ -e done ]; do sleep 0.1; done ;;\nesac"
    )
    words = [*ONE_TASK, "cluster.cpus_per_task=1", "cluster.sbatch={array: 0-1, nodelist: n1}"]
    job = launch(*words, own=["verb='embed output=embeddings'"])["job_id"]
    until(lambda: on_cluster.run("squeue", "-h", "-j", f"{job}") == "", 60, lambda: on_cluster.run("squeue"))
    assert on_cluster.field(f"{job}_1", "JobId") == str(job)
    assert [on_cluster.field(f"{job}_{task}", "JobState") for task in (0, 1)] == ["COMPLETED", "COMPLETED"]
    assert [on_cluster.field(f"{job}_{task}", "Restarts") for task in (0, 1)] == ["0", "1"]
    assert [(here / f"starts.{task}").read_text().count("start") for task in (0, 1)] == [1, 3]


# ------------------------------------------------------------------------------------------- with a real training

SAVED_EVERY = 5
TINY = [
    "data.global_batch=4", "stage.model.preset=tiny_base", "text.dim=32",
    "train.log_every=1", "train.sample_every=0", "tracking=disabled", f"checkpoint.every={SAVED_EVERY}",
    "optimizer.warmup_steps=2",
]  # fmt: skip
STEPS = 150
SHARDS = "data/demo/train"
DRAWN = ["prepare", "experiment=demo", "prepare.draw.count=64", "prepare.draw.heldout=8"]


def consumed(run: Path) -> dict[int, tuple[int, float]]:
    """By step: the position in the data, and the loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["position"], line["loss"]) for line in lines}


def last_step(run: Path) -> int:
    """Works even while a line is being written."""
    with suppress(OSError, ValueError):
        return max(consumed(run), default=0)
    return 0


def signal_rank(rank: int, run: Path, number: int) -> None:
    """Sends a signal to the program of a rank, not to the wrapper that started it."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes().split(b"\0")
            mine = f"SLURM_PROCID={rank}".encode() in variables and str(run).encode() in words
            if mine and b"training.cli" in words and b"slurm.task" not in words:
                os.kill(int(path.name), number)


@pytest.fixture(scope="module")
def calm(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed tiny training on two processes; next to it is its data."""
    home = tmp_path_factory.mktemp("calm")
    cascade(*DRAWN, env=slurm.env, cwd=home)
    words = ["cluster.processes=2", "run.dir=run", *tiny_words(home / "run")]
    assert cascade("train", *words, env=slurm.env, cwd=home)["step"] == STEPS
    return home / "run"


def tiny_words(calm: Path) -> list[str]:
    shards = f"data.shards={calm.parent / SHARDS}"
    return [*TINY, shards, f"train.steps={STEPS}", "train.timeout_s=10", "data.own_process=false"]


def launch_tiny(calm: Path, here: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, Path, Path]:
    """Launches the tiny training on two nodes, with a script that waits seconds, not a minute, for nodes that have lost
    their step; returns (job, run directory, log)."""
    monkeypatch.setattr(script, "REAP_S", 10)
    monkeypatch.setattr(script, "STEP_TRIES", 8)
    answer = launch(*TWO_NODES, *tiny_words(calm), "run.dir=runs/a", *more)
    return answer["job_id"], here / "runs/a", log_of(answer)


@pytest.mark.slurm
def test_the_events_of_a_month_change_no_step(
    on_cluster: Slurm, calm: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is killed, one stalls, a node crashes: each step has the loss of an undisturbed run."""
    slurm = on_cluster
    job, run, log = launch_tiny(calm, here, monkeypatch)

    def reached(step: int) -> int:
        """Waits until this step or a later one has ended; returns the last one that has."""
        until(lambda: last_step(run) >= step, 180, lambda: log.read_text()[-3000:])
        return last_step(run)

    signal_rank(1, run, signal.SIGKILL) if reached(12) else None
    until(lambda: len(history(run)) == 1, 60, lambda: log.read_text())
    until(lambda: len(json.loads((run / "code.json").read_text())["starts"]) == 2, 60)
    reached(last_step(run) + 8)
    # Far from a checkpoint: while it is saved, other ranks wait for one that stands still for train.timeout_first_s.
    until(lambda: last_step(run) % SAVED_EVERY == 1, 60, pause_s=0.02)
    signal_rank(0, run, signal.SIGSTOP)
    until(lambda: len(history(run)) == 2, 90, lambda: log.read_text())
    until(lambda: len(json.loads((run / "code.json").read_text())["starts"]) == 3, 60)
    assert reached(last_step(run) + 8) < STEPS, "too quick for this test: raise STEPS"
    subprocess.run([SCRIPT, "crash", "2"], env=slurm.env, check=True)
    subprocess.run([SCRIPT, "boot", "2"], env=slurm.env, check=True)
    assert slurm.wait(job, timeout=240, log=log) == "COMPLETED"

    killed, still, *_ = history(run)
    assert (killed.rank, killed.code, killed.action) == (1, 137, "restart")
    assert (still.code, still.action) == (78, "restart") and "hung" in still.why
    assert consumed(run) == consumed(calm)


@pytest.mark.slurm
def test_interventions_of_slurm_change_no_step(
    on_cluster: Slurm, calm: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal before the time limit, an operator's requeue, a node off the network, one whose daemon has died, one
    whose steps have: each step has the data and the loss of an undisturbed run, and each end has its cause."""
    monkeypatch.setattr(script, "STEP_S", 15)
    slurm = on_cluster
    # While Slurm cleans up an earlier start, it may end some of the next ones as soon as they begin.
    job, run, log = launch_tiny(calm, here, monkeypatch, "cluster.max_restarts_without_progress=20")
    seen = 0

    def starts() -> list[dict]:
        with suppress(OSError, ValueError):
            return json.loads((run / "code.json").read_text())["starts"]
        return []

    def happens(*commands: list[object]) -> None:
        """Waits until a new start has made some steps, then triggers the event, after which the job is requeued."""
        nonlocal seen
        until(
            lambda: len(starts()) > seen and last_step(run) >= starts()[-1]["step"] + 8,
            90,
            lambda: log.read_text()[-6000:],
        )
        assert last_step(run) < STEPS, "too quick for this test: raise STEPS"
        seen, before = len(starts()), int(slurm.field(job, "Restarts"))
        for command in commands:
            slurm.run(*map(str, command))
        until(lambda: int(slurm.field(job, "Restarts")) > before, 120, lambda: log.read_text()[-3000:])

    down, up = (["scontrol", "update", "nodename=n2", f"state={state}", "reason=test"] for state in ("down", "resume"))
    happens(["scancel", "--signal=USR1", "--batch", job])  # what Slurm sends signal_s before the limit
    happens(["scontrol", "requeue", job])
    happens([SCRIPT, "unplug", 2])
    slurm.run(str(SCRIPT), "kill-steps", "2")
    slurm.run(str(SCRIPT), "plug", "2")
    happens([SCRIPT, "kill-daemon", 2], down)  # as after SlurmdTimeout; its rank goes on
    slurm.run(str(SCRIPT), "kill-steps", "2")
    slurm.run(str(SCRIPT), "daemon", "2")
    subprocess.run(up, env=slurm.env, capture_output=True)  # fails if it is already back
    happens([SCRIPT, "kill-steps", 2])
    assert slurm.wait(job, timeout=240, log=log) == "COMPLETED"
    assert consumed(run) == consumed(calm)
    ends = iter(history(run))  # in this order, with others between them
    for code, rank, node, why in (
        (75, None, None, "asked to stop, saved"),
        (75, None, None, "requeued by `scontrol requeue`, or by the site; "),
        (137, None, "n2", "node n2 failed; "),
        (78, 0, "n1", "rank 0 on n1 lost another rank"),
    ):
        assert any((e.code, e.rank, e.node) == (code, rank, node) and e.why.startswith(why) for e in ends), why


@pytest.mark.slurm
def test_a_slow_node_is_named_and_left_out(slurm: Slurm, here: Path) -> None:
    """It gets a seventh of a core: less than the other node has on a busy machine."""
    done = subprocess.run([SCRIPT, "slow", "2", "15"], env=slurm.env, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a node cannot be made slow here: {done.stderr}")
    try:
        cascade(*DRAWN, env=slurm.env, cwd=here)
        asked = ["cluster.preflight=true", "cluster.preflight_exclude=true", "cluster.min_nodes=1", "train.steps=2"]
        answer = cascade(
            "launch", *TWO_NODES, f"data.shards={SHARDS}", *TINY, *asked, "run.dir=runs/a", env=slurm.env, cwd=here
        )
        log, run = log_of(answer), here / "runs/a"
        assert slurm.wait(answer["job_id"], timeout=240, log=log) == "COMPLETED", log.read_text()
        assert re.search(r"preflight: rank 1 on n2 computes .* times slower than usual", log.read_text())
        (end,) = history(run)
        assert (end.code, end.action) == (79, "restart n2") and "n2 is slow: restart without it" in log.read_text()
        starts = json.loads((run / "code.json").read_text())["starts"]
        assert [start["world_size"] for start in starts] == [1] and last_step(run) == 2
    finally:
        subprocess.run([SCRIPT, "boot", "2"], env=slurm.env, check=True)
        until(lambda: slurm.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == ["n1", "n1", "n2", "n2"], 60)
