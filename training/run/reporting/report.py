"""Builds the records of the log from measurements on all ranks, and passes them to the trackers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from training.config.experiment import Experiment
from training.processes.ranks import Ranks
from training.run.directory import RunDir
from training.run.reporting.metering import Hours, Meter, TimeLeft
from training.run.reporting.tracking import SILENT, Tracker

log = logging.getLogger("cascade")
SLOW_RECORDS = 3
"""Number of consecutive records with a slow rank after which it is reported."""


class Report:
    """The meter and trackers of one start of a run. Only rank 0 writes.

    Args:
        step: the step from which this start continues.
        attempt: number of this start.
        flops, peak_flops: FLOPs of training on one picture, and peak FLOP/s of a device; 0: unknown.
        datasets: names of the data sets of a mixture, whose losses are reported separately.
        wandb_id: id of the W&B run.
        code: version of the code, for W&B.
    """

    def __init__(
        self,
        run: RunDir,
        config: Experiment,
        ranks: Ranks,
        *,
        step: int,
        attempt: int,
        flops: float,
        peak_flops: float,
        datasets: Sequence[str] = (),
        wandb_id: str,
        code: dict[str, Any],
    ) -> None:
        self.config, self.ranks = config, ranks
        self.tracker = Tracker(run, config, ranks, step, wandb_id, code)
        self._hours = Hours(run.path / "hours.json", attempt, ranks.world_size) if ranks.is_main else None
        self.meter = Meter(ranks, config.data.global_batch, flops, peak_flops, datasets)
        self._left = TimeLeft(config.train.steps)
        self._slow = 0
        self._shown = -math.inf

    def device_hours(self) -> float | None:
        """Return the device-hours of all starts up to now; None on ranks other than 0."""
        return self._hours.total() if self._hours is not None else None

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log metrics after `step` steps; `record` must have `images_per_second`."""
        if self._hours is not None:
            record = {**record, "device_hours": self._hours.total()}
        self._name_slow_rank(step, record)
        rate = record["images_per_second"] / self.config.data.global_batch
        self.tracker.log(step, record, self._left.seconds(step, rate, time.monotonic()))

    def tick(self, step: int, loss: float) -> None:
        """Between two records, bring the progress line of a terminal up to date, at most once per second: on a slow
        machine a record can take minutes."""
        now = time.monotonic()
        if now - self._shown < 1 or not self.tracker.on_screen or (pace := self.meter.pace(step)) <= 0:
            return
        self._shown = now
        seen = {"loss": loss if math.isfinite(loss) else None}
        seen["images_per_second"] = pace * self.config.data.global_batch
        self.tracker.show(step, seen, self._left.estimate(step, pace, now))

    def _name_slow_rank(self, step: int, record: Mapping[str, Any]) -> None:
        """Log one line when a rank was slow in SLOW_RECORDS consecutive records."""
        self._slow = self._slow + 1 if "slow_rank" in record else 0
        if self._slow == SLOW_RECORDS and self.ranks.is_main:
            log.warning(
                "step %d: rank %d is slow: its data and forward pass take %.1f times the median rank's; "
                "all others wait for it",
                step,
                record["slow_rank"],
                record["slow_factor"],
            )

    def skipped(self, step: int, loss: float, why: str, keys: list[str]) -> None:
        """Log a skipped step on rank 0, and its samples in each rank's own log."""
        if self.ranks.is_main:
            log.warning("step %d was skipped: %s (loss %.4g); weights and averages are unchanged", step, why, loss)
        logging.getLogger("cascade.skipped").log(SILENT, "step %d: samples of this rank: %s", step, " ".join(keys))
