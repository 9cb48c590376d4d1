"""Reading raw samples, ours against plain webdataset, measured alternately in the same process.

    python -m benchmarks.data_read [--rounds 5] [--only local,s3,shards,start,memory]

Prints one JSON line per comparison. `local`: samples per CPU-second from a local tar in the page cache, with our
checksums verified; `bare` is the same for the system calls and checksums alone, which no verifying reader can beat.
`s3`: MB/s from a server with 30 ms latency and 80 MB/s per connection. `shards`: samples per CPU-second with 1,000 and
with 100,000 shards. `start`: seconds to the first batch at position 0 and at position 10^9. `memory`: growth of a
worker process while it reads 100,000 samples. Pictures are the tests' photographs, enlarged, with sensor noise,
re-encoded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
import xxhash

from benchmarks.photographs import encoded_photographs
from benchmarks.s3_like import running
from data_pipeline import ShardStream
from data_pipeline.shards.mixture import order_of
from data_pipeline.shards.writer import ShardWriter

PARTS = ("local", "s3", "shards", "start", "memory")
OPTIONS: dict[str, Any] = {"seed": 0, "global_batch": 64, "lanes": 8, "window": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name + "/cache"
        for part in arguments.only.split(","):
            globals()[f"measure_{part}"](Path(name) / part, arguments.rounds)


def write(folder: Path, shards: int, each: int, longest: tuple[int, int]) -> float:
    """Write shards of photographs with a longer side in this range, pixels; return a picture's mean size, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = list(encoded_photographs(min(shards * each, 200), longest))
    caption = b"a photograph of something or other on a fine day"
    facts = json.dumps(
        {"caption": caption.decode(), "url": "https://example.org/" + "x" * 60, "sha256": "0" * 64}
    ).encode()
    for shard in range(shards):
        with ShardWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(each):
                picture = photographs[(shard * each + i) % len(photographs)]
                writer.write(f"{shard:05d}{i:04d}", {"jpg": picture, "json": facts, "txt": caption})
    return statistics.mean(map(len, photographs))


def measure_local(folder: Path, rounds: int) -> None:
    for longest in ((256, 256), (384, 512), (512, 1024)):
        here = folder / str(longest[1])
        size = write(here, 4, 250, longest)
        pattern = f"{here}/{{00000..00003}}.tar"
        stream = ShardStream(str(here), **OPTIONS, stop=1000)
        plain = wds.WebDataset(pattern, shardshuffle=False)
        name = f"local tar, {size / 1e3:.0f} kB pictures"
        compare(name, partial(count, stream), partial(count, plain), bare(stream), rounds)


def bare(stream: ShardStream) -> Callable[[], int]:
    """Return a function that only reads and verifies the stream's samples; everything else is precomputed."""
    dataset, files, samples = stream.dataset, [], []
    for url in dataset.urls:
        files.append(open(url, "rb"))  # noqa: SIM115 (open for as long as the samples are read)
    _, shards, rows = order_of(dataset, stream.config, stream.seed).locate_many(range(stream.stop or 0))
    for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
        picture, *others = dataset.index(shard)[0].parts(row)
        first, end = others[0].offset, others[-1].offset + others[-1].size
        cuts = [(part.offset - first, part.offset - first + part.size, part.checksum) for part in others]
        samples.append((files[shard].fileno(), picture, first, end - first, cuts))

    def read() -> int:
        for descriptor, (_, offset, size, checksum), first, length, cuts in samples:
            good = xxhash.xxh3_64_intdigest(os.pread(descriptor, size, offset)) == checksum
            data = os.pread(descriptor, length, first)
            for begin, end, known in cuts:
                good &= xxhash.xxh3_64_intdigest(data[begin:end]) == known
            assert good and files
        return len(samples)

    return read


def measure_s3(folder: Path, rounds: int) -> None:
    import s3fs

    size = write(folder / "bucket", 4, 250, (512, 1024))
    megabytes = sum(path.stat().st_size for path in (folder / "bucket").glob("*.tar")) / 1e6
    schemes = importlib.import_module("webdataset.gopen").gopen_schemes
    ours = schemes["s3"]
    with running(folder):
        url, pattern = "s3://bucket/*.tar", "s3://bucket/{00000..00003}.tar"
        plain_fs = s3fs.S3FileSystem()
        openers = {"s3fs.open()": lambda url, mode="rb", *_, **__: plain_fs.open(url, mode), "our opener": ours}

        def plain(opener: str) -> int:
            schemes["s3"] = openers[opener]
            return count(wds.WebDataset(pattern, shardshuffle=False))

        defaults = ShardStream(url, seed=0, global_batch=64, stop=1000)
        windows = ShardStream(url, **OPTIONS, stop=1000)
        single = ShardStream(url, **OPTIONS, stop=1000, prefetch_mb=16)
        cached = ShardStream(url, **OPTIONS, stop=1000, cache_dir=str(folder / "cache"))
        ways: dict[str, Callable[[], int]] = {
            "webdataset, s3fs.open()": lambda: plain("s3fs.open()"),
            "webdataset, our opener": lambda: plain("our opener"),
            "ShardStream, defaults": lambda: count(defaults),
            "ShardStream, 8 lanes of 64": lambda: count(windows),
            "ShardStream, one request per sample": lambda: count(single),
            "ShardStream, disk cache (filled in round 1)": lambda: count(cached),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                way()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        schemes["s3"] = ours
        base = [wall for wall, _ in times["webdataset, s3fs.open()"]]
        for name, values in times.items():
            walls, cpus = zip(*values, strict=True)
            ratios = [theirs / own for theirs, own in zip(base, walls, strict=True)]
            show(
                f"s3, {size / 1e3:.0f} kB: {name}",
                **spread("ratio", ratios),
                MB_per_s=megabytes / statistics.median(walls),
                cpu_s_per_GB=statistics.median(cpus) / megabytes * 1e3,
            )


def many(folder: Path, shards: int) -> str:
    """Make that many shards as hard links to the same few files (file systems allow about 65,000 links each)."""
    if not folder.exists():
        write(folder / "seed", 2, 100, (256, 256))
    here = folder / str(shards)
    here.mkdir()
    for number in range(shards):
        for suffix in (".tar", ".index.parquet"):
            os.link(folder / "seed" / f"{number // 60_000:05d}{suffix}", here / f"{number:06d}{suffix}")
    return str(here)


def measure_shards(folder: Path, rounds: int) -> None:
    options = {**OPTIONS, "global_batch": 256, "lanes": 64}
    streams = {n: ShardStream(many(folder, n), **options, stop=20_000) for n in (1_000, 100_000)}
    rates: dict[int, list[float]] = {n: [] for n in streams}
    for _ in range(rounds):
        for n, stream in streams.items():
            began = time.process_time()
            rates[n].append(count(stream) / (time.process_time() - began))
    ratios = [many / few for many, few in zip(rates[100_000], rates[1_000], strict=True)]
    show(
        "samples per CPU-second, 100,000 shards / 1,000",
        **spread("ratio", ratios),
        **{f"shards_{n}": statistics.median(values) for n, values in rates.items()},
    )


def measure_start(folder: Path, rounds: int) -> None:
    shards = many(folder, 10_000)
    ShardStream(shards, **OPTIONS)  # writes the summaries of all indexes
    times: dict[int, list[float]] = {0: [], 10**9: []}
    for _ in range(rounds):
        for position, values in times.items():
            began = time.perf_counter()
            list(islice(iter(ShardStream(shards, **OPTIONS, position=position)), 64))
            values.append(time.perf_counter() - began)
    ratios = [late / first for first, late in zip(*times.values(), strict=True)]
    first, late = (statistics.median(values) for values in times.values())
    show(
        "seconds to the first batch, 10,000 shards, position 10^9 / 0",
        **spread("ratio", ratios),
        position_0=first,
        position_1e9=late,
    )


def measure_memory(folder: Path, rounds: int) -> None:
    stream = ShardStream(many(folder, 2_000), **{**OPTIONS, "lanes": 64})
    pipeline = wds.DataPipeline(stream, wds.map(resident), wds.batched(1000, collation_fn=None))
    loader = iter(wds.WebLoader(pipeline, num_workers=1, batch_size=None))
    sizes = [max(next(loader)) / 1e6 for _ in range(105)]
    show("MB of a worker over 100,000 samples", after_5000=sizes[4], growth=sizes[-1] - sizes[4], peak=max(sizes))


def resident(_: Any = None) -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare(name: str, ours: Callable[[], int], plain: Callable[[], int], bare: Callable[[], int], rounds: int) -> None:
    """Time the three alternately and print the ratios to plain webdataset."""
    samples = ours()
    plain(), bare()
    times = [(cpu_seconds(ours), cpu_seconds(plain), cpu_seconds(bare)) for _ in range(rounds)]
    own, theirs, least = (samples / statistics.median(values) for values in zip(*times, strict=True))
    ratios, limits = [t / o for o, t, _ in times], [t / b for _, t, b in times]
    rates = {"ours": own, "webdataset": theirs, "bare": least}
    show(name, **spread("ratio", ratios), **rates, bare_ratio=statistics.median(limits))


def spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), "min": min(values), "max": max(values)}


def cpu_seconds(work: Callable[[], int]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def count(samples: Any) -> int:
    return sum(1 for _ in samples)


def show(name: str, **values: float) -> None:
    print(json.dumps({"name": name, **{key: round(value, 3) for key, value in values.items()}}), flush=True)


if __name__ == "__main__":
    main()
