"""What happens to a job whose processes have ended, and how one rank is started and recorded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common import machine
from slurm import task
from slurm.causes import why_ended
from slurm.supervise import End, Verdict, history, judge, main, pause_before, read_end, slow_nodes
from tests.children import gone
from tests.slurm.launching import install
from training.processes.exit_codes import EXIT_DEVICE_LOST, EXIT_HUNG, EXIT_PREEMPTED, EXIT_SLOW_NODE
from training.processes.failures import leave_note

KILLED = 137


def decide(end: End, *before: End, requeue: bool = True, spare: bool = False, most: int = 3) -> Verdict:
    return judge(end, before, requeue=requeue, most=most, limit_s=3600.0, spare=spare)


def end(code: int, step: int = 10, node: str | None = None, elapsed_s: float = 100.0) -> End:
    return End(code, "7", step=step, node=node, elapsed_s=elapsed_s, why=f"code {code}")


@pytest.mark.parametrize("code", [0, 2, 76, 77, 130])
def test_these_exit_codes_are_final(code: int) -> None:
    assert decide(end(code)).action == f"end {code}"


@pytest.mark.parametrize("code", [KILLED, EXIT_HUNG, 134, 143])
def test_a_lost_rank_is_restarted_in_the_allocation(code: int) -> None:
    assert decide(end(code)).action == "restart"
    assert decide(end(code), requeue=False).action == "restart"


def test_a_start_that_ended_at_once_is_repeated_after_a_pause() -> None:
    """The pause grows each time: for a minute, Slurm may end new steps of a job while it cleans up the last start."""
    quick, slow = (replace(end(KILLED), lasted_s=seconds) for seconds in (3.0, 600.0))
    assert [pause_before(quick, [quick] * count) for count in range(3)] == [15, 30, 60]
    assert pause_before(slow, [quick]) == 0 and pause_before(quick, [quick, slow]) == 15
    assert pause_before(quick, [replace(quick, job="6"), replace(quick, restart=1)]) == 15, "of other allocations"
    assert pause_before(quick, [quick], first_s=1) == 2


def test_without_progress_restarts_end_and_the_reason_is_given() -> None:
    same = [end(KILLED) for _ in range(3)]
    assert decide(end(KILLED), *same[:2]).action == "restart"
    verdict = decide(end(KILLED), *same)
    assert verdict.action == f"end {KILLED}"
    assert "without a checkpoint after step 10" in verdict.sentence
    assert "cluster.max_restarts_without_progress=3" in verdict.sentence
    assert decide(end(KILLED, step=20), *same).action == "restart", "progress begins a new count"
    assert decide(end(KILLED), most=0).action == f"end {KILLED}"


def test_a_lost_rank_and_the_requeue_of_its_node_are_one_failure() -> None:
    node = [replace(end(EXIT_HUNG), restart=2), replace(end(KILLED), restart=2, attempt=0)]
    again = [replace(end(KILLED), restart=3), replace(end(KILLED), restart=3, attempt=2)]
    assert decide(replace(end(KILLED), restart=3, attempt=2), *node, again[0]).action == "restart"
    assert decide(replace(end(KILLED), restart=3, attempt=3), *node, *again).action == f"end {KILLED}"
    alone = [replace(end(KILLED), restart=number, attempt=0) for number in range(3)]
    assert decide(replace(end(KILLED), restart=3), *alone).action == f"end {KILLED}", "a node may fail each time"


def test_a_node_whose_ranks_slurm_terminated_is_not_blamed() -> None:
    for code, action in ((143, "restart"), (KILLED, "requeue")):
        assert decide(end(code, node="n1"), end(code, node="n1")).action == action


def test_an_unexplained_end_is_tried_once_more() -> None:
    assert decide(end(1)).action == "restart"
    assert decide(end(1), end(1)).action == "end 1"
    assert decide(end(1, step=20), end(1)).action == "restart"


def test_a_node_that_failed_twice_is_left_out() -> None:
    first, second = end(KILLED, 10, "n2"), end(KILLED, 20, "n2")
    assert decide(second, first) == Verdict("requeue", decide(second, first).sentence, ("n2",))
    assert decide(second, first, spare=True).action == "restart"
    assert decide(second, first, spare=True).without == ("n2",)
    assert decide(second, first, requeue=False).action == f"end {KILLED}"
    assert decide(end(KILLED, 20, "n1"), first).action == "restart"
    hung = end(EXIT_HUNG, 10, "n2")
    assert decide(end(EXIT_HUNG, 20, "n2"), hung).without == (), "who speaks of a hang is not who stood still"


def test_a_node_that_the_others_waited_for_twice_is_left_out() -> None:
    hung = [replace(end(EXIT_HUNG, step, "n1"), suspect="n2") for step in (10, 20)]
    assert decide(hung[1], hung[0]).without == ("n2",)
    assert "n2 has failed 2 times: requeue without it" in decide(hung[1], hung[0]).sentence


def test_a_node_that_the_preflight_found_slow_is_left_out(tmp_path: Path) -> None:
    slow = end(EXIT_SLOW_NODE, node="n1")
    rules = {"requeue": True, "most": 3, "limit_s": 3600.0, "slow": ["n2"]}
    assert judge(slow, [], **rules, spare=False).action == "requeue"
    verdict = judge(slow, [], **rules, spare=True)
    assert verdict.action == "restart" and verdict.without == ("n2",) and "n2 is slow" in verdict.sentence
    assert slow_nodes(tmp_path) == ()
    (tmp_path / "preflight.json").write_text('{"slow": ["n2", "n3"]}')
    assert slow_nodes(tmp_path) == ("n2", "n3")


def test_a_node_that_lost_a_gpu_twice_is_left_out() -> None:
    first, second = end(EXIT_DEVICE_LOST, 10, "n2"), end(EXIT_DEVICE_LOST, 10, "n2")
    assert decide(first).action == "restart"
    assert (decide(second, first).action, decide(second, first).without) == ("requeue", ("n2",))


def test_a_stopped_and_saved_job_returns_to_the_queue() -> None:
    assert decide(end(EXIT_PREEMPTED)).action == "requeue"
    assert decide(end(EXIT_PREEMPTED), requeue=False).action == f"end {EXIT_PREEMPTED}"
    early = [end(EXIT_PREEMPTED) for _ in range(9)]
    assert decide(end(EXIT_PREEMPTED), *early).action == "requeue", "a preemption is nobody's failure"
    late = [end(EXIT_PREEMPTED, elapsed_s=3500.0) for _ in range(3)]
    assert decide(end(EXIT_PREEMPTED, elapsed_s=3500.0), *late).action == f"end {EXIT_PREEMPTED}"


def test_a_time_limit_of_the_site_without_time_to_work_ends_the_job() -> None:
    """Each of its starts would be asked to stop at once."""
    rules = {"requeue": True, "most": 3, "spare": False, "least_s": 240.0}
    verdict = judge(end(EXIT_PREEMPTED), [], limit_s=120.0, **rules)
    assert verdict.action == f"end {EXIT_PREEMPTED}" and "set cluster.time to at least 240 s" in verdict.sentence
    assert judge(end(EXIT_PREEMPTED), [], limit_s=240.0, **rules).action == "requeue"


def test_the_first_rank_that_failed_explains_the_others(tmp_path: Path) -> None:
    for rank, code, at in ((0, 143, 5.0), (1, KILLED, 3.0), (2, EXIT_HUNG, 4.0)):
        note = {"rank": rank, "node": f"n{rank}", "code": code, "time": at}
        (tmp_path / f"failed-{rank}.json").write_text(json.dumps(note))
    found = read_end(tmp_path, 143, asked=False, job="7")
    assert (found.code, found.rank, found.node) == (KILLED, 1, "n1")
    assert found.why == "rank 1 on n1 was killed by signal 9"
    assert read_end(tmp_path, 143, asked=True, job="7").code == EXIT_PREEMPTED
    assert read_end(tmp_path / "none", 137, asked=False, job="7").why == "srun ended with code 137"
    leave_note(tmp_path, 3, "n3", EXIT_DEVICE_LOST, "rank 3: its GPU has failed")
    leave_note(tmp_path, 3, "n9", 1)
    found = read_end(tmp_path, 143, asked=False, job="7")
    assert (found.rank, found.node, found.why) == (3, "n3", "rank 3: its GPU has failed"), "the others waited for it"


def test_the_script_gets_one_line_and_the_run_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, notes = tmp_path / "my run", tmp_path / "notes"
    notes.mkdir()
    run.mkdir()
    (run / "code.json").write_text(json.dumps({"starts": [{"step": 0}, {"step": 40}]}))
    (notes / "failed-3.json").write_text(json.dumps({"rank": 3, "node": "n2", "code": KILLED, "time": 1.0}))
    words = [str(run), "--code", "137", "--notes", str(notes), "--job", "7", "--most", "3", "--requeue"]
    for _ in range(2):
        assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["restart 15", "requeue n2"]
    assert "rank 3 on n2 was killed by signal 9; n2 has failed 2 times: requeue without it" in err
    assert [(one.step, one.action) for one in history(run)] == [(40, "restart"), (40, "requeue n2")]


NODE = "NodeName={}\n   State={}\n   BootTime=2026-01-01T00:00:00 SlurmdStartTime={}\n"
AT = {"BEGAN": "2026-02-03T04:05:06", "LATER": "2026-02-03T05:00:00", "EARLIER": "2026-02-01T00:00:00"}
BEGAN = datetime.fromisoformat(AT["BEGAN"]).timestamp()


def slurm_says(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: str = "",
    nodes: str = "",
    sacct: str = "",
    pattern: str = "a log.log",
) -> Path:
    """Lets shell scripts answer in place of Slurm; returns the log. Newer versions show its pattern."""
    path = here / pattern.replace("%x", "g").replace("%j", "7")
    for name, text in (("log", log), ("nodes", nodes), ("sacct", sacct)):
        for word, moment in AT.items():
            text = text.replace(word, moment)
        (path if name == "log" else here / name).write_text(text)
    shown = f'echo "JobId=7 JobName=g"; echo "   StdErr={here / pattern}"; echo "   StdIn=/dev/null"'
    programs = {
        "scontrol": f'case "$2" in job) {shown};; node) cat "{here}/nodes";; esac',
        "sacct": f'cat "{here}/sacct"',
    }
    monkeypatch.setenv("PATH", f"{install(here / 'site', **programs)}:{os.environ['PATH']}")
    return path


LOST = NODE.format("n1", "IDLE", "EARLIER") + NODE.format("n2", "DOWN+NOT_RESPONDING", "EARLIER")
WELL = NODE.format("n1", "IDLE", "EARLIER")
DONE = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT {}{} ***\n"


@pytest.mark.parametrize(
    ("said", "code", "node", "why"),
    [
        ({"log": DONE.format("LATER", " DUE TO PREEMPTION")}, 75, None, "preempted by a job of higher priority"),
        ({"log": DONE.format("LATER", " DUE TO JOB REQUEUE")}, 75, None, "requeued by `scontrol requeue`"),
        ({"log": DONE.format("LATER", " DUE TO NODE FAILURE, SEE X"), "nodes": LOST}, 137, "n2", "node n2 failed"),
        ({"log": DONE.format("LATER", " DUE TO NODE FAILURE, SEE X")}, 137, None, "a node failed"),
        ({"nodes": NODE.format("n1", "MIXED", "LATER")}, 137, "n1", "node n1 failed"),
        (
            {"sacct": "EARLIER|BEGAN|NODE_FAIL|None\nBEGAN|LATER|PREEMPTED|None\nLATER|Unknown|RUNNING|BeginTime\n"},
            75,
            None,
            "preempted",
        ),
        ({"sacct": "BEGAN|LATER|REQUEUED|None\nUnknown|Unknown|PENDING|None\n"}, 75, None, "requeued by `scontrol"),
        ({"sacct": "BEGAN|LATER|NODE_FAIL|None\n", "nodes": LOST}, 137, "n2", "node n2 failed"),
        ({"sacct": "welcome | to | this site\nBEGAN|LATER|PREEMPTED|None\n"}, 75, None, "preempted"),
        ({"log": DONE.format("LATER", " DUE TO PREEMPTION"), "pattern": "a lo%x-%j.log"}, 75, None, "preempted"),
        ({"log": DONE.format("EARLIER", " DUE TO PREEMPTION"), "nodes": WELL}, None, None, "requeued by Slurm"),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_a_requeue_by_slurm_itself_is_recorded_with_its_cause(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict,
    code: int | None,
    node: str | None,
    why: str,
    saved: bool,
) -> None:
    """The script was ended before it could report anything; only a failed node counts as a failure."""
    slurm_says(tmp_path, monkeypatch, **said)
    notes = tmp_path / "logs/.notes-7-1-1"
    notes.mkdir(parents=True)
    (notes / "nodes").write_text(f"{BEGAN:.0f} n[1-2]\n")
    if saved:
        (notes / "stopped").touch()
    run = tmp_path / "my run"
    words = [str(run), "--verb", "index", "--requeued", "--job", "7", "--restart", "1"]
    for _ in range(2):
        assert main([*words, "--notes", f"{tmp_path}/logs/.notes-7-1"]) == 0
    (only,) = history(run)
    assert only.code == (code or (75 if saved else 137)) and only.node == node and not notes.exists()
    assert only.why.startswith(why) and only.why.endswith("; saved" if saved else "; not saved")


def test_a_requeue_by_the_script_is_not_recorded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_says(tmp_path, monkeypatch)
    (tmp_path / "logs/.notes-7-2-own").mkdir(parents=True)
    words = [str(tmp_path), "--verb", "index", "--requeued", "--job", "7", "--restart", "2"]
    assert main([*words, "--notes", f"{tmp_path}/logs/.notes-7-2"]) == 0
    assert history(tmp_path) == []


def test_the_reason_why_slurm_ended_a_job_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = slurm_says(tmp_path, monkeypatch, log=DONE.format("LATER", " DUE TO TIME LIMIT"))
    found = why_ended("7", log)
    assert (found.state, found.is_failure) == ("TIMEOUT", True) and found.time == BEGAN + 3294
    log.write_text(DONE.format(AT["LATER"], ""))
    assert (why_ended("7", log).why, why_ended("7", log).is_failure) == ("cancelled by `scancel`", False)
    log.write_text(f"{log.read_text()}==> job 7 on n1, restart 1\n")
    assert why_ended("7", log) is None, "it began again afterwards"
    for said, why in (  # as slurmdbd 22.05 prints it
        ("BEGAN|LATER|CANCELLED by 1000|None", "cancelled by `scancel`"),
        ("None|LATER|CANCELLED by 0|Resources", "cancelled by `scancel`"),
        ("None|LATER|CANCELLED|Dependency", "a job that it waits for has failed"),
        ("None|LATER|DEADLINE|None", "ended by Slurm at its deadline"),
        ("BEGAN|LATER|TIMEOUT|None", "ended by Slurm at its time limit"),
        ("BEGAN|LATER|OUT_OF_MEMORY|None", "killed by Slurm because it ran out of memory"),
    ):
        for word, moment in AT.items():
            said = said.replace(word, moment)
        (tmp_path / "sacct").write_text(f"{said}\n")
        assert why_ended("7", log).why.startswith(why)


# ------------------------------------------------------------------------------------------------------ one rank


def run_task(notes: Path, *command: str, **streams: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "CASCADE_NOTES": str(notes), "SLURM_PROCID": "3", "SLURMD_NODENAME": "n2"}
    words = [sys.executable, "-P", "-m", "slurm.task", *command]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, **streams)


def test_a_failed_rank_leaves_a_note(tmp_path: Path) -> None:
    assert run_task(tmp_path, "bash", "-c", "kill -9 $$").wait() == KILLED
    note = json.loads((tmp_path / "failed-3.json").read_text())
    assert (note["rank"], note["node"], note["code"]) == (3, "n2", KILLED)


WATCHDOG = "[rank3]:[E1130 ProcessGroupNCCL.cpp:2100] [PG ID 0 PG GUID 0(default_pg) Rank 3] "
ABORTS = "terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  "


@pytest.mark.parametrize(
    ("says", "code", "why"),
    [
        (
            f"{ABORTS}{WATCHDOG}Process group watchdog thread terminated with exception: CUDA error: uncorrectable ECC "
            "error encountered\nCUDA kernel errors might be asynchronously reported at some other API call",
            EXIT_DEVICE_LOST,
            "rank 3 on n2 was aborted: CUDA error: uncorrectable ECC error encountered",
        ),
        (
            f"{WATCHDOG}Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for "
            "600013 milliseconds before timing out.",
            EXIT_HUNG,
            "",
        ),
        ("double free or corruption", 134, ""),
    ],
)
def test_the_last_message_of_an_aborted_rank_explains_it(tmp_path: Path, says: str, code: int, why: str) -> None:
    """NCCL's threads abort it, with the same exit code for a failed GPU and for another rank that hangs."""
    words = ["bash", "-c", 'sleep 20 >&2 & echo "$0" >&2; kill -ABRT $$', says]
    rank = run_task(tmp_path, *words, stderr=subprocess.PIPE)
    assert rank.wait() == 134, "what its own processes do is not waited for"
    note = json.loads((tmp_path / "failed-3.json").read_text())
    assert (note["code"], note["node"], note["why"]) == (code, "n2", why)
    assert says in rank.stderr.read()


def test_running_out_of_memory_is_not_blamed_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As counted by the kernel, in both versions of control groups."""
    own = tmp_path / "cgroup"
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    for line, file, text in (
        ("0::/system.slice/job_7/step_0", "system.slice/job_7/step_0/memory.events", "low 0\noom 1\noom_kill 1\n"),
        ("4:memory:/slurm/job_7", "memory/slurm/job_7/memory.oom_control", "under_oom 0\noom_kill 2\n"),
    ):
        own.write_text(f"3:cpu,cpuacct:/x\n{line}\n")
        assert machine.oom_kills() == 0
        (tmp_path / "fs" / file).parent.mkdir(parents=True)
        (tmp_path / "fs" / file).write_text(text)
        assert machine.oom_kills() > 0
    count = tmp_path / "fs" / file
    program = "import sys; from pathlib import Path; from data_pipeline.common import machine; from slurm import task; "
    program += f"machine.OWN_CGROUPS, machine.CGROUPS = Path({str(own)!r}), Path({str(tmp_path / 'fs')!r}); "
    program += "sys.exit(task.main(sys.argv[1:]))"
    found: list[End] = []
    for kills in (f"sed -i s/2/3/ {count}; kill -9 $$", "kill -9 $$"):
        notes = tmp_path / str(len(found))
        notes.mkdir()
        env = {**os.environ, "CASCADE_NOTES": str(notes), "SLURM_PROCID": "1", "SLURMD_NODENAME": "n2"}
        done = subprocess.run([sys.executable, "-P", "-c", program, "bash", "-c", kills], env=env)
        found.append(read_end(notes, done.returncode, asked=False, job="7"))
    assert found[0].why == "rank 1 on n2 was killed because the job ran out of memory; raise cluster.mem"
    assert decide(found[0], found[0]).without == () and decide(found[0], found[0]).action == "restart"
    assert found[1].why == "rank 1 on n2 was killed by signal 9", "what was counted before its start is not its own"


def test_a_rank_that_saved_is_no_failure_for_srun(tmp_path: Path) -> None:
    rank = run_task(tmp_path, "bash", "-c", "trap 'exit 75' USR1; echo up; while :; do sleep 0.05; done")
    assert rank.stdout.readline() == "up\n"
    (child,) = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
    for pid in (rank.pid, int(child)):  # Slurm signals every process of a step
        os.kill(pid, signal.SIGUSR1)
    assert rank.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]


@pytest.mark.parametrize("code", [75, 78])
def test_a_note_that_cannot_be_written_changes_no_code(tmp_path: Path, code: int) -> None:
    """Its directory is on a full disk, for example."""
    assert run_task(tmp_path / "absent", "bash", "-c", f"exit {code}").wait() == code


@pytest.mark.parametrize(
    ("code", "action", "said"),
    [
        (75, "requeue", "not finished: requeue (not recorded: "),
        (78, "end 78", "srun ended with code 78; no restart, because it cannot be recorded: "),
        (2, "end 2", "srun ended with code 2 (not recorded: "),
    ],
)
def test_an_end_that_cannot_be_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, action: str, said: str
) -> None:
    """A job that has saved goes on; uncounted failures would be repeated forever."""
    (tmp_path / "restarts.jsonl").mkdir()
    words = [str(tmp_path), "--code", str(code), "--most", "3", "--requeue", "--notes", str(tmp_path / "absent")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{action}\n" and f"==> {said}{tmp_path}/restarts.jsonl: Is a directory" in shown.err


def test_no_rank_outlives_its_parent(tmp_path: Path) -> None:
    rank = run_task(tmp_path, "bash", "-c", "echo $$; sleep 1000")
    child = int(rank.stdout.readline())
    rank.kill()
    rank.wait()
    while not gone(child):  # pytest-timeout ends it if it does not
        time.sleep(0.05)


def test_ranks_meet_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"MASTER_ADDR": "a-name-that-nobody-resolves", "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}
    asked = []
    monkeypatch.setattr(task, "interface_towards", lambda address: asked.append(address))
    task.set_meeting_place(env)
    assert env["MASTER_ADDR"] == "a-name-that-nobody-resolves", "rank 0 is not where srun was called"
    env["CASCADE_MEET_AT_LAUNCHER"] = "1"
    task.set_meeting_place(env)
    assert env["MASTER_ADDR"] == "10.1.2.3" and asked[-1] == "10.1.2.3"


def test_the_interface_that_leads_to_the_address_is_found() -> None:
    assert task.interface_towards("127.0.0.1") == "lo"
    assert task.interface_towards("no-such-name.invalid") is None
    if Path("/proc/net/if_inet6").exists() and socket.has_ipv6:
        assert task.interface_towards("::1") in ("lo", None)
