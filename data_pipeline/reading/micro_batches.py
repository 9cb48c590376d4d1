"""One rank's samples in order: read, decoded by threads, and stacked into micro-batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_pipeline.common.errors import BadSample
from data_pipeline.common.pool import DaemonPool
from data_pipeline.config import DataConfig
from data_pipeline.content import captions, images
from data_pipeline.order.sharing import Chunks
from data_pipeline.reading.prefetch import Prefetcher
from data_pipeline.reading.rows import RowReader, Sample, Taken, replace
from data_pipeline.shards.caption_files import CaptionFiles
from data_pipeline.shards.dataset import Dataset, node_cache
from data_pipeline.shards.embeddings import DatasetEmbeddings
from data_pipeline.shards.index import IMAGE_EXTENSIONS
from data_pipeline.shards.mixture import order_of
from data_pipeline.storage.retry import NAP_S, check_asked, get_unless_asked

MEMBERS = frozenset((*IMAGE_EXTENSIONS, "txt", "json"))
"""What training looks at."""


@dataclass
class Work:
    """What is to be decoded, without end. Picklable."""

    dataset: Dataset
    config: DataConfig
    image_size: int
    low_res_size: int
    crop_size: int
    """Of the stage, pixels (0: none)."""
    seed: int
    rank: int
    world_size: int
    position: int
    """Samples consumed before, over all ranks."""
    micro_batch: int
    multiple: int = 1
    """Of the sides of the pictures of `data.buckets`."""
    embeddings: DatasetEmbeddings | None = None
    """Precomputed ones of the captions; None: `data.embeddings` is not set."""
    caption_files: dict[str, CaptionFiles] = field(default_factory=dict)
    """See `caption_files_of`."""

    @property
    def share(self) -> int:
        """Samples per optimizer step and rank."""
        return self.config.share_of(self.world_size)


@dataclass
class Decoded:
    """One sample, decoded: position, key, picture uint8 (H, W, 3), low-res picture or None, caption."""

    key: str
    image: np.ndarray
    """uint8 (H, W, 3)."""
    low_res: np.ndarray | None
    caption: str
    embedding: np.ndarray | None = None
    source: str = "txt"
    """Of the caption, see `captions.Caption`."""
    dataset: str = ""
    """Its data set in a mixture."""
    frame: tuple[float, ...] = (0.0,) * 6
    """Where the picture lies in its original, see `images.View`."""


@dataclass
class MicroBatch:
    """B samples, as arrays; the fields are those of `data_pipeline.reading.loader.Batch`."""

    positions: np.ndarray
    keys: list[str]
    images: np.ndarray
    low_res: np.ndarray | None
    captions: list[str]
    embeddings: list[np.ndarray] | None
    failures: list[list[dict[str, Any]]]
    """Per sample: the bad ones that it stands in for."""
    sources: list[str]
    """Per sample: where its caption came from."""
    datasets: list[str]
    """Per sample: the name of its data set; empty texts where there is one."""
    frames: np.ndarray
    """fp32 (B, 6), see `images.View.frame`."""


def embeddings_of(dataset: Dataset, config: DataConfig) -> DatasetEmbeddings | None:
    """The precomputed text embeddings of a data set; None unless `data.embeddings` is set."""
    if not config.embeddings:
        return None
    digests = {name: {one.entry.url: one.digest for one in part.summaries} for name, part in dataset.sets().items()}
    return DatasetEmbeddings(config.embeddings, digests, node_cache(config))


def caption_files_of(dataset: Dataset, config: DataConfig) -> dict[str, CaptionFiles]:
    """The files of captions of each data set (of no mixture, under ""); empty where none has any."""
    found = {}
    for name, own in config.parts().items():
        part = dataset.sets()[name]
        found[name] = CaptionFiles(own.captions.files, {one.entry.url: one.digest for one in part.summaries})
    return found if any(own.captions.files for own in config.parts().values()) else {}


class Decoding:
    """An endless iterator of `MicroBatch`, decoded ahead by `data.threads` threads of this process.

    Args:
        decode: (raw sample, position) -> `Decoded`; the default decodes pictures and chooses captions.
    """

    def __init__(self, work: Work, decode: Callable[[Sample, int], Decoded] | None = None) -> None:
        self._work = work
        self._decode = decode or self._decode_pair
        self._embeddings = work.embeddings
        self._captions = {name: own.captions for name, own in work.config.parts().items()}
        self._shapes = {
            name: images.bucket_shape(ratio, work.image_size, work.multiple)
            for name, ratio in work.config.ratios().items()
        }
        self._caption_files = work.caption_files
        self._reader = RowReader(work.dataset, work.config, None if decode else MEMBERS)
        self._stop = threading.Event()
        self._queue: queue.Queue[Future[Taken]] = queue.Queue(_decoded_ahead(work))
        self._pool = DaemonPool(work.config.threads, "decode")
        threading.Thread(target=self._feed, name="loader", daemon=True).start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        taken = [self._next().result() for _ in range(self._work.micro_batch)]
        samples: list[Decoded] = [one.value for one in taken]
        low_res = [sample.low_res for sample in samples if sample.low_res is not None]
        embeddings = [sample.embedding for sample in samples if sample.embedding is not None]
        return MicroBatch(
            positions=np.array([one.position for one in taken], np.int64),
            keys=[sample.key for sample in samples],
            images=_stack([sample.image for sample in samples]),
            low_res=_stack(low_res) if low_res else None,
            captions=[sample.caption for sample in samples],
            embeddings=embeddings or None,
            failures=[one.failures for one in taken],
            sources=[sample.source for sample in samples],
            datasets=[sample.dataset for sample in samples],
            frames=np.array([sample.frame for sample in samples], np.float32),
        )

    def _next(self) -> Future[Taken]:
        """The next sample, decoded."""
        task = get_unless_asked(self._queue)
        while True:
            with suppress(TimeoutError):
                task.exception(timeout=NAP_S)
                return task
            check_asked()

    def _feed(self) -> None:
        """Hands every position to the decoding threads, in order, no further ahead than the queue holds."""
        work, config = self._work, self._work.config
        ahead: Prefetcher | None = None
        try:
            order = order_of(work.dataset, config, work.seed, work.world_size)
            chunks = Chunks(config, work.rank, work.world_size, work.position, work.micro_batch)
            budget = config.prefetch_mb * 2**18 * 3
            ahead = Prefetcher(self._reader, order, chunks, config.lane_count // work.world_size, budget)
            for position, shard, row, get in ahead:
                task = self._pool.submit(self._take, position, shard, row, get)
                if not self._offer(task):
                    return
        except BaseException as error:  # it belongs to the trainer, who is waiting
            failed: Future[Taken] = Future()
            failed.set_exception(error)
            self._offer(failed)
        finally:
            if ahead is not None:
                ahead.close()

    def _offer(self, task: Future[Taken]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(task, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def _take(self, position: int, shard: int, row: int, get: Callable[[], Sample]) -> Taken:
        try:
            sample = get()
            sample["__position__"] = position
            return Taken(position, self._decode(sample, position))
        except BadSample as bad:
            use = lambda other: self._decode(other, position)  # noqa: E731
            return replace(self._reader, self._work.seed, position, shard, row, bad, use)

    def _decode_pair(self, sample: Sample, position: int) -> Decoded:
        work, config = self._work, self._work.config
        data = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
        if data is None:
            raise BadSample("missing_image", "no member is a picture")
        dataset = sample.get("__dataset__", "")
        shape = None
        if config.buckets:
            dataset, _, bucket = dataset.rpartition("/")
            shape = self._shapes[bucket]
        if self._caption_files:
            files = self._caption_files[dataset]
            sample[captions.FROM_FILES] = files.of(sample["__url__"], sample["__key__"])
        caption = captions.choose_caption(sample, self._captions[dataset], work.seed, position)
        view = images.training_view(
            data,
            size=work.image_size,
            low_res_size=work.low_res_size,
            crop_size=work.crop_size,
            shape=shape,
            crop=config.crop,
            flip=config.flip,
            seed=work.seed,
            position=position,
            margin=config.decode_margin,
            max_pixels=config.max_pixels,
            background=config.background,
            srgb=config.srgb,
            orientation=images.orientation_from_json(sample.get("json")),
        )
        text = None
        if self._embeddings is not None:
            text = self._embeddings.lookup(sample["__url__"], sample["__key__"], caption.text, dataset)
        key, frame = sample["__key__"], view.frame
        return Decoded(key, view.high, view.low, caption.text, text, caption.source, dataset, frame)

    def close(self) -> None:
        """Stops the threads; samples decoded ahead are dropped."""
        self._stop.set()
        self._pool.close()


def _decoded_ahead(work: Work) -> int:
    """Samples decoded ahead: a quarter of the budget, but enough for the threads and at most four steps."""
    side = work.crop_size or work.image_size
    fits = work.config.prefetch_mb * 2**18 // max(3 * (side**2 + (work.low_res_size and side**2)), 1)
    return max(2 * work.config.threads, min(fits, max(4 * work.share, 64)))


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    """uint8 (H, W, 3) pictures -> uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().numpy()
