"""What a run does when something happens to it: signals, exit codes, and the decisions that all ranks take together."""

from __future__ import annotations

import signal
from types import FrameType

from data_pipeline.errors import CascadeError

EXIT_PREEMPTED = 75
"""Saved after SIGTERM, SIGUSR1 or SIGUSR2: start the same command again (job scripts requeue on this code)."""
EXIT_INTERRUPTED = 130
"""Saved after SIGINT (Ctrl-C)."""
EXIT_NOT_FINITE = 76
"""Too many steps in a row had a loss or gradient that was not finite."""
EXIT_SUPERSEDED = 77
"""A newer start of the same run owns the checkpoints now."""
STOP_CODES = (EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_NOT_FINITE, EXIT_SUPERSEDED)
"""Exits that all ranks decided together."""


class Preempted(CascadeError):
    """The run was asked to stop, and saved."""

    exit_code = EXIT_PREEMPTED


class Interrupted(CascadeError):
    """Ctrl-C: the run saved and stopped."""

    exit_code = EXIT_INTERRUPTED


class NotFinite(CascadeError):
    """Training cannot go on: its numbers are not finite."""

    exit_code = EXIT_NOT_FINITE


class Superseded(CascadeError):
    """Another process continues this run; this one must not write any more."""

    exit_code = EXIT_SUPERSEDED


class Signals:
    """Remembers that a signal came; the loop asks at the step boundary. A second SIGINT ends the program at once.

    Used as a context manager (the former handlers come back at its end).
    """

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in self.HANDLED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


def stop_error(number: int, step: int) -> CascadeError:
    """The error with which a run ends after signal `number`, once step `step` is saved."""
    name = signal.Signals(number).name
    kind = Interrupted if number == signal.SIGINT else Preempted
    return kind(f"stopped by {name} after step {step}; everything is saved, the same command goes on from there")
