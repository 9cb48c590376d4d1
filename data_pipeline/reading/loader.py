"""The micro-batches of this rank: decoded ahead, delivered in order, counted, and resumable from a position alone."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.common.team import ALONE, Team
from data_pipeline.config import DataConfig
from data_pipeline.order.order import check_world_size
from data_pipeline.reading.micro_batches import Decoded, Decoding, MicroBatch, Work, caption_files_of, embeddings_of
from data_pipeline.reading.process import DecodingProcess
from data_pipeline.reading.rows import Sample
from data_pipeline.reading.state import check_state, state_of
from data_pipeline.shards.mixture import open_dataset

logger = logging.getLogger(__name__)

GRACE = 1000
"""Consumed samples after which `data.max_bad_share` applies as is; before, there is an allowance for chance."""


@dataclass
class Batch:
    """One micro-batch of B samples."""

    positions: torch.Tensor
    """int64 (B,): samples consumed before each one, over all ranks."""
    keys: list[str]
    images: torch.Tensor
    """uint8 (B, 3, H, W)."""
    low_res: torch.Tensor | None
    """uint8 (B, 3, h, w), aligned with `images`; None for a base stage."""
    captions: list[str]
    embeddings: list[np.ndarray] | None = None
    """fp32 (T, D) per caption, T varies; None unless `data.embeddings` is set."""
    datasets: list[str] = field(default_factory=list)
    """The name of each sample's data set in a mixture; otherwise empty strings."""
    frames: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 6))
    """fp32 (B, 6), pixels: height and width of the original; top and left of the crop in the whole picture as resized;
    height and width of the crop. See `images.View.frame`."""

    def to(self, device: str) -> Batch:
        """Return the batch with its tensors on `device`. Copies to a GPU are asynchronous, from pinned memory."""
        if device == "cpu":
            return self
        low_res = None if self.low_res is None else _sent(self.low_res, device)
        positions, images, frames = (_sent(tensor, device) for tensor in (self.positions, self.images, self.frames))
        return replace(self, positions=positions, images=images, low_res=low_res, frames=frames)


def _sent(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)


class Loader:
    """An endless iterator over the batches of one rank: `next(loader)` returns the micro-batches of an optimizer step.

    Args:
        config: the `data` section.
        image_size, low_res_size, crop_size: sizes of the stage, pixels (0: none); see `images.training_view`.
        seed: seed of the run; together with the data it determines order, crops and captions.
        rank, world_size: this process; `world_size` must divide the number of lanes.
        position: samples consumed so far over all ranks.
        quarantine: file that gets a line of JSON for every bad sample; None: no file.
        own_process: read and decode in a separate process, started immediately; otherwise in threads of this process,
            started with the first batch.
        multiple: the sides of pictures in `data.buckets` are multiples of this.
        decode: (raw sample, position) -> `Decoded`, called in threads; not with `own_process`. By default pictures
            are decoded and captions chosen.
        team: the processes that open the data together; one of them lists the shards and reads their indexes.

    Raises:
        ValueError: `decode` together with `own_process`.
        ConfigError: the batch cannot be divided this way.
        DataError: shards are missing, access is denied, or they are not tar archives.
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
        own_process: bool = False,
        multiple: int = 1,
        decode: Callable[[Sample, int], Decoded] | None = None,
        team: Team = ALONE,
    ) -> None:
        if own_process and decode is not None:
            raise ValueError("decode: it cannot be handed to another process; leave out own_process")
        self.config, self.seed, self.position = config, seed, position
        micro_batch = check_world_size(world_size, config.global_batch, config.lane_count, config.micro_batch)
        self.dataset = open_dataset(config, team)
        self.embeddings = team.once(lambda: embeddings_of(self.dataset, config))
        """Precomputed text embeddings, if any; call their `check` before training with them."""
        self._work = Work(
            self.dataset,
            config,
            image_size,
            low_res_size,
            crop_size,
            seed,
            rank,
            world_size,
            position,
            micro_batch,
            multiple,
            self.embeddings,
            team.once(lambda: caption_files_of(self.dataset, config)),
        )
        self.counters: dict[str, int] = {"samples": 0, "bad": 0}
        """`samples` consumed by this rank, how many of them were `bad`, and bad samples by reason as `bad_REASON`; for
        a mixture also `samples_dataset/NAME` and `bad_dataset/NAME`."""
        self.bad_shards: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        """Captions by source: `txt`, `json:FIELD`, ..."""
        self._quarantine = quarantine
        self._decode = decode
        self._failure: BaseException | None = None
        self._decoding: Decoding | DecodingProcess | None = DecodingProcess(self._work) if own_process else None

    # ------------------------------------------------------------------------------------------------- delivery

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of one optimizer step, with positions in the order of `rank_positions`.

        Raises:
            DataError: a shard is gone, or (with one process) more than `data.max_bad_share` of the samples were bad.
            StoreError: the object store kept failing for longer than `data.deadline_s`.
            CascadeError: the decoding process died.

        After an error, every further call raises it again.
        """
        if self._failure is not None:  # the rest of the step that failed must not be taken for the next step
            raise self._failure
        if self._decoding is None:
            self._decoding = Decoding(self._work, self._decode)
        try:
            batches = [self._deliver(next(self._decoding)) for _ in range(self._work.share // self._work.micro_batch)]
        except BaseException as error:
            self._failure = error
            raise
        self.position += self.config.global_batch
        return batches

    def _deliver(self, decoded: MicroBatch) -> Batch:
        self.sources.update(decoded.sources)
        for failures, name in zip(decoded.failures, decoded.datasets, strict=True):
            self._count(failures, name)
        low_res = None if decoded.low_res is None else torch.from_numpy(decoded.low_res)
        return Batch(
            torch.from_numpy(decoded.positions),
            decoded.keys,
            torch.from_numpy(decoded.images),
            low_res,
            decoded.captions,
            decoded.embeddings,
            decoded.datasets,
            torch.from_numpy(decoded.frames),
        )

    def _count(self, failures: list[dict[str, Any]], dataset: str) -> None:
        """Count one consumed sample and the bad ones it replaces."""
        self.counters["samples"] += 1
        for name in (f"samples_dataset/{dataset}", f"bad_dataset/{dataset}")[: 1 + bool(failures)] if dataset else ():
            self.counters[name] = self.counters.get(name, 0) + 1
        if not failures:
            return
        for failure in failures:
            reason = f"bad_{failure['reason']}"
            self.counters[reason] = self.counters.get(reason, 0) + 1
            self.bad_shards[failure["shard"]] += 1
        self.counters["bad"] += 1
        if self._quarantine:
            with suppress(OSError):  # a full disk must not stop the run
                os.makedirs(os.path.dirname(self._quarantine) or ".", exist_ok=True)
                with open(self._quarantine, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(failure) + "\n" for failure in failures)
        logger.warning("%s: %s replaced: %s", *(failures[0][name] for name in ("shard", "key", "reason")))
        if self._work.world_size == 1 and self.too_many(self.counters["samples"], self.counters["bad"]):
            raise self.too_many_error(self.counters["samples"], self.counters["bad"], [self.bad_shards])

    def too_many(self, seen: int, bad: int) -> bool:
        """Return whether `bad` of `seen` samples are too many for the run to go on.

        With several processes, call it with the sums over all: the part that one process sees may be dominated by a
        single damaged shard.
        """
        return bad > _allowed(seen, self.config.max_bad_share)

    def too_many_error(self, seen: int, bad: int, shards: Iterable[Counter[str]]) -> DataError:
        """Return the error for `too_many`; `shards` are the `bad_shards` of each process."""
        worst = ", ".join(f"{shard} ({count})" for shard, count in sum(shards, Counter()).most_common(3))
        return DataError(
            f"{bad} of {seen} samples were bad, more than data.max_bad_share={self.config.max_bad_share}; the "
            f"worst shards are {worst}; look at them with `cascade verify`"
        )

    def close(self) -> None:
        """Stop decoding and discard samples decoded ahead."""
        if self._decoding is not None:
            self._decoding.close()
        others = {source: count for source, count in self.sources.items() if source != "txt"}
        if others and not self.config.captions.sources:
            said = ", ".join(f"{count} of {self.sources.total()} from {source}" for source, count in others.items())
            logger.warning("samples without a .txt: %s; set data.captions.sources to choose their captions", said)

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the position, and all that determines which sample it refers to."""
        return state_of(self.dataset, self.config, self.seed, self.position)

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that the run can continue from `state`: neither its data nor its batch layout has changed.

        Raises:
            ConfigError: the message names what changed, with old and new values.
        """
        check_state(self.state(), state)


def _allowed(seen: int, share: float) -> float:
    """Return the largest number of bad samples among the first `seen` that does not stop a run.

    Below `GRACE` samples it is the expected number plus three standard deviations and two, because a small number of
    samples says little about the share.
    """
    expected = share * seen
    return expected if seen >= GRACE or not share else expected + 3 * math.sqrt(expected) + 2
