"""Writes and deletes checkpoints in the background: the training loop only waits for the copy to host memory."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from data_pipeline.common.errors import CascadeError
from training.checkpoint.store import CheckpointError, CheckpointStore
from training.config.experiment import CheckpointConfig
from training.engine.base import Snapshot
from training.processes.ranks import Ranks

log = logging.getLogger(__name__)

NICE = 10
"""Niceness of the writing thread: if cores are scarce, training goes first."""
END_S = 60.0
"""Seconds that the end of a run waits for deletions in progress."""
STOPPED_S = 5.0
"""The same after a signal, since its sender may not wait long before killing the process."""


def _give_way() -> None:
    """Lower the priority of this thread; a container that forbids this costs speed, not a checkpoint."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Pruner:
    """Deletes old checkpoints in its own thread, so that a slow store delays neither the steps nor the next save."""

    def __init__(self, store: CheckpointStore, config: CheckpointConfig) -> None:
        self.store, self.config = store, config
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._again = False

    def request(self) -> None:
        """Start deleting; called after a checkpoint was committed."""
        with self._lock:
            self._again = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prune", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        _give_way()
        while True:
            with self._lock:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            try:
                self.store.prune(self.config.keep_last, self.config.keep_every, self.config.keep_best)
            except Exception as error:  # costs space, not the run; the next save checks ownership
                expected = isinstance(error, (OSError, CascadeError))
                log.warning("old checkpoints were not deleted: %s", error, exc_info=None if expected else error)

    def close(self, seconds: float) -> None:
        """Wait up to this many seconds for deletions in progress."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                log.warning("old checkpoints are still being deleted; the next start will continue")


class CheckpointWriter:
    """Writes one checkpoint at a time: a thread assembles, writes and commits it while training continues; another
    thread deletes old ones.

    All ranks call `start` and `wait` at the same steps. The thread uses its own process group, so its collectives never
    mix with those of the training loop. On rank 0 it calls `on_saved` once a step is committed.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        ranks: Ranks,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.store, self.config, self.ranks, self._on_saved = store, config, ranks, on_saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pruner = Pruner(store, config)
        self.last_step = -1
        """The newest committed step; -1: none yet."""
        self.seconds = 0.0
        """Seconds that the last checkpoint took in the background."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written right now."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        """Start writing; `wait` must have been called since the last `start`, as a snapshot reuses the same memory.
        `meta`: JSON values to store with the tensors."""
        assert self._thread is None, "wait() for the previous checkpoint first"
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, meta), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.config.background:
            self._thread.join()

    def _write(self, step: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        began = time.monotonic()
        _give_way()
        try:
            self.store.save(step, snapshot.assemble(), meta, self.ranks, self.ranks.background)
            self.last_step = step
            if self.ranks.is_main:
                self._on_saved(step)
                self._pruner.request()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began

    def wait(self) -> CheckpointError | None:
        """Wait until the checkpoint in progress is committed. A failure to write is returned, since training can
        continue; any other error is raised."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, error = None, self._error
        self._error = None
        if error is None or isinstance(error, CheckpointError):
            return error
        raise error

    def close(self, hurry: bool = False) -> None:
        """Wait for deletions in progress, for END_S seconds at most (with `hurry`, STOPPED_S)."""
        self._pruner.close(STOPPED_S if hurry else END_S)
