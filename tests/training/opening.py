"""Every rank opens the data of a run and takes two steps of it; requests for `mark-N` divide those to the store."""

from __future__ import annotations

from typing import Any

from data_pipeline.reading import micro_batches
from data_pipeline.reading.prefetch import Prefetcher
from data_pipeline.storage import store
from training.config.experiment import Experiment
from training.engine.start import init_distributed, shut_down
from training.processes.collectives import barrier, gather_objects
from training.processes.ranks import read_ranks
from training.run.directory import RunDir
from training.run.training_data import TrainingData

STEPS = 2
AHEAD_BYTES = 30_000
"""Raw samples that a rank holds, for a few steps: `data.prefetch_mb=1` would mean three hundred requests from each
rank."""


def near(reader: Any, order: Any, positions: Any, lanes: float, budget: int) -> Prefetcher:
    return Prefetcher(reader, order, positions, lanes, AHEAD_BYTES)


def main(config: Experiment) -> dict[str, Any]:
    ranks = read_ranks()
    assert ranks is not None
    ranks = init_distributed(ranks, config)
    micro_batches.Prefetcher = near  # type: ignore[assignment, misc]
    data = TrainingData(config, ranks, RunDir(config), {})
    data.check({})
    keys: list[str] = []
    for number in range(STEPS + 1):
        barrier(ranks)
        if ranks.is_main:
            store.exists(f"{config.checkpoint.dir}/mark-{number}")
        barrier(ranks)
        if number < STEPS:
            batches = data.next()
            assert batches is not None
            keys += [key for batch in batches for key in batch.keys]
    gathered = gather_objects(keys, ranks)
    data.loader.close()
    shut_down()
    return {"keys": sorted(key for keys in gathered for key in keys), "urls": data.loader.dataset.urls}
