"""Images per CPU-second, ours against plain webdataset + Pillow, measured alternately in the same process.

    python -m benchmarks.data_decode [--pictures SHARDS] [--count 160] [--rounds 5]

Prints one JSON line per comparison: the median ratio over the rounds with the smallest and largest one, the images per
CPU-second of both, and the quality of ours against a full decode (dB). Without --pictures, the twelve photographs of
the tests are enlarged to 512..1024 pixels, with sensor noise, and re-encoded (about 0.28 bytes per pixel, as is usual
for photographs on the web). Only CPU time counts (all threads), so a busy machine has little influence.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.content.images import training_pair
from data_pipeline.reading.loader import Loader
from data_pipeline.shards.writer import ShardWriter

PHOTOS = Path(__file__).parents[1] / "tests" / "fixtures" / "photos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", help="shards to read instead, in the form of data.shards")
    parser.add_argument("--count", type=int, default=160, help="number of pictures to make")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = arguments.pictures or make_shard(Path(folder) / "00000.tar", arguments.count)
        data = list(pictures(shards))
        pixels = sum(Image.open(io.BytesIO(one)).size[0] * Image.open(io.BytesIO(one)).size[1] for one in data)
        size = sum(map(len, data))
        print(json.dumps({"pictures": len(data), "mean_kB": size / len(data) / 1e3, "bytes_per_pixel": size / pixels}))
        for name, ours, plain, quality in comparisons(shards, data):
            report(name, ours, plain, quality, len(data), arguments.rounds)


def report(
    name: str, ours: Callable[[], int], plain: Callable[[], int], quality: float | None, count: int, rounds: int
) -> None:
    """Time both alternately and print the ratio."""
    ours(), plain()  # warm up caches and lazy imports
    pairs = [(cpu_seconds(ours), cpu_seconds(plain)) for _ in range(rounds)]
    ratios = sorted(theirs / own for own, theirs in pairs)
    line = {
        "comparison": name,
        "ratio": round(statistics.median(ratios), 2),
        "min": round(ratios[0], 2),
        "max": round(ratios[-1], 2),
        "ours_per_cpu_s": round(count / statistics.median(own for own, _ in pairs)),
        "plain_per_cpu_s": round(count / statistics.median(theirs for _, theirs in pairs)),
    }
    print(json.dumps({**line, **({} if quality is None else {"quality_db": round(quality, 1)})}), flush=True)


def comparisons(
    shards: str, data: list[bytes]
) -> Iterator[tuple[str, Callable[[], int], Callable[[], int], float | None]]:
    """Yield (name, ours, plain, median quality in dB)."""
    count = len(data)
    for name, sizes, decibels in (
        ("64 px", (64,), quality(data, 64)),
        ("256 px", (256,), quality(data, 256)),
        ("256 px and its 64 px", (256, 64), quality(data, 256)),
        ("128 px crops of 256 px and their 32 of 64 px", (256, 64, 128), None),
    ):
        ours = loading(shards, count, *sizes)
        yield f"shard to tensors, {name}", ours, partial(plain_pipeline, shards, *sizes), decibels
    yield "decoding alone, 64 px", lambda: decode_all(data, 64), lambda: plain_decode_all(data, 64), None
    yield "decoding alone, 64 px, as a share of the limit", lambda: decode_all(data, 64), lambda: limit(data), None


# ---------------------------------------------------------------------------------------------------------- ours


def loading(shards: str, count: int, size: int, low: int = 0, crop: int = 0) -> Callable[[], int]:
    """Take `count` samples from the trainer's loader, as uint8 tensors (the GPU converts them to floats).

    One loader serves all rounds, and a round ends when the loader has decoded ahead as far as at the start of the
    round, so that each round pays for as many samples as it takes.
    """
    batch = next(n for n in (32, 16, 10, 8, 5, 4, 2, 1) if count % n == 0)
    config = DataConfig(shards=shards, global_batch=batch, lanes=1, threads=1)
    loader = Loader(config, image_size=size, low_res_size=low, crop_size=crop)

    def work() -> int:
        taken = sum(len(part.keys) for _ in range(count // batch) for part in next(loader))
        before = -1.0
        while time.process_time() - before > 0.002:
            before = time.process_time()
            time.sleep(0.1)
        return taken

    return work


def decode_all(data: list[bytes], size: int) -> int:
    pairs = (training_pair(one, size=size, crop="random", position=i)[0] for i, one in enumerate(data))
    return sum(picture.shape[0] == size for picture in pairs)


def limit(data: list[bytes]) -> int:
    """Do hardly more than entropy decoding (1/8 scale), which no JPEG reader can avoid."""
    return sum(simplejpeg.decode_jpeg(one, min_height=1, min_width=1).shape[2] == 3 for one in data)


def quality(data: list[bytes], size: int) -> float:
    """Return the median PSNR in dB against a full decode and one antialiased resize."""
    values = []
    for one in data[:60]:
        error = training_pair(one, size=size)[0].astype(float) - np.asarray(plain_resize(open_rgb(one), size))
        values.append(10 * np.log10(255**2 / max(np.mean(error**2), 1e-9)))
    return float(np.median(values))


# --------------------------------------------------------------------------------------------------------- plain


def plain_pipeline(shards: str, size: int, low: int = 0, crop: int = 0) -> int:
    """Do what a user of webdataset writes: decode("pil"), then Resize, CenterCrop and ToTensor for each size."""

    def pair(sample: dict[str, Any]) -> tuple[Any, Any, str]:
        high = plain_resize(sample["jpg"], size)
        small = plain_resize(sample["jpg"], low) if low else None
        if crop and small is not None:
            high, small = high.crop((0, 0, crop, crop)), small.crop((0, 0, crop * low // size, crop * low // size))
        return to_tensor(high), None if small is None else to_tensor(small), sample["txt"]

    dataset = wds.WebDataset(shards, shardshuffle=False).decode("pil").map(pair)
    return sum(1 for _ in wds.DataPipeline(dataset, wds.batched(32, collation_fn=stack)))


def stack(samples: list[tuple[Any, Any, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([image for image, _, _ in samples]), [text for _, _, text in samples]


def plain_decode_all(data: list[bytes], size: int) -> int:
    return sum(plain_resize(open_rgb(one), size).width == size for one in data)


def open_rgb(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def plain_resize(image: Image.Image, size: int) -> Image.Image:
    """Do torchvision's Resize (bicubic, antialiased) and CenterCrop in one step."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Do torchvision's ToTensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


# ------------------------------------------------------------------------------------------------------- material


def make_shard(path: Path, count: int) -> str:
    """Write a shard of photographs of common sizes, made from the tests' twelve; return its path."""
    sources = [open_rgb(one) for shard in sorted(PHOTOS.glob("*.tar")) for one in pictures(str(shard))]
    random = np.random.default_rng(0)
    with ShardWriter(str(path)) as shard:
        for number in range(count):
            source = sources[number % len(sources)]
            longest = int(random.integers(512, 1025))
            scale = longest / max(source.size)
            image = source.resize((round(source.width * scale), round(source.height * scale)), Image.Resampling.LANCZOS)
            noise = random.normal(0, 4, (image.height, image.width, 1))
            noisy = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(noisy).save(encoded, "JPEG", quality=90)
            shard.write(f"{number:09d}", {"jpg": encoded.getvalue(), "txt": b"a photograph", "json": b"{}"})
    return str(path)


def pictures(shards: str) -> Iterator[bytes]:
    from data_pipeline.storage import store

    for path in store.expand(shards):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield tar.extractfile(member).read()  # type: ignore[union-attr]


def cpu_seconds(work: Callable[[], int]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
