"""What a process that we start does before its program begins."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In the child, as `preexec_fn`: ends when its parent is killed, so that no orphan goes on working."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent_only() -> None:
    """The same in a process group of its own: the terminal's Ctrl-C reaches it through the parent, once."""
    os.setpgid(0, 0)
    die_with_parent()
