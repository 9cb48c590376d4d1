"""Writes checkpoints in the background, and deletes old ones: the loop waits for the copy to host memory only."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from data_pipeline.common.errors import CascadeError
from training.checkpoint.store import CheckpointError, CheckpointStore
from training.config.experiment import CheckpointConfig
from training.engine.base import Snapshot
from training.processes.ranks import Ranks

log = logging.getLogger(__name__)

NICE = 10
"""Priority of the writing thread: where cores are scarce, training goes first."""
END_S = 60.0
"""How long the end of a run waits for deletions under way."""
STOPPED_S = 5.0
"""The same after a signal: whoever sent it may not wait long."""


class Pruner:
    """Deletes old checkpoints in a thread of its own, beside the steps and beside the next save: a slow store holds
    nothing up."""

    def __init__(self, store: CheckpointStore, config: CheckpointConfig) -> None:
        self.store, self.config = store, config
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._again = False

    def request(self) -> None:
        """A checkpoint was committed: what it replaces may go."""
        with self._lock:
            self._again = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prune", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            with self._lock:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            try:
                self.store.prune(self.config.keep_last, self.config.keep_every, self.config.keep_best)
            except (OSError, CascadeError) as error:  # it costs room, not the run; the next save finds out who owns it
                log.warning("old checkpoints were not deleted: %s", error)

    def close(self, seconds: float) -> None:
        """Waits so long for what is under way."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive():
                log.warning("old checkpoints are still being deleted; the next start will continue")


class CheckpointWriter:
    """One checkpoint at a time; a thread assembles, writes and commits while training continues, another deletes.

    All ranks call `start` and `wait` at the same steps. The thread talks over its own process group, so its
    collectives never mix with those of the training loop. Rank 0 calls `on_saved` there once a step is committed.
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
        """The newest step that is committed."""
        self.seconds = 0.0
        """How long the last one took in the background."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written right now."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        """Begins to write; `wait` must have been called since the last `start` (a snapshot uses the same memory
        again)."""
        assert self._thread is None, "wait() for the previous checkpoint first"
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, meta), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.config.background:
            self._thread.join()

    def _write(self, step: int, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        began = time.monotonic()
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
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
        """Until the checkpoint under way is committed. A failure to write is returned (training can go on), all else
        is raised."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, error = None, self._error
        self._error = None
        if error is None or isinstance(error, CheckpointError):
            return error
        raise error

    def close(self, hurry: bool = False) -> None:
        """The run ends: waits a while for deletions under way (`hurry`: a short one)."""
        self._pruner.close(STOPPED_S if hurry else END_S)
