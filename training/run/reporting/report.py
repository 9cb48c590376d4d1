"""One record of the log: what was measured here and on all ranks, put together and handed to the trackers."""

from __future__ import annotations

import logging
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
"""The same number of records running must name a slow rank before people hear of it."""


class Report:
    """The clocks of one start of a run, and where its figures go. Only rank 0 writes.

    Args:
        step: where this start begins; `attempt`: its number.
        flops, peak_flops: of one picture's training step, and of a device per second; 0: unknown.
        datasets: names of the data sets of a mixture, whose losses are kept apart.
        code: the version of the program, for W&B.
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

    def device_hours(self) -> float | None:
        """Of all starts up to now; None on ranks other than 0."""
        return self._hours.total() if self._hours is not None else None

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Metrics after `step` steps, with `images_per_second` among them."""
        if self._hours is not None:
            record = {**record, "device_hours": self._hours.total()}
        self._name_slow_rank(step, record)
        rate = record["images_per_second"] / self.config.data.global_batch
        self.tracker.log(step, record, self._left.seconds(step, rate, time.monotonic()))

    def _name_slow_rank(self, step: int, record: Mapping[str, Any]) -> None:
        """One line when a rank was slow in SLOW_RECORDS records running."""
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
        """Names the samples of a step that was not applied, in the log of the rank that had them."""
        if self.ranks.is_main:
            log.warning("step %d was skipped: %s (loss %.4g); weights and averages are as before", step, why, loss)
        logging.getLogger("cascade.skipped").log(SILENT, "step %d: samples of this rank: %s", step, " ".join(keys))
