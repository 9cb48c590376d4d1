"""This rank's micro-batches: decoded by threads, delivered in order, resumable from a position alone."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline import captions, images, store
from data_pipeline.chunks import Chunks
from data_pipeline.config import DataConfig
from data_pipeline.dataset import load_or_build, order_of
from data_pipeline.embeddings import Embeddings
from data_pipeline.errors import BadSample, DataError
from data_pipeline.fetch import RowReader, Sample, Taken, replace
from data_pipeline.order import check_world_size
from data_pipeline.pool import DaemonPool
from data_pipeline.prefetch import Prefetcher
from data_pipeline.shard_index import IMAGE_EXTENSIONS
from data_pipeline.state import check_state, state_of

logger = logging.getLogger(__name__)

GRACE = 1000
"""Consumed samples from which `data.max_bad_share` holds as it stands; before, it has the room that chance needs."""


@dataclass
class Batch:
    """One micro-batch of B samples."""

    positions: torch.Tensor
    """int64 (B,)."""
    keys: list[str]
    images: torch.Tensor
    """uint8 (B, 3, H, W)."""
    low_res: torch.Tensor | None
    """uint8 (B, 3, h, w), aligned with `images`; None for a base stage."""
    captions: list[str]
    embeddings: list[np.ndarray] | None = None
    """fp32 (T, D) of each caption, ragged; None unless `data.embeddings` is set."""


@dataclass
class Decoded:
    key: str
    image: np.ndarray
    low_res: np.ndarray | None
    caption: str
    embedding: np.ndarray | None = None


class Loader:
    """Batches of one rank, without end: `next(loader)` gives the micro-batches of one optimizer step.

    Args:
        config: the `data` section.
        image_size, low_res_size, crop_size: of the stage, pixels (0: none).
        seed: of the run; with the data it decides order, crops and captions.
        rank, world_size: this process; `world_size` must divide the number of lanes.
        position: samples consumed so far over all ranks.
        quarantine: file to which a line of JSON is added for every bad sample that was met; None: none is written.
        decode: (raw sample, position) -> `Decoded`; the default decodes pictures and chooses captions.

    Raises:
        ConfigError: the batch cannot be shared so.
        DataError: shards missing, denied or no tar archives.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        low_res_size: int = 0,
        crop_size: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        quarantine: str | None = None,
        decode: Callable[[Sample, int], Decoded] | None = None,
    ) -> None:
        self.config, self.seed, self.position = config, seed, position
        self.rank, self.world_size = rank, world_size
        self._sizes = {"size": image_size, "low_res_size": low_res_size, "crop_size": crop_size}
        self.micro_batch = check_world_size(world_size, config.global_batch, config.lane_count, config.micro_batch)
        self.dataset = load_or_build(store.expand(config.shards), config)
        self.embeddings: Embeddings | None = None
        """Precomputed ones; who trains with them calls their `check` first."""
        if config.embeddings:
            digests = {summary.entry.url: summary.digest for summary in self.dataset.summaries}
            self.embeddings = Embeddings(config.embeddings, digests)
        self.counters: dict[str, int] = {"samples": 0, "bad": 0}
        """`samples` consumed by this rank, `bad` ones met among them, and each reason as `bad_REASON`."""
        self._bad_shards: Counter[str] = Counter()
        self._quarantine = quarantine
        self._decode = decode or self._decode_pair
        self._reader = RowReader(self.dataset, config)
        side = crop_size or image_size
        self._ahead = self._decoded_ahead(3 * (side**2 + (low_res_size and side**2)))
        self._stop = threading.Event()
        self._queue: queue.Queue[Future[Taken]] = queue.Queue(self._ahead)
        self._pool: DaemonPool | None = None

    def _decoded_ahead(self, sample_bytes: int) -> int:
        """Samples decoded ahead: a quarter of the budget, but enough for the threads and at most four steps."""
        share = self.config.global_batch // self.world_size
        fits = self.config.prefetch_mb * 2**18 // max(sample_bytes, 1)
        return max(2 * self.config.threads, min(fits, max(4 * share, 64)))

    # ------------------------------------------------------------------------------------------------- delivery

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of one optimizer step, positions in the order of `rank_positions`.

        Raises:
            DataError: more than `data.max_bad_share` of the consumed samples were bad, or a shard is gone.
            StoreError: the object store stayed broken past `data.deadline_s`.
        """
        if self._pool is None:
            self._start()
        share = self.config.global_batch // self.world_size
        batches = [self._collect(self.micro_batch) for _ in range(share // self.micro_batch)]
        self.position += self.config.global_batch
        return batches

    def _collect(self, count: int) -> Batch:
        taken = []
        for _ in range(count):
            one = self._queue.get().result()
            self._count(one)
            taken.append(one)
        samples: list[Decoded] = [one.value for one in taken]
        return Batch(
            positions=torch.tensor([one.position for one in taken], dtype=torch.int64),
            keys=[sample.key for sample in samples],
            images=_stack([sample.image for sample in samples]),
            low_res=None
            if samples[0].low_res is None
            else _stack([s.low_res for s in samples if s.low_res is not None]),
            captions=[sample.caption for sample in samples],
            embeddings=None
            if samples[0].embedding is None
            else [s.embedding for s in samples if s.embedding is not None],
        )

    def _count(self, taken: Taken) -> None:
        """Counts one consumed sample and the bad ones it replaces; stops the run when there are too many."""
        self.counters["samples"] += 1
        if not taken.failures:
            return
        for failure in taken.failures:
            reason = f"bad_{failure['reason']}"
            self.counters[reason] = self.counters.get(reason, 0) + 1
            self._bad_shards[failure["shard"]] += 1
        self.counters["bad"] += 1
        if self._quarantine:
            with suppress(OSError):  # a full disk costs the note, not the run
                os.makedirs(os.path.dirname(self._quarantine) or ".", exist_ok=True)
                with open(self._quarantine, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(failure) + "\n" for failure in taken.failures)
        logger.warning("%s: %s replaced: %s", *(taken.failures[0][name] for name in ("shard", "key", "reason")))
        seen, bad = self.counters["samples"], self.counters["bad"]
        if bad > _allowed(seen, self.config.max_bad_share):
            worst = ", ".join(f"{shard} ({count})" for shard, count in self._bad_shards.most_common(3))
            raise DataError(
                f"{bad} of {seen} samples were bad, more than data.max_bad_share={self.config.max_bad_share}; the "
                f"worst shards are {worst}; look at them with `cascade verify`"
            )

    # ------------------------------------------------------------------------------------------------ background

    def _start(self) -> None:
        self._pool = DaemonPool(self.config.threads, "decode")
        threading.Thread(target=self._feed, args=(self._pool,), name="loader", daemon=True).start()

    def _feed(self, pool: DaemonPool) -> None:
        """Hands every position to the decoding threads, in order, no further ahead than the queue holds."""
        ahead: Prefetcher | None = None
        try:
            order = order_of(self.dataset, self.config, self.seed, self.world_size)
            chunks = Chunks(self.config, self.rank, self.world_size, self.position, self.micro_batch)
            budget = self.config.prefetch_mb * 2**18 * 3
            ahead = Prefetcher(self._reader, order, chunks, self.config.lane_count // self.world_size, budget)
            for position, shard, row, get in ahead:
                task = pool.submit(self._take, position, shard, row, get)
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
            return replace(self._reader, self.seed, position, shard, row, bad, lambda s: self._decode(s, position))

    def _decode_pair(self, sample: Sample, position: int) -> Decoded:
        data = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
        if data is None:
            raise BadSample("missing_image", "no member is a picture")
        caption = captions.choose(sample, self.config.captions, self.seed, position)
        image, low_res = images.training_pair(
            data,
            **self._sizes,
            crop=self.config.crop,
            flip=self.config.flip,
            seed=self.seed,
            position=position,
            margin=self.config.decode_margin,
            max_pixels=self.config.max_pixels,
            background=self.config.background,
            orientation=images.orientation_from_json(sample.get("json")),
        )
        text = None
        if self.embeddings is not None:
            text = self.embeddings.lookup(sample["__url__"], sample["__key__"], caption)
        return Decoded(sample["__key__"], image, low_res, caption, text)

    def close(self) -> None:
        """Stops the threads; samples decoded ahead are dropped."""
        self._stop.set()
        if self._pool is not None:
            self._pool.close()

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what must be unchanged for it to mean the same samples."""
        return state_of(self.dataset, self.config, self.seed, self.position)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses to continue a run whose data or batch layout changed.

        Raises:
            ConfigError: it names what changed, from what to what.
        """
        check_state(self.state(), state)


def _stack(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures -> uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _allowed(seen: int, share: float) -> float:
    """Bad samples among the first `seen` that do not stop a run.

    Few samples say little about a share: up to `GRACE`, three standard deviations and two more samples are let pass.
    """
    expected = share * seen
    return expected if seen >= GRACE or not share else expected + 3 * math.sqrt(expected) + 2
