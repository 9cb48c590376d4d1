"""Writes checkpoints in the background: the loop waits for the copy to host memory only."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from data_pipeline.common.errors import CascadeError
from training.checkpoint.store import CheckpointError, CheckpointStore
from training.config.experiment import CheckpointConfig
from training.engine.plain import Snapshot
from training.processes.distributed import Ranks

log = logging.getLogger(__name__)

NICE = 10
"""Priority of the writing thread: where cores are scarce, training goes first."""


class CheckpointWriter:
    """One checkpoint at a time; a thread assembles, writes, commits and prunes while training goes on.

    All ranks call `start` and `wait` at the same steps. The thread talks over its own process group, so its
    collectives never mix with those of the training loop.
    """

    def __init__(self, store: CheckpointStore, config: CheckpointConfig, ranks: Ranks) -> None:
        self.store, self.config, self.ranks = store, config, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
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
                self._prune()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began

    def _prune(self) -> None:
        """What cannot be deleted costs room, not the run; whether another attempt has taken over is found out by the
        next save, on all ranks together."""
        try:
            self.store.prune(self.config.keep_last, self.config.keep_every, self.config.keep_best)
        except (OSError, CascadeError) as error:
            log.warning("old checkpoints were not deleted: %s", error)

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
