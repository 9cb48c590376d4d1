"""What the order costs at 200,000 shards and 10^9 samples, and how well it shuffles.

    python benchmarks/data_order.py

Prints JSON lines: the time and memory of finding a position; the time per batch with 1,000 and with 100,000 shards;
and, for several lanes and windows, how mixed the batches are beside a perfect shuffle and beside webdataset's (shard
order shuffled once, a buffer of 5,000 samples, eight workers):

    distinct_shards   different shards in a global batch
    together          samples next to each other on disk that land in the same batch, as a multiple of chance
    nearby            the same within 10 batches
"""

from __future__ import annotations

import json
import random
import statistics
import time
import tracemalloc

import numpy as np

from data_pipeline.order import Order

BATCH = 2048


def main() -> None:
    find()
    flat()
    shuffle()


def find() -> None:
    """Time and memory of the first position after a start, with the synthetic index of 10^9 samples."""
    counts = np.random.default_rng(0).integers(1000, 9000, 200_000)
    seconds = []
    for position in (0, 433_668_235, 5_000_000_007):
        began = time.perf_counter()
        Order(counts, 0, 256, 1024).locate(position)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    Order(counts, 0, 256, 1024).locate_many(np.arange(BATCH) + 433_668_235)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    show("find a position", shards=200_000, samples=int(counts.sum()), seconds=max(seconds), peak_MB=peak / 1e6)


def flat() -> None:
    """Time per located batch does not grow with the number of shards."""
    micro = {}
    for shards in (1_000, 10_000, 100_000):
        order = Order(np.full(shards, 5000), 0, 256, 1024)
        order.locate_many(np.arange(BATCH))
        times = []
        for batch in range(1, 41):
            began = time.process_time()
            order.locate_many(np.arange(BATCH) + batch * BATCH)
            times.append(time.process_time() - began)
        micro[shards] = statistics.median(times) / BATCH * 1e6
    show("microseconds per sample", **{f"shards_{shards}": value for shards, value in micro.items()})


def shuffle() -> None:
    """Mixing in an epoch of 1,000 shards of 1,000 samples (img2dataset's sizes vary; even ones are the harder case)."""
    shards, each = 1_000, 1_000
    counts = np.full(shards, each)
    for lanes, window in ((256, 1), (256, 64), (256, 256), (256, 1024), (64, 256), (2048, 256)):
        order = Order(counts, 0, lanes, window)
        _, shard, row = order.locate_many(np.arange(shards * each // BATCH * BATCH))
        report(f"{lanes} lanes, window {window}", shard * each + row, shards, each)
    report("perfect shuffle", np.random.default_rng(0).permutation(shards * each), shards, each)
    report("webdataset, buffer 5000, 8 workers", buffered(shards, each), shards, each)


def buffered(shards: int, each: int, workers: int = 8, size: int = 5000) -> np.ndarray:
    """Sample numbers in the order that webdataset's usual pipeline gives them: shards dealt to workers, a buffer in
    each,
    batches of the workers in turn."""
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
    near = np.mean(apart < 10 * BATCH) / (2 * 10 * BATCH / (shards * each))
    show(f"shuffle: {name}", distinct_shards=distinct, together=same / chance, nearby=near)


def show(name: str, **values: float) -> None:
    print(json.dumps({"name": name, **{key: round(value, 4) for key, value in values.items()}}), flush=True)


if __name__ == "__main__":
    main()
