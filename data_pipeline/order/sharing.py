"""Which positions each worker of a rank reads, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.order.order import rank_positions


class Chunks:
    """Iterates over the positions of one worker of one rank, a chunk at a time, int64 (up to `size`,).

    Chunk c of the rank belongs to worker c mod `workers`.

    Args:
        position: the first position, a step's start.
        size: samples per chunk; it need not divide the rank's share of a step.
        stop: position at which to stop; None: never.
    """

    def __init__(
        self,
        config: DataConfig,
        rank: int,
        world_size: int,
        position: int,
        size: int,
        worker: int = 0,
        workers: int = 1,
        stop: int | None = None,
    ) -> None:
        self.batch, self.lanes = config.global_batch, config.lane_count
        self.rank, self.world_size, self.start = rank, world_size, position
        self.size, self.worker, self.workers, self.stop = size, worker, workers, stop

    def __iter__(self) -> Iterator[np.ndarray]:
        waiting, number, step = np.zeros(0, np.int64), 0, 0
        while self.stop is None or self.start + step * self.batch < self.stop:
            share = rank_positions(step, self.batch, self.lanes, self.rank, self.world_size, self.start)
            waiting = np.concatenate([waiting, share])
            while len(waiting) >= self.size:
                yield from self._own(waiting[: self.size], number)
                waiting, number = waiting[self.size :], number + 1
            step += 1
        yield from self._own(waiting, number)

    def _own(self, chunk: np.ndarray, number: int) -> Iterator[np.ndarray]:
        chunk = chunk if self.stop is None else chunk[chunk < self.stop]
        if len(chunk) and number % self.workers == self.worker:
            yield chunk

    def mine(self, positions: np.ndarray) -> np.ndarray:
        """Return which of the given positions, all in this rank's lanes, belong to this worker, bool (n,)."""
        since = positions - self.start
        rounds = self.batch // self.lanes
        lane = positions % self.lanes - self.rank * self.lanes // self.world_size
        place = since // self.batch * (self.batch // self.world_size) + lane * rounds + since % self.batch // self.lanes
        wanted = (since >= 0) & (place // self.size % self.workers == self.worker)
        return wanted if self.stop is None else wanted & (positions < self.stop)
