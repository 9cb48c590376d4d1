from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import webdataset as wds

from data_pipeline import ShardStream
from tests.data_pipeline.small_shards import write_shards

SAMPLES = 100_000


def _resident_mb(_: Any) -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_a_workers_memory_stays_flat_over_100_000_samples(tmp_path: Path) -> None:
    write_shards(tmp_path, [250] * 4)
    stream = ShardStream(str(tmp_path), global_batch=64, lanes=16, window=64)
    pipeline = wds.DataPipeline(stream, wds.map(_resident_mb), wds.batched(1000, collation_fn=None))
    loader = iter(wds.WebLoader(pipeline, num_workers=1, batch_size=None))
    sizes = [batch[-1] for batch, _ in zip(loader, range(SAMPLES // 1000), strict=False)]
    assert len(sizes) == SAMPLES // 1000
    assert sizes[-1] - sizes[9] < 10, sizes  # keeping 100 bytes of each sample would amount to this
