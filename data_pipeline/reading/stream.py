"""A source stage for any webdataset pipeline: every sample once per epoch, in a reproducible order."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.common.errors import BadSample, ConfigError
from data_pipeline.common.team import Strangers
from data_pipeline.config import CaptionConfig, DataConfig, FilterConfig, MembersConfig
from data_pipeline.order.order import check_position, check_world_size
from data_pipeline.order.sharing import Chunks
from data_pipeline.reading.prefetch import Prefetcher
from data_pipeline.reading.rows import RowReader, Sample, replace
from data_pipeline.reading.state import check_state, state_of
from data_pipeline.reading.webdataset import register_s3
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.mixture import open_dataset, order_of

T = TypeVar("T")
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int, np.integer), "a whole number"),
    float: ((int, float, np.integer, np.floating), "a number"),
    bool: ((bool, np.bool_), "True or False"),
    str: ((str, os.PathLike), "text"),
    list: ((Sequence,), "a list"),
    dict: ((Mapping,), "a mapping"),
}
"""Types of settings -> what counts as one, and what it is called."""

register_s3()


class ShardStream(IterableDataset[Sample]):
    """An endless stream of this rank's raw samples, starting at `position`.

        stream = ShardStream("s3://bucket/{00000..00999}.tar", seed=0, global_batch=2048, rank=rank, world_size=8)
        pipeline = wds.DataPipeline(stream, wds.map(decode), wds.batched(64))
        loader = wds.WebLoader(pipeline, num_workers=8, batch_size=None)

    Each sample is a dict with `__key__`, `__url__`, `__position__` (samples consumed before it, over all ranks) and
    the bytes of each member by extension. Workers take turns in chunks of as many samples as their pipeline batches
    (`wds.batched(n)`; without it, single samples), so the loader's order is the same for any number of workers. If
    batches are made elsewhere, set `micro_batch=n` for `DataLoader(stream, batch_size=n)` and `micro_batch=1` for
    `batch_size=None`; otherwise several workers raise an error.

    Every iteration begins at `position` again, so that each epoch of `with_epoch(n)` would repeat the one before:
    iterate once, without end; or, without persistent workers, set `stream.position` to the one reached before each
    epoch.

    To resume, pass the position reached: the number of samples that all ranks together have consumed, after a whole
    global batch. Or save `stream.state(position)` and pass it as `state`, which also checks that data, filters and
    batches have not changed.
    A sample that does not verify is replaced by a deterministic substitute; `__failures__`, otherwise empty, then says
    why, as JSON.

    Args:
        shards: a path, glob, brace pattern, directory, s3:// pattern, or a list of these; or a mixture, a list of
            `{"name": "a", "shards": PATTERN, "weight": 0.7}`, whose samples also have `__dataset__`.
        seed: determines the order, together with the content of the shards, `filter`, `lanes` and `window`.
        global_batch: samples per step over all ranks.
        rank, world_size: this process; by default from `torch.distributed`, if it is initialized, or the environment
            (RANK, WORLD_SIZE), else 0 of 1.
        position: where to start.
        lanes: number of interleaved substreams; 0: chosen from `global_batch`. `world_size` must divide it.
        window: samples shuffled together within a lane; None: as many as fit into memory, see `DataConfig`.
        micro_batch: samples per chunk given to a worker; 0: the pipeline's batch size or, without workers, the rank's
            whole share of a global batch.
        state: the result of `state` of an earlier stream; starts at its position and requires the same data.
        filter: rules on the index, e.g. `{"min_side": 256, "min_aesthetic": 5.0}`; like `members` and `captions` a
            mapping or an instance of its class.
        stop: position at which to stop; None: never. With several workers the order is exact up to the last full batch.
        settings: other fields of `DataConfig` (`index_dir`, `cache_dir`, `prefetch_mb`, `deadline_s`, ...).

    Raises:
        ConfigError: a setting is invalid or unknown, the batch cannot be divided this way, or `state` belongs to other
            data or batches.
        DataError: shards are missing, access is denied, or they are not tar archives.
    """

    def __init__(
        self,
        shards: Any,
        *,
        seed: int = 0,
        global_batch: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        position: int = 0,
        lanes: int = 0,
        window: int | None = None,
        micro_batch: int = 0,
        filter: FilterConfig | dict[str, Any] | None = None,
        stop: int | None = None,
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if window is not None:
            settings["window"] = window
        settings |= {"global_batch": global_batch, "lanes": lanes, "micro_batch": micro_batch, "filter": filter or {}}
        for name, kind in (("filter", FilterConfig), ("members", MembersConfig), ("captions", CaptionConfig)):
            if isinstance(settings.get(name), Mapping):
                settings[name] = _settings(kind, name, settings[name])
        self.config = _settings(DataConfig, "ShardStream", {"shards": shards, **settings})
        own, all_ranks = _place()
        self.world_size = _typed("world_size", int, all_ranks if world_size is None else world_size)
        if rank is None and own is None and self.world_size > 1:
            raise ConfigError(f"rank: it is not known, nor is RANK set; with world_size={self.world_size}, give it")
        self.rank = _typed("rank", int, (own or 0) if rank is None else rank)
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank={self.rank}: it must lie between 0 and world_size - 1 = {self.world_size - 1}")
        self.seed, self.position = _typed("seed", int, seed), check_position(position)
        self.stop = _typed("stop", int | None, stop)
        config = self.config
        self.micro_batch = check_world_size(self.world_size, config.global_batch, config.lane_count, config.micro_batch)
        self.dataset: Dataset = open_dataset(self.config, Strangers(self.rank, self.world_size))
        if state is not None:
            if not isinstance(state, Mapping) or "position" not in state:
                raise ConfigError("state: give what `state(position)` of an earlier stream returned")
            check_state(state_of(self.dataset, self.config, self.seed, self.position), state)
            self.position = check_position(state["position"])

    def state(self, position: int) -> dict[str, Any]:
        """Return the JSON-serializable state at a position (samples consumed by all ranks), for a checkpoint.

        Raises:
            ConfigError: the position is within a global batch, whose samples are not consumed in the order of their
                positions: the next stream would repeat some of them and skip others.
        """
        position, batch = check_position(position), self.config.global_batch
        if (inside := (position - self.position) % batch) and position != self.stop:
            raise ConfigError(
                f"state: position={position} lies within a global batch of {batch} samples; a stream resumes after "
                f"whole ones, for example at {max(position - inside, 0)} or {position - inside + batch}"
            )
        return state_of(self.dataset, self.config, self.seed, position)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        size = self.config.micro_batch or (_batch_size(info.dataset) if info else 0)
        if not size and workers > 1:
            raise ConfigError(
                f"ShardStream: the order depends on the batch size of the DataLoader (num_workers={workers}), which a "
                "worker cannot see; give the stream micro_batch=n for batch_size=n, micro_batch=1 for "
                "batch_size=None, or batch in the pipeline with wds.batched(n)"
            )
        size = size or self.micro_batch
        order = order_of(self.dataset, self.config, self.seed, self.world_size)
        chunks = Chunks(self.config, self.rank, self.world_size, self.position, size, worker, workers, self.stop)
        reader = RowReader(self.dataset, self.config)
        budget = self.config.prefetch_mb * 2**20 // workers
        lanes = self.config.lane_count / self.world_size / workers
        ahead = Prefetcher(reader, order, chunks, lanes, budget, chunks.mine)
        try:
            for position, shard, row, get in ahead:
                try:
                    sample = get()
                    sample.update(__position__=position, __failures__="")
                except BadSample as bad:
                    taken = replace(reader, self.seed, position, shard, row, bad, dict)
                    sample = {**taken.value, "__failures__": json.dumps(taken.failures)}
                yield sample
        finally:
            ahead.close()
            reader.close()

    def __call__(self) -> Iterator[Sample]:
        return iter(self)


def _place() -> tuple[int | None, int]:
    """Return the rank of this process, None if it is not known, and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    for name, value in found.items():
        if value is not None and not value.isdecimal():
            raise ConfigError(f"{name}={value!r}: this environment variable must be a whole number")
    own, ranks = (None if value is None else int(value) for value in found.values())
    return own, 1 if ranks is None else ranks


def _settings(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{name}: unknown setting {', '.join(unknown)}; the settings are {', '.join(hints)}")
    return kind(**{key: _typed(f"{name}: {key}", hints[key], value) for key, value in values.items()})


def _typed(name: str, kind: Any, value: Any) -> Any:
    """Return a value as Python's own type for it. Raises `ConfigError`, naming it, if it is of another kind."""
    first, *others = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if others and value is None:
        return None
    plain = get_origin(first) or first
    if plain is Any:
        return value
    accepted, words = KINDS.get(plain, ((plain,), "a mapping"))
    if not isinstance(value, accepted) or (plain is list and isinstance(value, (str, bytes))):
        raise ConfigError(f"{name}={value!r}: it must be {words}")
    return plain(value) if plain in KINDS else value


def _batch_size(pipeline: Any) -> int:
    """Return the samples per item that a webdataset pipeline delivers; 0 for anything else."""
    if not isinstance(pipeline, wds.DataPipeline):
        return 0
    size = 1
    for stage in pipeline.pipeline:
        name = getattr(getattr(stage, "f", None), "__name__", "")
        if name == "_batched":
            size *= inspect.signature(stage.f).bind(None, *stage.args, **stage.kw).arguments.get("batchsize", 20)
        elif name == "_unbatched":
            size = 1
    return size
