"""`train.profile`: a trace of each rank's CPU and GPU activity in a few steps, for ui.perfetto.dev."""

from __future__ import annotations

import logging
from typing import Any

import torch

from training.config.experiment import ProfileConfig
from training.processes.ranks import Ranks
from training.run.directory import RunDir

log = logging.getLogger(__name__)


class Profile:
    """Records the steps of `train.profile.steps` (inclusive), in one file per rank."""

    def __init__(self, settings: ProfileConfig, run: RunDir, ranks: Ranks) -> None:
        self.first, self.last = settings.steps or (0, -1)
        self._run, self._ranks = run, ranks
        self._profiler: Any = None
        self._began = 0

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 1."""
        if self._profiler is not None or not self.first <= step <= self.last:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._ranks.device.startswith("cuda"):
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()
        self._began = step

    def after(self, step: int) -> None:
        """Call after step `step`; after the last one the trace is written. A full disk does not end the run."""
        if self._profiler is None or step < self.last:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._run.path / "profile" / f"steps-{self._began}-{step}-rank-{self._ranks.rank}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            log.warning("train.profile: %s was not written: %s", path, error)
            return
        if self._ranks.is_main:
            log.info("profile of steps %d to %d: %s, one per rank; open it in ui.perfetto.dev", self._began, step, path)

    def close(self) -> None:
        """Stop recording; an incomplete trace is discarded."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
