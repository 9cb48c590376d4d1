"""The checkpoints of a run while it trains: begin one, finish it, go back to one. Knows nothing of what they hold."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

from training.checkpoint.downloads import Share, shared_downloads
from training.checkpoint.store import Checkpoint, CheckpointStore, step_name
from training.checkpoint.writer import CheckpointWriter
from training.config.experiment import Experiment
from training.engine.base import Snapshot
from training.processes.collectives import together
from training.processes.endings import NotFinite
from training.processes.interval import best_interval, between_failures, failures_of, ran_seconds
from training.processes.ranks import Ranks
from training.run.directory import RunDir

log = logging.getLogger("cascade")

FIRST = 20
"""checkpoint.every=auto: steps to the first checkpoint of a start, and from there to the second: the two show what one
costs, the first while it is written."""


class Pace:
    """How long steps take while a checkpoint is written in the background, and while none is."""

    CALM = 200
    """Steps without writing that are remembered."""

    def __init__(self) -> None:
        self._calm: deque[float] = deque(maxlen=self.CALM)
        self._writing: list[float] = []
        self._before: float | None = None

    def step(self, now: float, writing: bool) -> None:
        """A step ended at `now` (seconds of any steady clock)."""
        if self._before is not None:
            (self._writing if writing else self._calm).append(now - self._before)
        self._before = now

    def begin(self, now: float) -> None:
        """The next step begins at `now`: what has passed since the last one was none."""
        self._before = now

    def slowed_s(self) -> float:
        """Seconds that the steps beside the last writing took longer, all together; forgets them."""
        steps, self._writing = self._writing, []
        if not steps or not self._calm:
            return 0.0
        return max(0.0, median(steps) - median(self._calm)) * len(steps)


class Saving:
    """The checkpoints of one start of a run. All methods are collective but `downloads` and `close`.

    Args:
        announce: called on every rank, in the main thread, with step and place of each checkpoint that is committed.
    """

    def __init__(self, run: RunDir, config: Experiment, ranks: Ranks, announce: Callable[[int, str], None]) -> None:
        self.run, self.config, self.ranks, self._announce = run, config, ranks, announce
        self.store = CheckpointStore(run.checkpoints)
        self.writer = CheckpointWriter(self.store, config.checkpoint, ranks, run.record_saved)
        self._announced = -1
        self._last, self._since, self._next = 0, time.monotonic(), FIRST
        """Of checkpoint.every=auto: the step of the last one, when that was, and the step of the next."""
        self._pace = Pace()
        self.rollbacks = 0
        """All of this run."""
        self.recent_rollbacks = 0
        """Those since the last healthy checkpoint, which train.max_rollbacks limits."""

    @property
    def place(self) -> str:
        """Of the newest checkpoint that is committed."""
        return str(self.store.folder.sub(step_name(self.last_step)))

    @property
    def last_step(self) -> int:
        """The newest step that is committed, -1: none."""
        return self.writer.last_step

    def downloads(self, *also: str | None) -> AbstractContextManager[Share | None]:
        """While checkpoints (and `also`) are read: what comes from an object store is fetched once per machine."""
        remote = any("://" in (place or "") for place in (self.run.checkpoints, *also))
        return shared_downloads(self.ranks) if remote else nullcontext()

    def resume(self, check: Callable[[Checkpoint | None], None], share: Share | None) -> Checkpoint | None:
        """The checkpoint to go on from, claimed by this start; None: there is none (see CheckpointStore.resume)."""
        checkpoint = self.store.resume(self.ranks, check, share)
        if checkpoint is not None:
            self.writer.last_step = self._announced = checkpoint.step
            self._last, self._next = checkpoint.step, checkpoint.step + FIRST
            self.recent_rollbacks = checkpoint.meta.get("counters", {}).get("rollbacks", 0)
            self.rollbacks = checkpoint.meta.get("rollbacks", self.recent_rollbacks)
        return checkpoint

    def save(
        self,
        step: int,
        healthy: bool,
        snapshot: Callable[[], Snapshot],
        meta: Callable[[], dict[str, Any]],
        wait: bool = False,
    ) -> None:
        """Begins to write the checkpoint of `step` once the previous one is finished; one that is there is not written
        again.

        Args:
            healthy: its last step was applied: the run can go back to it.
            snapshot, meta: the state and what belongs to it, asked for when they are needed.
            wait: until it is finished.
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
        """Whether a checkpoint belongs after this step."""
        every = self.config.checkpoint.every
        if every != "auto":
            return bool(step % every == 0)
        self._pace.step(time.monotonic(), self.writer.busy)
        return step >= self._next

    def _best_every(self, step: int, waited_s: float) -> int:
        """Steps to the next checkpoint (checkpoint.every=auto): from what the loop has waited for this one, what the
        one before has cost the steps beside which it was written, and what the run has lived through; never so few that
        the next would wait for this one. Rank 0 decides."""

        def decide() -> int:
            written_s, slowed_s = self.writer.seconds, self._pace.slowed_s()
            if not written_s:  # this one is the first, and on its way
                return FIRST
            cost_s = waited_s + slowed_s
            step_s = max(0.0, began - self._since) / max(1, step - self._last)
            cluster, path = self.config.cluster, self.run.path
            nodes = cluster.nodes if cluster.kind != "local" else 1
            mean_s = between_failures(failures_of(path), ran_seconds(path, self.ranks.world_size), nodes)
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
        """Waits until the checkpoint under way is committed; a failure is logged, not raised."""
        error = self.writer.wait()
        if error is not None and self.ranks.is_main:
            log.warning("%s", error)
        if self.writer.last_step > self._announced:  # W&B looks at the files, so they must be there
            self._announced = self.writer.last_step
            self._announce(self._announced, self.place)

    def roll_back(self, step: int, refused: int, load: Callable[[Checkpoint], None]) -> Checkpoint:
        """Sets the state back to the last healthy checkpoint by `load`; the position in the data goes on.

        Args:
            step: steps that are behind us, of which the last `refused` could not be applied.

        Raises:
            NotFinite: that has been tried already, or there is nothing to go back to.
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
        """The run ends; `hurry`: without waiting long for deletions."""
        self.writer.close(hurry)
