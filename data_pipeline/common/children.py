"""Child processes: their set-up between fork and exec, and their pauses."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Kill this child when its parent dies, so that no orphan keeps working. Use as `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent_only() -> None:
    """Like `die_with_parent`, in a process group of its own: the terminal's Ctrl-C reaches it once, from the parent."""
    os.setpgid(0, 0)
    die_with_parent()


@contextmanager
def pausing(groups: Callable[[], Iterable[int]]) -> Iterator[None]:
    """Let Ctrl-Z (SIGTSTP) stop these process groups along with this process, and `fg` or `bg` continue them.

    Where no shell could continue this process (`ssh -t HOST cascade ...`), the system ignores the request.

    Args:
        groups: returns the process groups that are running now (see `die_with_parent_only`).
    """

    def pause(number: int, _frame: object) -> None:
        running = list(groups())
        _signal_groups(running, signal.SIGSTOP)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # returns when somebody continues this process
        signal.signal(number, pause)
        _signal_groups(running, signal.SIGCONT)

    caught = threading.current_thread() is threading.main_thread()
    caught = caught and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL
    if caught:
        signal.signal(signal.SIGTSTP, pause)
    try:
        yield
    finally:
        if caught:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def _signal_groups(groups: Iterable[int], number: int) -> None:
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, number)
