"""Times, rates and losses between two records of the log."""

from __future__ import annotations

import json
import os
import resource
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from training.processes.collectives import all_sum
from training.processes.ranks import Ranks
from training.run.directory import read_json, replace_file

BANDS = 5
"""Loss by noise level: number of equal bands of the time t, from clean (0) to noise (1)."""
SLOW = 1.5
"""Factor over the median from which a rank's own work is slow."""
WORTH_SAYING = 0.1
"""Minimum fraction of an interval that a slow rank must cost the others to be reported."""
ASIDE = ("samples", "validation", "evaluation", "checkpoint")
"""Phases that do not count in the rate."""


class TimeLeft:
    """Estimates the remaining time from the wall time of recent records, which includes the validations, sample grids
    and checkpoints between them."""

    WINDOW = 50
    """Number of records; the time before a start's first record (compilation, warm-up) does not count."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._records: deque[tuple[int, float]] = deque(maxlen=self.WINDOW)

    def seconds(self, step: int, rate: float, now: float) -> float:
        """Return the seconds left after `step`.

        Args:
            rate: steps per second without pauses, used as long as there are too few records.
            now: seconds of any monotonic clock.
        """
        self._records.append((step, now))
        return self.estimate(step, rate, now)

    def estimate(self, step: int, rate: float, now: float) -> float:
        """Return what `seconds` does, between two records."""
        first, began = self._records[0] if self._records else (step, now)
        whole = (step - first) / (now - began) if step > first and now > began else rate
        return (self.steps - step) / whole if whole > 0 else 0.0


class Meter:
    """Measures where the time goes. A rank's `own` work is what it does before waiting for others: data and the forward
    pass (with ZeRO 3 the forward pass gathers weights, so a slow rank shows less clearly)."""

    def __init__(
        self,
        ranks: Ranks,
        global_batch: int,
        flops_per_image: float = 0.0,
        peak_flops: float = 0.0,
        datasets: Sequence[str] = (),
    ) -> None:
        self.ranks, self.global_batch = ranks, global_batch
        self.flops, self.peak = flops_per_image, peak_flops
        self._seconds: dict[str, float] = defaultdict(float)
        self.datasets = list(datasets)
        """Names of the data sets of a mixture, whose losses are reported separately; the same on all ranks."""
        self._by_dataset: torch.Tensor | None = None
        """(2, data sets): sums and counts of the finite losses, on their device."""
        self._bands: torch.Tensor | None = None
        """(2, BANDS): sums and counts of the finite losses, on their device."""
        self._began = time.monotonic()
        self._step: int | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to phase `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began

    def losses(self, t: torch.Tensor, loss: torch.Tensor, datasets: Sequence[str] = ()) -> None:
        """Add per-sample times (B,) in [0, 1] and losses (B,) to their bands and, for a mixture, to their data sets."""
        band = (t.detach().double() * BANDS).long().clamp(0, BANDS - 1).to(loss.device)
        self._bands = _added(self._bands, loss, band, BANDS)
        if self.datasets:
            number = torch.tensor([self.datasets.index(name) for name in datasets])
            self._by_dataset = _added(self._by_dataset, loss, number.to(loss.device), len(self.datasets))

    def start(self, step: int) -> None:
        """Start a new interval at `step`."""
        self._step, self._began = step, time.monotonic()
        self._seconds.clear()

    def _training_seconds(self) -> float:
        """Return the seconds since the last record, without those ASIDE."""
        return time.monotonic() - self._began - sum(self._seconds[name] for name in ASIDE)

    def pace(self, step: int) -> float:
        """Return this rank's steps per second since the last record, without pauses; 0: unknown."""
        seconds = self._training_seconds()
        return (step - self._step) / seconds if self._step is not None and seconds > 0 else 0.0

    def record(self, step: int, more: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Return the measurements since the last record, and the numbers in `more` summed over the ranks, by name. One
        collective."""
        assert self._step is not None, "start() first"
        seconds, steps = max(self._training_seconds(), 1e-9), step - self._step
        own = [self._seconds["data"], self._seconds["forward"], memory_gb(self.ranks.device), seconds]
        bands = [0.0] * 2 * BANDS if self._bands is None else self._bands.flatten().tolist()
        by_dataset = [0.0] * 2 * len(self.datasets) if self._by_dataset is None else self._by_dataset.flatten().tolist()
        places = [0.0] * len(own) * self.ranks.world_size  # each rank fills its own
        places[len(own) * self.ranks.rank : len(own) * (self.ranks.rank + 1)] = own
        more = more or {}
        summed = iter(all_sum([*more.values(), *bands, *by_dataset, *places], self.ranks))
        record: dict[str, Any] = {name: next(summed) for name in more}
        sums, set_sums = [next(summed) for _ in bands], [next(summed) for _ in by_dataset]
        everyone = list(zip(*[summed] * len(own), strict=True))
        rate = steps * self.global_batch / seconds
        record |= {
            "images_per_second": rate,
            "step_seconds": seconds / steps,
            "data_wait": min(1.0, max(data / spent for data, _, _, spent in everyone)),
            "memory_gb": max(memory for _, _, memory, _ in everyone),
        }
        if self.flops and self.peak:
            record["mfu"] = rate * self.flops / (self.peak * self.ranks.world_size)
        slow = slowest([data + forward for data, forward, _, _ in everyone], seconds)
        if slow is not None:
            rank, factor = slow
            record.update(slow_rank=rank, slow_factor=factor)
        for band in range(BANDS):
            if sums[BANDS + band]:
                low, high = band / BANDS, (band + 1) / BANDS
                record[f"loss_t/{low:.1f}-{high:.1f}"] = sums[band] / sums[BANDS + band]
        for number, name in enumerate(self.datasets):
            if set_sums[len(self.datasets) + number]:
                record[f"loss_dataset/{name}"] = set_sums[number] / set_sums[len(self.datasets) + number]
        self._bands = self._by_dataset = None
        self.start(step)
        return record


def _added(sums: torch.Tensor | None, loss: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Add the sums and counts of the finite losses (B,), by group (B,), to `sums` (2, groups)."""
    values = loss.detach().double()
    inside = (group[:, None] == torch.arange(groups, device=loss.device)).double()
    finite = values.isfinite()
    more = torch.stack([torch.where(finite, values, 0.0), finite.double()]) @ inside
    return more if sums is None else sums + more  # no synchronisation with a GPU


def slowest(own: list[float], seconds: float) -> tuple[int, float] | None:
    """Return the rank whose own work takes more than SLOW times the median, and that factor; None if there is none, or
    if it costs the others only a small fraction of the interval of `seconds`."""
    median = sorted(own)[(len(own) - 1) // 2]
    rank = max(range(len(own)), key=own.__getitem__)
    slow = own[rank] > SLOW * median and own[rank] - median > WORTH_SAYING * seconds
    return (rank, own[rank] / median) if median > 0 and slow else None


def memory_gb(device: str) -> float:
    """Return the peak memory so far in GB: of the GPU, or this process's resident memory on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Hours:
    """Device-hours over all starts of a run, stored in a small file, so that crashed starts count as well."""

    def __init__(self, path: Path, attempt: int, world_size: int) -> None:
        self._path, self._attempt, self._world_size = path, str(attempt), world_size
        self._began = time.monotonic() - process_age()
        self._starts: dict[str, float] = read_json(path)

    def total(self) -> float:
        """Return the device-hours up to now, and store them."""
        self._starts[self._attempt] = (time.monotonic() - self._began) * self._world_size / 3600
        with suppress(OSError):  # disk full; the next record updates the file
            replace_file(self._path, json.dumps(self._starts))
        return sum(self._starts.values())


def process_age() -> float:
    """Return the seconds since this process started, including imports."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
