"""Every rank reads the whole newest checkpoint in `checkpoint.dir`."""

from __future__ import annotations

from typing import Any

from training.checkpoint.downloads import shared_downloads
from training.checkpoint.store import CheckpointStore
from training.config.experiment import Experiment
from training.engine.start import init_distributed, shut_down
from training.processes.collectives import gather_objects
from training.processes.ranks import read_ranks


def main(config: Experiment) -> dict[str, Any]:
    ranks = read_ranks()
    assert ranks is not None
    ranks = init_distributed(ranks, config)
    with shared_downloads(ranks) as share:
        checkpoint = CheckpointStore(str(config.checkpoint.dir)).newest(ranks, share=share)
        assert checkpoint is not None
        total = sum(float(checkpoint.read(name).sum()) for name in checkpoint.names())
        assert set(gather_objects(total, ranks)) == {total}
    shut_down()
    return {"step": checkpoint.step, "sum": total}
