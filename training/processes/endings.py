"""How a run ends: signals, errors with exit codes, and the judgement of losses."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data_pipeline.common.errors import CascadeError
from data_pipeline.storage.retry import hurry_up
from training.processes.exit_codes import (
    EXIT_CRASH,
    EXIT_DEVICE_LOST,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_NOT_FINITE,
    EXIT_PREEMPTED,
    EXIT_SLOW_NODE,
    EXIT_SUPERSEDED,
)
from training.processes.failures import broken_gpu, leave_note, node_name
from training.processes.ranks import Ranks

AT_ONCE_S = 2.0
"""Seconds after a signal at which a command that has nothing to save is ended by force."""


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a whole program and end the process with its exit code.

    The interpreter is not finalised: library threads (gloo, pyarrow, decoders) that use it meanwhile occasionally abort
    the process ("terminate called without an active exception"), and a completed training would exit with 134.
    """
    code: object = 1
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is the stream's own
            os.set_inheritable(null, True)  # child processes need the streams as well
            setattr(sys, name, os.fdopen(null, "r" if name == "stdin" else "w"))
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else crash_code(error)
    finally:
        atexit._run_exitfuncs()
        if isinstance(code, str):
            print(code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # a terminal that was closed, a full disk
                code = code or EXIT_CRASH
        os._exit(code if isinstance(code, int) else int(code is not None))


def crash_code(error: BaseException) -> int:
    """Return the exit code for an error that nobody expected: that of a GPU that has failed, or of a crash."""
    return EXIT_DEVICE_LOST if isinstance(error, RuntimeError) and broken_gpu(str(error)) else EXIT_CRASH


class Preempted(CascadeError):
    """The run was asked to stop, and saved its state first."""

    exit_code = EXIT_PREEMPTED


class Interrupted(CascadeError):
    """Ctrl-C: the run saved and stopped."""

    exit_code = EXIT_INTERRUPTED


class NotFinite(CascadeError):
    """Training cannot continue: too many of its steps were skipped."""

    exit_code = EXIT_NOT_FINITE


class Superseded(CascadeError):
    """A later start continues this run; this one must not write any more."""

    exit_code = EXIT_SUPERSEDED


class RankLost(CascadeError):
    """Another process died, or did not respond within the time-outs; repeating the command resumes the run."""

    exit_code = EXIT_HUNG


class DeviceLost(CascadeError):
    """A GPU has failed, or is not there.

    Args:
        why: what has happened, for the record of the run.
        remedy: what to do about it, added to the message for the user.
        node: the node to blame.
        shared: all ranks raise the same error, so only rank 0 prints it.
    """

    exit_code = EXIT_DEVICE_LOST

    def __init__(self, why: str, remedy: str, node: str, shared: bool = False) -> None:
        super().__init__(f"{why}{remedy}")
        self.why, self.remedy, self.node, self.shared = why, remedy, node, shared

    def __reduce__(self) -> tuple[type[DeviceLost], tuple[str, str, str, bool]]:
        return DeviceLost, (self.why, self.remedy, self.node, self.shared)


def device_lost(error: BaseException, ranks: Ranks, shared: bool = False) -> DeviceLost | None:
    """Return the error that names this rank and its node if `error` says that its GPU has failed; None for any other.

    Args:
        error: as CUDA or NCCL raised it; its message names neither.
        ranks: this rank.
        shared: all ranks will raise the returned error.
    """
    said = broken_gpu(str(error)) if isinstance(error, RuntimeError) else ""
    if not said:
        return None
    return DeviceLost(
        f"rank {ranks.rank}: its GPU or the connection to it has failed, {ranks.place or node_name()}: {said}",
        "; the same command resumes from the newest checkpoint; if it is the same GPU again, exclude its node",
        node_name(),
        shared,
    )


def blame(rank: int, error: DeviceLost) -> None:
    """Tell the job script, if there is one, which node to blame."""
    if notes := os.environ.get("CASCADE_NOTES"):
        with suppress(OSError):
            leave_note(Path(notes), rank, error.node, error.exit_code, error.why)


class SlowNode(CascadeError):
    """The preflight found a slow node, which the run should exclude."""

    exit_code = EXIT_SLOW_NODE


def say(sentence: str) -> None:
    """Print a line to stderr; a closed terminal or a full disk does not change how the program ends."""
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def unless_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals to handle: without SIGHUP if it is ignored, as under nohup."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class Signals:
    """Records signals, which the training loop checks at each step. A second SIGINT ends the program at once. SIGHUP (a
    closed terminal) acts like SIGTERM, unless it is already ignored (nohup).

    Used as a context manager, which restores the previous handlers. A launcher starts its processes with these signals
    blocked, so that one that arrives while Python starts is neither lost nor fatal; they are unblocked here.
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._interrupts = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in unless_ignored(self.HANDLED):
            self._previous[number] = signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.HANDLED)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        hurry_up(now=False)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = self.received or number
        hurry_up(number=number)


class Terminated(KeyboardInterrupt):
    """Signal `number`, received by a command that has nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP (unless ignored) end a command that has nothing to save: waits for a failing store
    are cut short, incomplete files are removed, and after `AT_ONCE_S` seconds the process exits in any case.

    Only the first signal counts: Ctrl-C reaches the processes of a launcher twice, and must not interrupt the removal.
    """
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            return
        hurry_up(number=number)
        last = threading.Timer(AT_ONCE_S, _end_by_force, [number])
        last.daemon = True
        last.start()
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    caught = [n for n in ending if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        hurry_up(now=False)


def _end_by_force(number: int) -> None:
    say(f"stopped by {signal.Signals(number).name}; repeat the command to resume")
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


def stop_error(number: int, step: int, saved: int) -> CascadeError:
    """Return the error with which a run ends after signal `number` and step `step`; `saved`: the step of its newest
    checkpoint (-1: none)."""
    name = signal.Signals(number).name
    kind = Interrupted if number == signal.SIGINT else Preempted
    if saved == step:
        return kind(f"stopped by {name} after step {step}; everything is saved; the same command resumes from there")
    return kind(
        f"stopped by {name} after step {step}, which could not be saved; the same command resumes {from_where(saved)}"
    )


def from_where(saved: int) -> str:
    """Describe where a run resumes whose newest checkpoint is of step `saved` (-1: none)."""
    return f"from step {saved}" if saved >= 0 else "from the beginning"


class LossGuard:
    """Judges the loss of a step before the step is applied.

    A loss above `factor` times the median of the last WINDOW accepted losses is a spike (with `factor` 0, never).
    Refused losses do not enter the window. The window and the number of consecutive refused steps are part of the
    checkpoint, so a restarted run judges exactly as an uninterrupted one.
    """

    WINDOW = 64
    NEEDED = 16
    """Number of losses in the window before spikes are detected; the first losses fall quickly."""

    def __init__(self, factor: float, history: Iterable[float] = (), refused: int = 0) -> None:
        self.factor = factor
        self.history = list(history)[-self.WINDOW :]
        self.refused = refused
        """Number of consecutive steps, up to now, that were not applied."""

    def problem(self, loss: float) -> str:
        """Return why the step must not be applied; empty if it may be."""
        if not math.isfinite(loss):
            return "its loss is not finite"
        if self.factor and len(self.history) >= self.NEEDED:
            median = sorted(self.history)[len(self.history) // 2]
            if loss > self.factor * median:
                return (
                    f"its loss {loss:.4g} is above {self.factor:g} times the median {median:.4g} (train.spike_factor)"
                )
        return ""

    def accept(self, loss: float) -> None:
        """Record a loss whose step was applied."""
        self.refused = 0
        self.history = [*self.history, loss][-self.WINDOW :]

    def refuse(self) -> None:
        """Record that a step was not applied."""
        self.refused += 1

    def roll_back(self, history: Iterable[float]) -> None:
        """Reset to the window of the checkpoint that the run rolled back to."""
        self.history, self.refused = list(history), 0
