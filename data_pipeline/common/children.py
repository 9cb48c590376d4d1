"""Set-up of a child process between fork and exec."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Kill this child when its parent dies, so that no orphan keeps working. Use as `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent_only() -> None:
    """Like `die_with_parent`, in a process group of its own: the terminal's Ctrl-C reaches it once, from the parent."""
    os.setpgid(0, 0)
    die_with_parent()
