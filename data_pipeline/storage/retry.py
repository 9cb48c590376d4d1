"""The one retry loop of the project: full-jitter backoff that progress resets, and a deadline without progress."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

from data_pipeline.common.errors import StoreError

logger = logging.getLogger(__name__)

FLOOR = 64 << 10
"""Bytes per second below which a stream that keeps breaking counts as silent: each byte buys a FLOORth of a second."""
HURRY_S = 15.0
"""Seconds that a failing store may still take once the process has been asked to stop (see `Patience.hurry`)."""
NAP_S = 0.25
_asked_at: float | None = None


def hurry_up(now: bool = True) -> None:
    """The process has been asked to stop (safe in a signal handler); `now=False`: no longer."""
    global _asked_at
    _asked_at = (_asked_at or time.monotonic()) if now else None


@dataclass(frozen=True)
class Patience:
    """How long to tolerate a failing store.

    `stall_s`: seconds without a byte after which a request is cancelled. `deadline_s`: seconds without progress, over
    all attempts, after which `StoreError` ends the run. Waits are uniform in [0, min(cap_s, base_s 2^attempt)]
    seconds. `hurry`: once a signal has asked the process to stop (`hurry_up`), give up after HURRY_S seconds, so that
    the process ends while whoever asked still waits.
    """

    stall_s: float = 20.0
    deadline_s: float = 600.0
    base_s: float = 0.2
    cap_s: float = 30.0
    hurry: bool = False


DEFAULT = Patience()


class Backoff:
    """Counts the failures of one piece of work; `wait` sleeps before the next attempt or gives up."""

    def __init__(self, what: str, patience: Patience) -> None:
        self.what = what
        self.patience = patience
        self.attempts = 0
        self.renewals = 0
        """How often the credentials were read again since the last progress."""
        self._silent, self._since = 0.0, time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds of work without progress; pauses between two reads do not count."""
        return self._silent + time.monotonic() - self._since

    def resume(self) -> None:
        """Work goes on after a pause of the caller's."""
        self._since = time.monotonic()

    def progress(self, count: int) -> None:
        """`count` bytes arrived. When they make up for the silence, the next failure starts a new series."""
        self._silent = max(self.silent_s - count / FLOOR, 0.0)
        self.resume()
        if not self._silent:
            self.attempts = self.renewals = 0

    def wait(self, cause: BaseException, deadline_s: float | None = None, advice: str = "") -> None:
        """Sleeps before another attempt.

        Args:
            advice: what to look at, for the end of the error.

        Raises:
            StoreError: too little arrived for the deadline; it names the object, the attempts and the last cause.
        """
        deadline = self.patience.deadline_s if deadline_s is None else min(deadline_s, self.patience.deadline_s)
        silent = self.silent_s
        self.attempts += 1
        if silent >= deadline or self._too_late():
            attempts = f"{self.attempts} attempt{'s' * (self.attempts > 1)}"
            raise StoreError(
                f"{self.what}: no progress for {silent:.0f} s in {attempts}, so the run gives up; "
                f"the last cause was {describe_error(cause)}{advice}"
            ) from cause
        longest = min(self.patience.cap_s, self.patience.base_s * 2.0 ** min(self.attempts - 1, 20))
        delay = min(random.uniform(0.0, longest), max(deadline - silent, 0.0))
        level = logging.WARNING if self.attempts >= 3 else logging.INFO
        logger.log(
            level, "%s: %s; attempt %d follows in %.1f s", self.what, describe_error(cause), self.attempts + 1, delay
        )
        until = time.monotonic() + delay
        while (left := until - time.monotonic()) > 0 and not self._too_late():
            time.sleep(min(left, NAP_S))

    def _too_late(self) -> bool:
        return self.patience.hurry and _asked_at is not None and time.monotonic() - _asked_at >= HURRY_S


def describe_error(error: BaseException) -> str:
    """The error as a phrase, never empty."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
