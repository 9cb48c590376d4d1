from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.processes.endings import Interrupted, LossGuard, Preempted, Signals, crash_code, stop_error
from training.processes.exit_codes import EXIT_CODES, FINAL_CODES, STOP_CODES
from training.processes.failures import broken_gpu, is_lost_rank

NAN = float("nan")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_child_processes_have_the_streams_that_the_caller_closed(closed: str) -> None:
    child = "import faulthandler; faulthandler.enable(); raise SystemExit(7)"
    main = "import subprocess, sys; from training.processes.endings import run_program; "
    main += f"run_program(lambda: subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    done = subprocess.run(f"{sys.executable} -c {shlex.quote(main)} {closed}", shell=True, cwd=ROOT)
    assert done.returncode == 7


def test_a_signal_is_remembered_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1, "the first one counts"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_ctrl_c_ends_at_once() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_with_nothing_to_save_ends_at_once(number: signal.Signals, code: int) -> None:
    """Even if a thread is stuck; what the program has open is closed first."""
    program = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from training.cli import main
from training.processes import endings
endings.AT_ONCE_S = 0.5
with main._errors("index", False), endings.ends_at_once(), ThreadPoolExecutor(1) as pool:
    pool.submit(time.sleep, 600)
    try:
        print("ready", flush=True)
        while True:
            time.sleep(0.05)  # a signal just before a sleep does not cut it short
    finally:
        print("closed", flush=True)
"""
    started = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    started.send_signal(number)
    out, err = started.communicate()
    assert (out, started.returncode) == ("closed\n", code)
    assert f"stopped by {number.name}" in err and "Traceback" not in err


def test_exit_codes() -> None:
    error = stop_error(signal.SIGUSR2, 7, 7)
    assert isinstance(error, Preempted) and error.exit_code == 75
    assert "SIGUSR2 after step 7" in str(error)
    error = stop_error(signal.SIGINT, 7, 5)
    assert isinstance(error, Interrupted) and error.exit_code == 130


def test_one_table_of_exit_codes() -> None:
    """docs/training.md lists the codes of the table in code, docs/cluster.md what the Slurm script does at each, and
    which of them all ranks agree on does not drift."""
    page = (ROOT / "docs" / "training.md").read_text()
    table = page.split("## Exit codes")[1].split("\n## ")[0]
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert sorted(listed) == sorted(EXIT_CODES)
    other = (ROOT / "docs" / "cluster.md").read_text()
    rows = dict(re.findall(r"^\| ([\d, ]+) \| (.+) \|$", other.split("(training.md#exit-codes)")[1], re.MULTILINE))
    on_slurm = {int(code): what for codes, what in rows.items() for code in codes.split(", ")}
    assert {code for code in on_slurm if code < 128 or code == 130} == set(EXIT_CODES)
    assert {code for code, what in on_slurm.items() if what == "ends the job"} == {0, *FINAL_CODES}
    assert set(STOP_CODES) == {75, 76, 77, 130}
    assert [code for code, end in EXIT_CODES.items() if end.restart] == [75, 78, 80]
    assert set(FINAL_CODES) == {2, 76, 77, 130} and not any(EXIT_CODES[code].restart for code in FINAL_CODES)


@pytest.mark.parametrize(
    "said",
    [
        "NCCL communicator was aborted on rank 3.",
        "NCCL error ... ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:5033",
        "Timed out waiting 15000ms for recv operation to complete",
    ],
)
def test_errors_that_another_rank_has_caused(said: str) -> None:
    assert is_lost_rank(said) and not broken_gpu(said)
    assert not is_lost_rank("mat1 and mat2 shapes cannot be multiplied (8x32 and 16x64)")


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:94, unhandled {} error (run with NCCL_DEBUG=INFO"
)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
            "CUDA error: an illegal memory access was encountered",
        ),
        ("CUDA error: unspecified launch failure", "CUDA error: unspecified launch failure"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "CUDA error: CUDA-capable device(s) is/are"),
        ("CUDA error: no CUDA-capable device is detected", "CUDA error: no CUDA-capable device is detected"),
        ("CUDA error: the launch timed out and was terminated", "CUDA error: the launch timed out"),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "CUDA]: an illegal memory access"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`", "CUBLAS_STATUS_EXECUTION"),
        (
            f"{NCCL.format('cuda')}=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA "
            "function failed.\nLast error:\nCuda failure 999 'unknown error'",
            "Cuda failure 999 'unknown error'",
        ),
        (f"{NCCL.format('system')}\nncclSystemError: System call or external library call failed", "unhandled system"),
        (
            "[PG ID 0 PG GUID 0(default_pg) Rank 2] Process group watchdog thread terminated with exception: CUDA "
            "error: uncorrectable ECC error encountered",
            "CUDA error: uncorrectable ECC error encountered",
        ),
    ],
)
def test_errors_of_a_gpu_that_has_failed(said: str, line: str) -> None:
    assert broken_gpu(said).startswith(line)
    assert crash_code(torch.AcceleratorError(said)) == 80 and crash_code(ValueError(said)) == 1


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: device-side assert triggered",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        f"{NCCL.format('cuda')}\nncclUnhandledCudaError\nCuda failure 2 'out of memory'",
        f"{NCCL.format('system')}\nncclSystemError\nsocketPollConnect: connect returned Connection refused",
        "CUDA error: invalid argument",
    ],
)
def test_errors_that_are_not_the_gpus(said: str) -> None:
    assert broken_gpu(said) == "" and crash_code(RuntimeError(said)) == 1


def feed(guard: LossGuard, *losses: float) -> list[str]:
    problems = []
    for loss in losses:
        problems.append(guard.problem(loss))
        if not problems[-1]:
            guard.accept(loss)
    return problems


def test_a_loss_that_is_not_finite_is_never_applied() -> None:
    assert feed(LossGuard(0.0), NAN, float("inf"), 1.0) == ["its loss is not finite"] * 2 + [""]


def test_a_spike_needs_a_history() -> None:
    guard = LossGuard(10.0)
    assert not any(feed(guard, *[0.001] * (LossGuard.NEEDED - 1), 5.0)), "too early to tell"
    assert "more" in guard.problem(1e9) or "above" in guard.problem(1e9)


def test_refused_steps_never_enter_the_history() -> None:
    """A series of spikes and NaNs does not become the new normal, and does not blind the guard."""
    guard = LossGuard(10.0)
    feed(guard, *[1.0] * 64)
    assert all(feed(guard, *[50.0, NAN] * 200))
    assert guard.history == [1.0] * 64
    assert feed(guard, 9.9) == [""]


def test_the_guard_continues_where_a_checkpoint_left_it() -> None:
    guard = LossGuard(10.0)
    feed(guard, *[1.0] * 80)
    guard.refuse()
    again = LossGuard(10.0, guard.history, guard.refused)
    assert again.refused == 1
    assert again.problem(11.0) == guard.problem(11.0) != ""
    assert len(again.history) == LossGuard.WINDOW


def test_falling_losses_are_no_spikes() -> None:
    assert not any(feed(LossGuard(20.0), *[2.0 * 0.98**step for step in range(500)]))


def test_the_guard_can_be_switched_off() -> None:
    assert not any(feed(LossGuard(0.0), *[1.0] * 64, 1e12))


PROGRAM = """
import atexit, sys, threading, time
from training.processes.endings import run_program
atexit.register(print, "registered")
threading.Thread(target=time.sleep, args=(600,)).start()
def main():
    sys.stdout.write("said ")
    {end}
run_program(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ("return None", 0, ""),
        ("return 78", 78, ""),
        ("raise SystemExit(75)", 75, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_a_program_ends_with_its_code_whatever_its_threads_do(end: str, code: int, says: str) -> None:
    """Output and functions registered for the exit are not lost."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == code and done.stdout == "said registered\n"
    assert says in done.stderr if says else not done.stderr
