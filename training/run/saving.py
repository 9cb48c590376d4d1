"""The checkpoints of a run while it trains: starting, finishing and rolling back to one, independent of their
content."""

from __future__ import annotations

import errno
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

from data_pipeline.common.errors import DataError, system_words
from training.checkpoint.attempts import record_name
from training.checkpoint.downloads import Share, shared_downloads
from training.checkpoint.store import Checkpoint, CheckpointStore, step_name
from training.checkpoint.writer import CheckpointWriter
from training.config.experiment import Experiment
from training.engine.base import Snapshot
from training.processes.collectives import each, together
from training.processes.endings import NotFinite
from training.processes.failures import node_name
from training.processes.interval import HISTORY, best_interval, between_failures, failures_of, ran_seconds
from training.processes.ranks import Ranks
from training.run.directory import RunDir, json_lines

log = logging.getLogger("cascade")

FIRST = 20
"""checkpoint.every=auto: number of steps to the first checkpoint of a start, and from there to the second. Together
they show what a checkpoint costs, including while it is written in the background."""


class Pace:
    """Measures how long steps take while a checkpoint is being written in the background, and otherwise."""

    CALM = 200
    """Number of recent steps to keep during which no checkpoint was written."""

    def __init__(self) -> None:
        self._calm: deque[float] = deque(maxlen=self.CALM)
        self._writing: list[float] = []
        self._before: float | None = None

    def step(self, now: float, writing: bool) -> None:
        """Record that a step ended at `now` (seconds of any monotonic clock)."""
        if self._before is not None:
            (self._writing if writing else self._calm).append(now - self._before)
        self._before = now

    def begin(self, now: float) -> None:
        """Let the next step start at `now`, excluding the time since the last step."""
        self._before = now

    def slowed_s(self) -> float:
        """Return the total extra seconds of the steps during the last write, and reset them."""
        steps, self._writing = self._writing, []
        if not steps or not self._calm:
            return 0.0
        return max(0.0, median(steps) - median(self._calm)) * len(steps)


class Saving:
    """The checkpoints of one start of a run. All methods except `downloads` and `close` are collective.

    Args:
        announce: called on every rank, in the main thread, with step and place of each committed checkpoint.
    """

    def __init__(self, run: RunDir, config: Experiment, ranks: Ranks, announce: Callable[[int, str], None]) -> None:
        self.run, self.config, self.ranks, self._announce = run, config, ranks, announce
        self.store = CheckpointStore(run.checkpoints)
        self.writer = CheckpointWriter(self.store, config.checkpoint, ranks, run.record_saved)
        self._announced = -1
        self._last, self._since, self._next = 0, time.monotonic(), FIRST
        """For checkpoint.every=auto: the step and the time of the last checkpoint, and the step of the next."""
        self._pace = Pace()
        self.rollbacks = 0
        """Number of rollbacks in the whole run."""
        self.recent_rollbacks = 0
        """Number of rollbacks since the last healthy checkpoint, which train.max_rollbacks limits."""

    @property
    def place(self) -> str:
        """Path or URL of the newest committed checkpoint."""
        return str(self.store.folder.sub(step_name(self.last_step)))

    @property
    def last_step(self) -> int:
        """The newest committed step; -1: none."""
        return self.writer.last_step

    def downloads(self, *also: str | None) -> AbstractContextManager[Share | None]:
        """Return a context in which checkpoints (and `also`) in an object store are downloaded once per machine."""
        remote = any("://" in (place or "") for place in (self.run.checkpoints, *also))
        return shared_downloads(self.ranks) if remote else nullcontext()

    def resume(self, check: Callable[[Checkpoint | None], None], share: Share | None) -> Checkpoint | None:
        """Claim the checkpoints for this start; return the one to resume from, or None (see CheckpointStore.resume)."""
        try:
            checkpoint = self.store.resume(self.ranks, check, share)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR):
                raise
            raise DataError(f"checkpoint.dir={self.run.checkpoints}: {system_words(error)}") from error
        each(self._check_shared, self.ranks)
        if checkpoint is not None:
            self.writer.last_step = self._announced = checkpoint.step
            self._last, self._next = checkpoint.step, checkpoint.step + FIRST
            self.recent_rollbacks = checkpoint.meta.get("counters", {}).get("rollbacks", 0)
            self.rollbacks = checkpoint.meta.get("rollbacks", self.recent_rollbacks)
        return checkpoint

    def _check_shared(self) -> None:
        """Check that this rank sees where rank 0 keeps the checkpoints: what it writes elsewhere would be missing at
        the next start.

        Raises:
            DataError: it does not.
        """
        if "://" not in self.run.checkpoints and self.store.folder.size(record_name(self.store.attempt)) is None:
            raise DataError(
                f"checkpoint.dir={self.run.checkpoints}: rank {self.ranks.rank} on {node_name()} does not see what "
                f"rank 0 has written there; choose a checkpoint.dir on a file system that all nodes share, or in an "
                f"object store"
            )

    def save(
        self,
        step: int,
        healthy: bool,
        snapshot: Callable[[], Snapshot],
        meta: Callable[[], dict[str, Any]],
        wait: bool = False,
    ) -> None:
        """Start writing the checkpoint of `step` once the previous one is finished, unless it already exists.

        Args:
            healthy: its last step was applied, so the run can roll back to it.
            snapshot, meta: return the state and its metadata; called only if needed.
            wait: wait until it is finished.
        """
        self.finish()
        began = time.monotonic()
        if step != self.writer.last_step:
            if healthy:
                self.recent_rollbacks = 0
            self.writer.start(step, snapshot(), {**meta(), "healthy": healthy})
        if wait:
            self.finish()
        if self.config.checkpoint.every == "auto":
            self._next = step + self._best_every(step, time.monotonic() - began)
            self._last, self._since = step, time.monotonic()
            self._pace.begin(self._since)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        every = self.config.checkpoint.every
        if every != "auto":
            return bool(step % every == 0)
        self._pace.step(time.monotonic(), self.writer.busy)
        return step >= self._next

    def _best_every(self, step: int, waited_s: float) -> int:
        """Return the number of steps to the next checkpoint (checkpoint.every=auto), from how long the loop has waited
        for this one, how much the previous one has slowed down steps, and the run's failures; at least so many that the
        next need not wait for this one. Rank 0 decides."""

        def decide() -> int:
            written_s, slowed_s = self.writer.seconds, self._pace.slowed_s()
            if not written_s:  # this is the first one, still being written
                return FIRST
            cost_s = waited_s + slowed_s
            step_s = max(0.0, began - self._since) / max(1, step - self._last)
            cluster, path = self.config.cluster, self.run.path
            nodes = cluster.nodes if cluster.kind != "local" else 1
            failures = failures_of(json_lines(path / HISTORY))
            mean_s = between_failures(failures, ran_seconds(path, self.ranks.world_size), nodes)
            best_s = max(best_interval(cost_s, mean_s), written_s)
            every = max(1, math.ceil(best_s / step_s)) if step_s else FIRST
            said = (
                "checkpoint.every=auto: the next in %d steps (one is written in %.2f s and costs %.2f s: waiting %.2f "
                "s, slower steps %.2f s; a failure is expected every %.1f h)"
            )
            log.info(said, every, written_s, cost_s, waited_s, slowed_s, mean_s / 3600)
            return every

        began = time.monotonic() - waited_s
        return int(together(decide, self.ranks))

    def finish(self) -> None:
        """Wait until the checkpoint in progress is committed; a failure is logged, not raised."""
        error = self.writer.wait()
        if error is not None and self.ranks.is_main:
            log.warning("%s", error)
        if self.writer.last_step > self._announced:  # W&B checks the files, so they must exist
            self._announced = self.writer.last_step
            self._announce(self._announced, self.place)

    def roll_back(self, step: int, refused: int, load: Callable[[Checkpoint], None]) -> Checkpoint:
        """Roll the state back to the last healthy checkpoint and return it; the position in the data does not change.

        Args:
            step: number of steps done, of which the last `refused` were skipped.
            load: loads a checkpoint.

        Raises:
            NotFinite: train.max_rollbacks is exceeded, or there is no healthy checkpoint.
        """
        self.finish()
        trouble = f"step {step}: the last {refused} steps were skipped (train.max_skipped)"
        advice = f"the skipped samples are listed in {self.run.path}/logs; lower optimizer.lr, or drop bad shards"
        with self.downloads() as share:
            checkpoint = self.store.newest(self.ranks, wanted=lambda meta: meta.get("healthy", True), share=share)
            if checkpoint is None:
                raise NotFinite(f"{trouble}, and there is no checkpoint to roll back to; {advice}")
            if self.recent_rollbacks >= self.config.train.max_rollbacks:
                raise NotFinite(
                    f"{trouble}, even after rolling back to the checkpoint of step {checkpoint.step} "
                    f"(train.max_rollbacks); {advice}"
                )
            self.rollbacks += 1
            self.recent_rollbacks += 1
            load(checkpoint)
        if self.ranks.is_main:
            log.warning(
                "%s: rolled back to the weights of step %d; training continues with step %d and skips the data in "
                "between",
                trouble,
                checkpoint.step,
                step + 1,
            )
        return checkpoint

    def close(self, hurry: bool) -> None:
        """Finish deletions at the end of the run; `hurry`: without waiting long."""
        self.writer.close(hurry)
