"""What the order costs with 200,000 shards and 10^9 samples, and how well it shuffles.

    python -m benchmarks.data_order

Prints JSON lines: the time and memory to find a position (200,000 shards, 10^9 samples); the time to locate a sample
with 1,000 to 100,000 shards; and, for several lanes and windows, how well batches are mixed compared with a perfect
shuffle and with webdataset (shard order shuffled once, a buffer of 5,000 samples, eight workers):

    distinct_shards   number of different shards in a global batch
    together          how often neighbours on disk land in the same batch, as a multiple of chance
    nearby            the same within 10 batches
"""

from __future__ import annotations

import json
import random
import statistics
import time
import tracemalloc

import numpy as np

from data_pipeline.config import FilterConfig
from data_pipeline.order.order import Order
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.summaries import Summary
from data_pipeline.storage.retry import DEFAULT
from data_pipeline.storage.store import Entry

BATCH, ROUNDS = 2048, 7


def main() -> None:
    find()
    flat()
    shuffle()


def find() -> None:
    """Measure time and memory of the first position after a start, with a synthetic index of 200,000 shards."""
    counts = np.random.default_rng(0).integers(1000, 9000, 200_000)
    for position in (0, 433_668_235, 5_000_000_007):
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            Order(counts, 0, 256, 1024).locate(position)
            seconds.append(time.perf_counter() - began)
        show(f"seconds to find position {position:,}", samples=int(counts.sum()), **spread(seconds))
    tracemalloc.start()
    dataset = Dataset(synthetic(counts.tolist()), FilterConfig(), DEFAULT)
    held = tracemalloc.get_traced_memory()[0]
    Order(dataset.counts, 0, 256, 1024).locate_many(np.arange(BATCH) + 433_668_235)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    show("memory with 200,000 shards", facts_of_all_shards_MB=held / 1e6, with_a_batch_located_MB=peak / 1e6)


def synthetic(counts: list[int]) -> list[Summary]:
    """Return the summaries that a run would have of shards with these sample counts; no shards are needed."""
    none: dict[str, int] = {}
    return [
        Summary(
            Entry(f"s3://bucket/data/{i:06d}.tar", 10**9 + i, f"{i:032x}"),
            f"s3://bucket/data/{i:06d}.index.parquet",
            f"{i:016x}",
            count,
            count,
            none,
            none,
            False,
        )
        for i, count in enumerate(counts)
    ]


def flat() -> None:
    """Measure that the time per located sample does not grow with the number of shards."""
    orders = {shards: Order(np.full(shards, 5000), 0, 256, 1024) for shards in (1_000, 10_000, 100_000)}
    times: dict[int, list[float]] = {shards: [] for shards in orders}
    for order in orders.values():
        order.locate_many(np.arange(BATCH))
    for batch in range(1, 41):
        for shards, order in orders.items():
            began = time.process_time()
            order.locate_many(np.arange(BATCH) + batch * BATCH)
            times[shards].append((time.process_time() - began) / BATCH * 1e6)
    for shards, values in times.items():
        show(f"microseconds to locate a sample, {shards:,} shards", **spread(values))
    ratios = [many / few for many, few in zip(times[100_000], times[1_000], strict=True)]
    show("100,000 shards / 1,000 shards", **spread(ratios))


def shuffle() -> None:
    """Measure mixing in an epoch of 1,000 shards of 1,000 samples (equal shards are harder than img2dataset's)."""
    shards, each = 1_000, 1_000
    counts = np.full(shards, each)
    for lanes, window in ((256, 1), (256, 64), (256, 256), (256, 1024), (64, 256), (2048, 256)):
        order = Order(counts, 0, lanes, window)
        _, shard, row = order.locate_many(np.arange(shards * each // BATCH * BATCH))
        report(f"{lanes} lanes, window {window}", shard * each + row, shards, each)
    report("perfect shuffle", np.random.default_rng(0).permutation(shards * each), shards, each)
    report("webdataset, buffer 5000, 8 workers", buffered(shards, each), shards, each)


def buffered(shards: int, each: int, workers: int = 8, size: int = 5000) -> np.ndarray:
    """Return sample numbers in the order of webdataset's usual pipeline: shards split among workers, a shuffle buffer
    in each, batches taken from the workers in turn."""
    generator = random.Random(0)
    order = list(range(shards))
    generator.shuffle(order)
    streams = []
    for worker in range(workers):
        buffer: list[int] = []
        out: list[int] = []
        for shard in order[worker::workers]:
            for sample in range(shard * each, (shard + 1) * each):
                if len(buffer) < size:
                    buffer.append(sample)
                    continue
                place = generator.randrange(size)
                out.append(buffer[place])
                buffer[place] = sample
        generator.shuffle(buffer)
        streams.append(np.array(out + buffer))
    steps = min(map(len, streams)) // BATCH
    return np.concatenate([stream[step * BATCH : (step + 1) * BATCH] for step in range(steps) for stream in streams])


def report(name: str, samples: np.ndarray, shards: int, each: int) -> None:
    batches = samples[: len(samples) // BATCH * BATCH].reshape(-1, BATCH)
    distinct = np.mean([len(np.unique(batch // each)) for batch in batches])
    place = np.full(shards * each, -(10**9))
    place[samples] = np.arange(len(samples))
    apart = np.abs(place[1:] - place[:-1])
    apart = apart[(np.arange(1, shards * each) % each != 0) & (place[1:] >= 0) & (place[:-1] >= 0)]
    same = np.mean((place[1:] // BATCH == place[:-1] // BATCH) & (place[1:] >= 0))
    chance = (BATCH - 1) / (shards * each - 1)
    near = float(np.mean(apart < 10 * BATCH)) / (2 * 10 * BATCH / (shards * each))
    show(f"shuffle: {name}", distinct_shards=float(distinct), together=same / chance, nearby=near)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(name: str, **values: float) -> None:
    print(json.dumps({"name": name, **{key: round(value, 5) for key, value in values.items()}}), flush=True)


if __name__ == "__main__":
    main()
