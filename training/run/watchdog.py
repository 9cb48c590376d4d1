"""A thread that notices when this rank stands still, says where, and in the end takes the process down."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.processes.distributed import Ranks
from training.processes.endings import EXIT_HUNG

log = logging.getLogger("cascade")

SILENT_S = 10.0
"""A rank whose watchdog has said nothing for so long is frozen or gone (it speaks every 2 seconds)."""
PATIENT = ("checkpoint", "samples", "validation")
"""Phases that may always take as long as the first step."""


class Watchdog:
    """The loop calls `phase` wherever it goes on to something else; silence of `warn_s` is reported once per phase,
    with the stacks of all threads in this rank's log, and silence of `limit_s` (of `patient_s` as long as `patient` is
    set: until the first step is done) ends the process (exit code EXIT_HUNG), so that a scheduler can start afresh.

    Every rank puts what it does into the process group's store, so rank 0 can say which of the others stands still.
    """

    def __init__(
        self,
        ranks: Ranks,
        log_file: Path,
        warn_s: float,
        limit_s: float,
        patient_s: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.ranks, self.warn_s, self.limit_s, self.patient_s = ranks, warn_s, limit_s, patient_s
        self._log_file, self._leave = log_file, leave
        self.patient = True
        self._now = ("start", 0, time.monotonic())
        self._store = _store()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int) -> None:
        """This rank begins to do `name` in step `step` (a plain assignment: costs nothing)."""
        self._now = (name, step, time.monotonic())

    def last_words(self, error: Exception) -> str:
        """One sentence for a collective that failed because of another rank."""
        name, step, since = self._now
        return (
            f"rank {self.ranks.rank}: another rank died or did not answer within the time-outs (step {step}, phase "
            f"{name}, after {time.monotonic() - since:.0f} s{self._others()}): {str(error).splitlines()[0][:200]}; its "
            f"own log says why, and the same command goes on from the newest checkpoint"
        )

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        warned = None
        while not self._stop.wait(min(2.0, self.warn_s / 4)):
            now = name, step, since = self._now
            silent = time.monotonic() - since
            self._beat(name, step, silent)
            if silent > self.warn_s and warned is not now:
                warned = now
                log.warning(
                    "rank %d has been in step %d, phase %s, for %.0f s%s; the stacks of its threads are in %s",
                    self.ranks.rank, step, name, silent, self._others(), self._log_file,
                )  # fmt: skip
                with suppress(OSError), open(self._log_file, "a") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            if silent > (self.patient_s if self.patient or name in PATIENT else self.limit_s):
                log.error(
                    "rank %d: no progress in step %d, phase %s, for %.0f s: it ends with code %d so that the job can "
                    "start again from the newest checkpoint", self.ranks.rank, step, name, silent, EXIT_HUNG,
                )  # fmt: skip
                self._leave(EXIT_HUNG)
                return

    def _beat(self, name: str, step: int, silent: float) -> None:
        if self._store is None:
            return
        try:
            self._store.set(f"beat/{self.ranks.rank}", json.dumps([name, step, silent, time.time()]))
        except RuntimeError:  # rank 0, which holds the store, is gone: the collective will say so
            self._store = None

    def _others(self) -> str:
        """What rank 0 knows of the ranks that are somewhere else, or say nothing any more."""
        if self._store is None or not self.ranks.is_main:
            return ""
        found = []
        for rank in range(self.ranks.world_size):
            if rank == self.ranks.rank or not self._store.check([f"beat/{rank}"]):
                continue
            name, step, silent, at = json.loads(self._store.get(f"beat/{rank}"))
            age = time.time() - at
            if age > SILENT_S:
                found.append(f"rank {rank} has not been heard of for {age:.0f} s (last in step {step}, phase {name})")
            elif (name, step) != self._now[:2]:
                found.append(f"rank {rank} is in step {step}, phase {name}, for {silent + age:.0f} s")
        return f" ({'; '.join(found[:8])})" if found else ""


def _store() -> Any:
    """The process group's key-value store, for this thread alone; None without a process group."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
