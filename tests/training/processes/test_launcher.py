"""The launcher (no torch in these processes, so they start fast)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from tests.children import gone
from training.config.experiment import Experiment
from training.processes.launcher import run_processes, worker

pytestmark = pytest.mark.usefixtures("no_nohup")


def program(body: str) -> list[str]:
    header = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-c", header + textwrap.dedent(body)]


def test_all_processes_end_well(tmp_path: Path) -> None:
    body = f"open(f'{tmp_path}/{{rank}}', 'w').write(os.environ['WORLD_SIZE'] + os.environ['OMP_NUM_THREADS'])"
    environ = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        assert run_processes(program(body), 3, threads=2) == 0
    finally:
        if environ is not None:
            os.environ["OMP_NUM_THREADS"] = environ
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["32"] * 3


def test_variables_that_torchrun_left_in_a_shell_do_not_reach_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    body = "sys.exit(os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True' or os.environ['MASTER_ADDR'] == 'nowhere')"
    assert run_processes(program(body), 1) == 0


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ("true", "UserError: 127.0.0.1 cannot be reached (Network is unreachable)"),
        ("ip link set lo up && ip address del 127.0.0.1/8 dev lo", "::1 lo"),
        ("ip link set lo up && export GLOO_SOCKET_IFNAME=eth7", "127.0.0.1 eth7"),
    ],
)
def test_where_the_processes_of_a_machine_meet(prepare: str, said: str) -> None:
    """Even in a container without a network, where gloo would end in a traceback, or hang."""
    program = "import os; from training.processes.launcher import INTERFACE, meeting_here; os.environ |= meeting_here()"
    program += "; print(os.environ['MASTER_ADDR'], os.environ[INTERFACE])"
    script = f'{prepare} && exec {sys.executable} -c "{program}"'
    done = subprocess.run(["unshare", "-rn", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "ip: not found" in done.stderr:
        pytest.skip("no network namespaces here")
    assert said in done.stdout + done.stderr
    if done.returncode:
        assert "ip link set lo up" in done.stderr


def test_one_process_dies_and_the_others_are_ended() -> None:
    assert run_processes(program("sys.exit(3) if rank == 1 else time.sleep(600)"), 2, grace_s=0.5) == 3


def test_a_killed_process_is_128_plus_its_signal() -> None:
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(600)"
    assert run_processes(program(body), 2, grace_s=0.5) == 128 + signal.SIGKILL


def test_a_process_that_was_killed_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    body = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)"
    assert run_processes(program(body), 2, grace_s=0.5) == 128 + signal.SIGKILL
    assert capfd.readouterr().err.startswith("rank 1 was killed by signal 9 (SIGKILL), usually because the machine ran")


def main(_: Experiment) -> None:
    """A command that fails."""
    raise DataError("a disk of this node is missing")


def test_an_error_is_said_once_whichever_rank_has_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 may be the only one that has it, and rank 0 then knows only that it has lost rank 1."""
    (tmp_path / "config.json").write_text("{}")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert worker(__name__, "Experiment", f"{tmp_path}/config.json", f"{tmp_path}/result.json") == 2
    assert capfd.readouterr().err == "a disk of this node is missing\n"


STOPPED = """
import os, signal, sys, time, types
from training.processes.launcher import worker
def main(config):
    try:
        os.kill(os.getpid(), NUMBER)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), NUMBER)  # Ctrl-C reaches the launcher and its processes
        time.sleep(0.05)
        print("cleaned up", flush=True)
sys.modules["a_command"] = types.SimpleNamespace(main=main)
sys.exit(worker("a_command", "Experiment", *sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_with_nothing_to_save_cleans_up_before_a_signal_ends_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = STOPPED.replace("NUMBER", str(int(number)))
    for rank, said in (("1", f"stopped by {number.name}\n"), ("0", "")):
        done = subprocess.run(
            [sys.executable, "-c", code, f"{tmp_path}/config.json", f"{tmp_path}/result.json"],
            env={**os.environ, "RANK": rank}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (128 + number, "cleaned up\n", said)


def test_the_others_may_finish_after_an_agreed_exit(tmp_path: Path) -> None:
    """Rank 1 exits with 75 (saved, start again); rank 0 still writes for longer than it would be given after a
    crash."""
    body = f"""
    if rank == 1: sys.exit(75)
    time.sleep(2); open('{tmp_path}/written', 'w'); sys.exit(75)
    """
    assert run_processes(program(body), 2, grace_s=0.5) == 75
    assert (tmp_path / "written").exists()


def test_the_others_may_finish_after_a_shared_error(tmp_path: Path) -> None:
    """Rank 1 exits with 2 and marks the error as shared; rank 0, which reports it, is still busy with W&B."""
    body = f"""
    if rank == 1: open('{tmp_path}/agreed', 'w'); sys.exit(2)
    time.sleep(2); open('{tmp_path}/said', 'w'); sys.exit(2)
    """
    assert run_processes(program(body), 2, grace_s=0.5, agreed=tmp_path / "agreed") == 2
    assert (tmp_path / "said").exists()


OUTER = """
import sys
from training.processes.launcher import run_processes
assert "torch" not in sys.modules
sys.exit(run_processes([sys.executable, "-c", sys.argv[1]], 2))
"""
INNER = r"""
import os, signal, sys, time
def got(number, frame):
    os.write(1, f"got {signal.Signals(number).name}\n".encode())
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, got)
os.write(1, f"ready {os.getpid()}\n".encode())
while True:
    time.sleep(0.05)  # a signal just before a sleep does not cut it short
"""


def start_pair() -> tuple[subprocess.Popen[str], list[int]]:
    outer = subprocess.Popen([sys.executable, "-c", OUTER, INNER], stdout=subprocess.PIPE, text=True)
    assert outer.stdout is not None
    return outer, [int(outer.stdout.readline().split()[1]) for _ in range(2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_signals_reach_every_process(number: signal.Signals) -> None:
    outer, _ = start_pair()
    outer.send_signal(number)
    out, _ = outer.communicate(timeout=60)
    assert out.splitlines() == [f"got {number.name}"] * 2
    assert outer.returncode == 75


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(state: str, pids: list[int]) -> None:
    while {state_of(pid) for pid in pids} != {state}:
        time.sleep(0.01)


def test_ctrl_z_stops_every_process_and_fg_continues_them() -> None:
    outer = subprocess.Popen(
        [sys.executable, "-c", OUTER, INNER], stdout=subprocess.PIPE, text=True, process_group=0
    )  # a group of its own, as a shell gives to a job
    assert outer.stdout is not None
    pids = [int(outer.stdout.readline().split()[1]) for _ in range(2)]
    for _ in range(2):
        outer.send_signal(signal.SIGTSTP)
        until("T", [outer.pid, *pids])
        os.killpg(outer.pid, signal.SIGCONT)  # what `fg` sends
        until("S", [outer.pid, *pids])
    outer.send_signal(signal.SIGTERM)
    outer.communicate(timeout=60)
    assert outer.returncode == 75


def test_ctrl_z_is_ignored_where_nothing_could_continue_the_run() -> None:
    """In `ssh -t HOST cascade train`: there is no shell, and the system ignores it, for all processes."""
    outer = subprocess.Popen(
        [sys.executable, "-c", OUTER, INNER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert outer.stdout is not None
    pids = [int(outer.stdout.readline().split()[1]) for _ in range(2)]
    outer.send_signal(signal.SIGTSTP)
    outer.send_signal(signal.SIGTERM)
    outer.communicate(timeout=60)
    assert outer.returncode == 75 and all(gone(pid) for pid in pids)


DEAF = r"""
import os, signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os.write(1, b"heard\n"))
os.write(1, f"ready {os.getpid()}\n".encode())
while True:
    time.sleep(0.05)
"""


def test_a_second_ctrl_c_ends_processes_that_hang() -> None:
    outer = subprocess.Popen([sys.executable, "-c", OUTER, DEAF], stdout=subprocess.PIPE, text=True)
    assert outer.stdout is not None
    pids = [int(outer.stdout.readline().split()[1]) for _ in range(2)]
    for _ in range(2):
        outer.send_signal(signal.SIGINT)
        assert [outer.stdout.readline() for _ in range(2)] == ["heard\n"] * 2
    outer.communicate(timeout=60)
    assert outer.returncode == 130 and all(gone(pid) for pid in pids)


STARTING = """
import os, sys, time
os.write(1, b"starting\\n")
time.sleep(0.5)
from training.processes.endings import Signals
with Signals() as signals:
    sys.exit(signals.received)
"""


def test_a_signal_while_a_process_starts_waits_for_it() -> None:
    """It arrives before the program can handle it, and is delivered once it can: nothing is killed, nothing is lost."""
    outer = subprocess.Popen(
        [sys.executable, "-c", OUTER.replace(", 2)", ", 2, hold_signals=True)"), STARTING],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert outer.stdout is not None and outer.stdout.readline() == "starting\n"
    outer.send_signal(signal.SIGUSR1)
    outer.communicate(timeout=60)
    assert outer.returncode == signal.SIGUSR1


TERMINAL = """
import sys, time
from training.processes.launcher import run_processes
from training.processes.endings import Signals, run_program, say, stop_error
def main():
    with Signals() as signals:
        print("ready", flush=True)
        while not signals.received:
            time.sleep(0.02)
    open(sys.argv[1], "w").write(str(stop_error(signals.received, 7, 7)))
    say("nobody reads this")
    return 75
run_program(main)
"""


def closed_terminal(command: list[str], processes: int = 1) -> int:
    """Starts a command in a terminal of its own and closes it once its processes have said `ready`; its exit code."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    outer = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal)
    os.close(slave)
    said = b""
    while said.count(b"\r\n") < processes:  # complete lines: a writer may still be writing
        said += os.read(master, 1024)
    os.close(master)
    return outer.wait(timeout=60)


def test_a_closed_terminal_is_a_request_to_stop(tmp_path: Path) -> None:
    """Writing to the terminal that is gone does not change the exit code."""
    said = tmp_path / "said"
    assert closed_terminal([sys.executable, "-c", TERMINAL, str(said)]) == 75
    assert said.read_text().startswith("stopped by SIGHUP after step 7; everything is saved")


def test_a_closed_terminal_stops_the_processes_of_a_launcher(tmp_path: Path) -> None:
    body = TERMINAL.replace("sys.argv[1]", f"'{tmp_path}/' + __import__('os').environ['RANK']")
    assert closed_terminal([sys.executable, "-c", OUTER, body], 2) == 75
    assert [(tmp_path / rank).read_text()[:17] for rank in "01"] == ["stopped by SIGHUP"] * 2


def test_nohup_keeps_a_program_running() -> None:
    """A program that was told to ignore a closed terminal continues."""
    program = (
        "import os, signal; from training.processes.endings import Signals\n"
        "with Signals() as s: os.kill(os.getpid(), signal.SIGHUP); print(s.received)"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n")


def test_no_orphan_outlives_the_launcher() -> None:
    outer, pids = start_pair()
    outer.kill()
    outer.communicate(timeout=60)  # returns when the last holder of the pipe is gone
    while not all(gone(pid) for pid in pids):  # pytest-timeout ends it if they stay
        time.sleep(0.02)
