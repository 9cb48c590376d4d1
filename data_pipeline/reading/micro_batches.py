"""Reads the samples of one rank in order, decodes them in threads and stacks them into micro-batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
"""Extensions of the members that training uses."""


@dataclass
class Work:
    """What `Decoding` has to read and decode. Picklable."""

    dataset: Dataset
    config: DataConfig
    image_size: int
    low_res_size: int
    crop_size: int
    """Sizes of the stage, pixels (0: none)."""
    seed: int
    rank: int
    world_size: int
    position: int
    """Samples consumed before, over all ranks."""
    micro_batch: int
    multiple: int = 1
    """The sides of pictures in `data.buckets` are multiples of this."""
    embeddings: DatasetEmbeddings | None = None
    """Precomputed embeddings of the captions; None: `data.embeddings` is not set."""
    caption_files: dict[str, CaptionFiles] = field(default_factory=dict)
    """See `caption_files_of`."""

    @property
    def share(self) -> int:
        """Samples per optimizer step and rank."""
        return self.config.share_of(self.world_size)


@dataclass
class Decoded:
    """One decoded sample."""

    key: str
    image: np.ndarray
    """uint8 (H, W, 3)."""
    low_res: np.ndarray | None
    """uint8 (h, w, 3); None for a base stage."""
    caption: str
    embedding: np.ndarray | None = None
    """fp32 (T, D) of the caption; None unless `data.embeddings` is set."""
    source: str = "txt"
    """Source of the caption, see `captions.Caption`."""
    dataset: str = ""
    """Name of its data set in a mixture."""
    frame: tuple[float, ...] = (0.0,) * 6
    """Where the picture lies in its original, see `images.View`."""


@dataclass
class MicroBatch:
    """B samples as arrays; fields as in `data_pipeline.reading.loader.Batch`."""

    positions: np.ndarray
    keys: list[str]
    images: np.ndarray
    low_res: np.ndarray | None
    captions: list[str]
    embeddings: list[np.ndarray] | None
    failures: list[list[dict[str, Any]]]
    """Per sample: records of the bad samples it replaces."""
    sources: list[str]
    """Per sample: the source of its caption."""
    datasets: list[str]
    """Per sample: the name of its data set in a mixture; otherwise empty strings."""
    frames: np.ndarray
    """fp32 (B, 6), see `images.View.frame`."""


def embeddings_of(dataset: Dataset, config: DataConfig) -> DatasetEmbeddings | None:
    """Open the precomputed text embeddings of a data set; None unless `data.embeddings` is set.

    Raises:
        DataError: a shard has none.
    """
    if not config.embeddings:
        return None
    digests = {name: {one.entry.url: one.digest for one in part.summaries} for name, part in dataset.sets().items()}
    return DatasetEmbeddings(config.embeddings, digests, node_cache(config))


def caption_files_of(dataset: Dataset, config: DataConfig) -> dict[str, CaptionFiles]:
    """Open the caption files of each data set, by name ("" without a mixture); empty if no data set has any.

    Raises:
        DataError: a shard has none.
    """
    found = {}
    for name, own in config.parts().items():
        part = dataset.sets()[name]
        found[name] = CaptionFiles(own.captions.files, {one.entry.url: one.digest for one in part.summaries})
    return found if any(own.captions.files for own in config.parts().values()) else {}


class Decoding:
    """An endless iterator of `MicroBatch`, decoded ahead by `data.threads` threads of this process.

    Args:
        decode: (raw sample, position) -> `Decoded`; by default pictures are decoded and captions chosen.
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
        """Return the next sample's task once it is done."""
        task = get_unless_asked(self._queue)
        while True:
            with suppress(TimeoutError):
                task.exception(timeout=NAP_S)
                return task
            check_asked()

    def _feed(self) -> None:
        """Submit every position to the decoding threads, in order, no further ahead than the queue allows."""
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
        except BaseException as error:  # raised by `__next__`, in the thread that is waiting
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
        """Stop the threads and discard samples decoded ahead."""
        self._stop.set()
        self._pool.close()


def _decoded_ahead(work: Work) -> int:
    """Return how many samples to decode ahead: a quarter of `data.prefetch_mb`, but enough to keep the threads busy and
    at most four steps (or 64 samples)."""
    side = work.crop_size or work.image_size
    fits = work.config.prefetch_mb * 2**18 // max(3 * (side**2 + (work.low_res_size and side**2)), 1)
    return max(2 * work.config.threads, min(fits, max(4 * work.share, 64)))


def _stack(pictures: list[np.ndarray]) -> np.ndarray:
    """Stack uint8 (H, W, 3) pictures into uint8 (B, 3, H, W)."""
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
