"""The only retry loop of the project: full-jitter backoff, reset by progress, with a deadline for lack of progress."""

from __future__ import annotations

import errno
import logging
import math
import os
import queue
import random
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from data_pipeline.common.errors import PASSING, StoreError

T = TypeVar("T")

logger = logging.getLogger(__name__)

FLOOR = 64 << 10
"""Bytes per second below which a stream that keeps breaking counts as silent: FLOOR bytes make up for one second."""
HURRY_S = 15.0
"""Seconds to keep trying a failing store once the process has been asked to stop (see `Patience.hurry`)."""
READ_S = 1.5
"""The same for reads, which have nothing to save."""
FIRST_CONTACT_S = 30.0
"""Deadline for an endpoint that has never answered in this process: probably a wrong address, not an outage."""
FILE_S = 60.0
"""Deadline for a file system that fails: a file server comes back within that time, a broken disk never does."""
NAP_S = 0.25
_asked_at: float | None = None
_asked_by = 0


def hurry_up(now: bool = True, number: int = 0) -> None:
    """Record that the process was asked to stop, by signal `number`; `now=False` revokes that.

    Safe in a signal handler.
    """
    global _asked_at, _asked_by
    _asked_at, _asked_by = ((_asked_at or time.monotonic()), _asked_by or number) if now else (None, 0)


class StoppedWaiting(StoreError):
    """The process was asked to stop, by signal `number`, while waiting for data."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number
        self.exit_code = 130 if number == signal.SIGINT else 75

    def __str__(self) -> str:
        return str(self.args[0])


def get_unless_asked(source: queue.Queue[T]) -> T:
    """Return the next item of a queue, waiting without limit or, once the process was asked to stop, for `READ_S`.

    Raises:
        StoppedWaiting: the process was asked to stop, and no item came.
    """
    while True:
        try:
            return source.get(timeout=NAP_S)
        except queue.Empty:
            check_asked()


def check_asked() -> None:
    """Stop waiting for data if the process was asked to stop; call it regularly while waiting.

    Raises:
        StoppedWaiting: the process was asked to stop at least `READ_S` ago.
    """
    if _asked_at is not None and time.monotonic() - _asked_at >= READ_S:
        raise StoppedWaiting(f"stopped by {_asker()} while waiting for data", _asked_by)


def _asker() -> str:
    return signal.Signals(_asked_by).name if _asked_by else "a signal"


@dataclass(frozen=True)
class Patience:
    """How long to tolerate a failing store.

    Args:
        stall_s: seconds without a byte after which a request is cancelled.
        deadline_s: seconds without progress, over all attempts, after which `StoreError` ends the run.
        base_s, cap_s: the wait before a retry is uniform in [0, min(cap_s, base_s 2^attempt)] seconds.
        hurry: once a signal has asked the process to stop (`hurry_up`), give up after HURRY_S seconds, to end before
            the sender of the signal loses patience.
        reads: with `hurry`, give up after READ_S instead, because nothing is lost.
    """

    stall_s: float = 20.0
    deadline_s: float = 600.0
    base_s: float = 0.2
    cap_s: float = 30.0
    hurry: bool = False
    reads: bool = False

    def too_late(self) -> bool:
        """Return whether the process was asked to stop so long ago that it must not wait any longer."""
        longest = READ_S if self.reads else HURRY_S
        return self.hurry and _asked_at is not None and time.monotonic() - _asked_at >= longest


DEFAULT = Patience()
PATIENCE = Patience(hurry=True)
"""Gives up on a failing store soon after a signal has asked the process to stop."""


class Backoff:
    """Counts the failures of one operation; `wait` sleeps before the next attempt or gives up.

    Args:
        what: the operation or object, for messages.
        patience: retry limits.
    """

    def __init__(self, what: str, patience: Patience) -> None:
        self.what = what
        self.patience = patience
        self.attempts = 0
        self.renewals = 0
        """How often the credentials were reloaded since the last progress."""
        self._silent, self._since = 0.0, time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds without progress; the caller's pauses between reads do not count."""
        return self._silent + time.monotonic() - self._since

    def resume(self) -> None:
        """Continue after a pause of the caller."""
        self._since = time.monotonic()

    def progress(self, count: int) -> None:
        """Record that `count` bytes arrived. Once they make up for the silence, the count of failures is reset."""
        self._silent = max(self.silent_s - count / FLOOR, 0.0)
        self.resume()
        if not self._silent:
            self.attempts = self.renewals = 0

    def wait(self, cause: BaseException, deadline_s: float | None = None, advice: str = "") -> None:
        """Sleep before another attempt.

        Args:
            cause: the error of the last attempt.
            deadline_s: a deadline shorter than that of `patience`.
            advice: what to check, for the end of the error message.

        Raises:
            StoreError: too little progress before the deadline; the message names the object, the attempts and the last
                cause.
            StoppedWaiting: the process was asked to stop, and nothing is lost by giving up.
        """
        deadline = self.patience.deadline_s if deadline_s is None else min(deadline_s, self.patience.deadline_s)
        silent = self.silent_s
        self.attempts += 1
        if self.patience.reads and self.patience.too_late():
            raise StoppedWaiting(
                f"{self.what}: stopped by {_asker()} while the store failed; the last cause was "
                f"{describe_error(cause)}",
                _asked_by,
            ) from cause
        if silent >= deadline or self.patience.too_late():
            attempts = f"{self.attempts} attempt{'s' * (self.attempts > 1)}"
            raise StoreError(
                f"{self.what}: no progress for {silent:.0f} s in {attempts}; giving up; "
                f"the last cause was {describe_error(cause)}{advice}"
            ) from cause
        longest = min(self.patience.cap_s, self.patience.base_s * 2.0 ** min(self.attempts - 1, 20))
        delay = min(max(random.uniform(0.0, longest), asked_delay(cause)), max(deadline - silent, 0.0))
        level = logging.WARNING if self.attempts >= 3 else logging.INFO
        logger.log(
            level, "%s: %s; starting attempt %d in %.1f s", self.what, describe_error(cause), self.attempts + 1, delay
        )
        until = time.monotonic() + delay
        while (left := until - time.monotonic()) > 0:
            if self.patience.too_late():
                return self.wait(cause, deadline_s, advice) if self.patience.reads else None
            time.sleep(min(left, NAP_S))


def result_of(running: Future[T], patience: Patience, limit_s: float = math.inf) -> T:
    """Return what work in another thread returns, or raise what it raises; cancel it if it takes too long.

    Args:
        running: the work.
        patience: once the process was asked to stop, tells when waiting must end.
        limit_s: seconds that the work may take.

    Raises:
        TimeoutError: it took too long, or the process was asked to stop.
    """
    end = time.monotonic() + limit_s
    while True:
        with suppress(TimeoutError):  # of the wait, or one that the work raised
            return running.result(NAP_S)
        if running.done():  # it may have ended since: a write that succeeded must not be repeated
            return running.result()
        if patience.too_late() or time.monotonic() >= end:
            running.cancel()
            raise TimeoutError("no answer yet" if patience.too_late() else f"no answer within {limit_s:.0f} s")


def asked_delay(error: BaseException) -> float:
    """Return for how many seconds a server asks not to be asked again (`Retry-After`); 0 if it does not say."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):  # botocore's
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:
        headers = getattr(error, "headers", None) or getattr(answer, "headers", None)
    value = str(headers.get("Retry-After") or headers.get("retry-after") or "") if headers else ""
    with suppress(ValueError):
        seconds = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
        return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
    return 0.0


def persist(place: str, action: Callable[[], T], patience: Patience = DEFAULT) -> T:
    """Return what `action` returns; repeat it while the file system fails in a way that may pass (`PASSING`).

    Args:
        place: the path, for messages.
        action: opens what it reads by its path.
        patience: retry limits; FILE_S applies if it is shorter than the deadline.

    Raises:
        StoreError: it still fails at the deadline.
        OSError: any other error of `action`.
    """
    backoff: Backoff | None = None
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            backoff = backoff or Backoff(place, patience)
            backoff.wait(error, FILE_S, "; check the disk, or the mount of the file server")


def load_files(place: str, load: Callable[[], T]) -> T:
    """Return what `load` returns; repeat it while files fail in a way that may pass, as `persist` does.

    `load` may leave the reading to a library, which calls a file missing, or raises an error of its own, where its file
    system has failed. So after any error of a file it is repeated once, as soon as all files of `place` can be read.

    Args:
        place: the file or directory that it reads.

    Raises:
        StoreError: it still fails at the deadline.
        Exception: any other error of `load`.
    """
    hidden = True

    def attempt() -> T:
        nonlocal hidden
        try:
            return load()
        except StoreError:
            raise
        except Exception as error:
            if passing := next((number for number in _numbers(error) if number in PASSING), 0):
                raise OSError(passing, os.strerror(passing), place) from error
            if not hidden or not _numbers(error):
                raise
            hidden = False
            persist(place, partial(_touch, Path(place)), PATIENCE)
        return attempt()

    return persist(place, attempt, PATIENCE)


def _numbers(error: BaseException | None) -> list[int]:
    """Return the errno of each error of a file (0 if not known) among an error and those that it is a consequence of.
    Libraries written in Rust only name it in their message."""
    if error is None:
        return []
    said = re.search(r"\(os error (\d+)\)", str(error))
    own = [int(said[1])] if said else [error.errno or 0] if isinstance(error, OSError) else []
    return own + _numbers(error.__cause__ or error.__context__)


def _touch(place: Path) -> None:
    """Read a byte of a file, or of each file in a directory. Raises `OSError`."""
    for path in place.iterdir() if place.is_dir() else [place]:
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                file.read(1)


def disk_fault(read: Callable[[], T]) -> T:
    """Return what `read` returns. A disk that reports EIO until the deadline is broken and raises OSError, so that the
    caller can do without the file; a file server that is gone raises StoreError, as an object store does."""
    try:
        return read()
    except StoreError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.EIO:
            raise cause from error
        raise


def describe_error(error: BaseException) -> str:
    """Return the error as one line, never empty: its type and message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
