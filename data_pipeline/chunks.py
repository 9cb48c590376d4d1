"""Which positions a worker of a rank reads, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.order import rank_positions


class Chunks:
    """Positions of one worker of one rank, a chunk (micro-batch) at a time; chunk c of the rank belongs to worker c
    mod W.

    Args:
        stop: position at which to end; None: never.
    """

    def __init__(
        self,
        config: DataConfig,
        rank: int,
        world_size: int,
        position: int,
        micro_batch: int,
        worker: int = 0,
        workers: int = 1,
        stop: int | None = None,
    ) -> None:
        self.batch, self.lanes = config.global_batch, config.lane_count
        self.rank, self.world_size, self.start = rank, world_size, position
        self.micro_batch, self.worker, self.workers, self.stop = micro_batch, worker, workers, stop

    def __iter__(self) -> Iterator[np.ndarray]:
        per_step = self.batch // self.world_size // self.micro_batch
        step = 0
        while self.stop is None or self.start + step * self.batch < self.stop:
            share = rank_positions(step, self.batch, self.lanes, self.rank, self.world_size, self.start)
            for number in range(per_step):
                if (step * per_step + number) % self.workers == self.worker:
                    chunk = share[number * self.micro_batch : (number + 1) * self.micro_batch]
                    chunk = chunk if self.stop is None else chunk[chunk < self.stop]
                    if len(chunk):
                        yield chunk
            step += 1

    def mine(self, positions: np.ndarray) -> np.ndarray:
        """Which positions of this rank's lanes belong to this worker, (n,) bool."""
        since = positions - self.start
        rounds = self.batch // self.lanes
        lane = positions % self.lanes - self.rank * self.lanes // self.world_size
        place = lane * rounds + since % self.batch // self.lanes
        chunk = since // self.batch * (self.batch // self.world_size // self.micro_batch) + place // self.micro_batch
        wanted = (since >= 0) & (chunk % self.workers == self.worker)
        return wanted if self.stop is None else wanted & (positions < self.stop)
