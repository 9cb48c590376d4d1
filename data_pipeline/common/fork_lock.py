"""A lock that a forked process gets unlocked, whatever the threads of its parent were doing."""

from __future__ import annotations

import os
import threading


class ForkLock:
    """A `threading.Lock`, used with `with`; it lives as long as the process."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def locked(self) -> bool:
        """Return whether a thread holds the lock."""
        return self._lock.locked()
