"""The training data of one rank: its micro-batches, their text embeddings, and counts of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from data_pipeline.common.errors import BAD_REASONS, CascadeError
from data_pipeline.reading.loader import Batch, Loader
from data_pipeline.shards.embeddings import pad
from training.config.experiment import Experiment
from training.config.unet import side_multiple
from training.processes.collectives import RankTeam, all_sum, errors_of_all, gather_objects, together
from training.processes.ranks import Ranks
from training.run.directory import RunDir
from training.text.identity import identity

COUNTS = ("samples", "bad", *(f"bad_{reason}" for reason in BAD_REASONS), "bad_other")
"""Counts of the loader that are summed over the ranks, in this order."""


class Encoder(Protocol):
    """The part of a text encoder that training uses."""

    max_tokens: int

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (B, T, D) and mask (B, T)."""


def open_loader(config: Experiment, ranks: Ranks, run: RunDir, position: int, **others: Any) -> Loader:
    """Open this rank's loader from `position` on; `others` override its arguments (`team`: all ranks open it
    together)."""
    stage = config.stage
    multiple = side_multiple(stage, config.text.dim) if config.data.buckets else 1
    return Loader(
        config.data,
        image_size=stage.image_size,
        low_res_size=stage.low_res_size,
        crop_size=stage.crop_size,
        seed=config.seed,
        position=position,
        multiple=multiple,
        quarantine=str(run.path / "logs" / f"quarantine-{ranks.rank}.jsonl"),
        **{"rank": ranks.rank, "world_size": ranks.world_size, **others},
    )


class TrainingData:
    """This rank's share of the data. `position` is the number of samples that all ranks have consumed since step 0.

    Args:
        meta: metadata of the checkpoint to resume from; empty for a new run.

    Raises:
        DataError, ConfigError: the shards are missing or invalid.
    """

    def __init__(self, config: Experiment, ranks: Ranks, run: RunDir, meta: Mapping[str, Any]) -> None:
        self.config, self.ranks = config, ranks
        self.position: int = meta.get("position", 0)
        self.datasets = [dataset.name for dataset in config.data.datasets()]
        """Names of the data sets of a mixture; empty without one."""
        self._earlier: dict[str, int] = meta.get("data_counters", {})
        self._batches: list[Batch] | None = None
        self._failure: Exception | None = None
        self.loader = open_loader(
            config, ranks, run, self.position, own_process=config.data.own_process, team=RankTeam(ranks)
        )

    def check(self, meta: Mapping[str, Any]) -> None:
        """Refuse data that differs from the checkpoint's, and embeddings of a different text encoder. Collective."""
        if meta:
            self.loader.check_state(meta["data"])
        embeddings = self.loader.embeddings
        if embeddings is not None:
            encoder = identity(self.config.text)
            embeddings.check(encoder, look=False)
            together(lambda: embeddings.check(encoder), self.ranks)

    @property
    def accumulate(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.config.data.accumulate_of(self.ranks.world_size)

    @property
    def step(self) -> int:
        """Number of steps whose samples have been consumed."""
        return self.position // self.config.data.global_batch

    @property
    def failed(self) -> bool:
        """Whether this rank got no data for the step."""
        return self._failure is not None

    def next(self) -> list[Batch] | None:
        """Return the micro-batches of the next step.

        A rank that gets none returns its last ones again, so that the others do not wait for it forever; all ranks then
        refuse the step together (`ends`). None means that a rank has none to repeat (in the first step, or with one
        process), and that the run must end here.
        """
        first = self._batches is None
        try:
            self._batches = next(self.loader)
        except (CascadeError, OSError) as caught:
            self._failure = caught
        if (first or self.ranks.world_size == 1) and all_sum([float(self.failed)], self.ranks)[0]:
            return None
        self.position += self.config.data.global_batch
        return self._batches

    def take_back(self) -> None:
        """Undo the current step's advance of the position; its samples were not used."""
        self.position -= self.config.data.global_batch

    def ends(self, failed: float, seen: float, bad: float) -> bool:
        """Return whether the run must end for lack of data, from numbers summed over the ranks: ranks without a batch,
        samples seen, and bad samples."""
        return bool(failed) or (self.ranks.world_size > 1 and self.loader.too_many(int(seen), int(bad)))

    def error(self, seen: float = 0.0, bad: float = 0.0) -> Exception:
        """Return the error that describes why the data ended, the same on all ranks. Collective."""
        for error in errors_of_all(self._failure, self.ranks):
            if error is not None:
                return error
        shards = gather_objects(self.loader.bad_shards, self.ranks)
        return self.loader.too_many_error(int(seen), int(bad), shards)

    def text(self, batch: Batch, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (B, T, D) and mask (B, T) of the captions, precomputed or encoded now."""
        if batch.embeddings is None:
            return encoder.encode(batch.captions)
        text, mask = pad(batch.embeddings, encoder.max_tokens)
        return torch.from_numpy(text), torch.from_numpy(mask)

    @property
    def count_names(self) -> tuple[str, ...]:
        """Names of the counts that are summed over the ranks: the same names in the same order on all ranks."""
        return (*COUNTS, *(f"{kind}_dataset/{name}" for kind in ("samples", "bad") for name in self.datasets))

    def counts(self) -> dict[str, float]:
        """Return this rank's counts since this start, by `count_names`; other reasons count as bad_other."""
        counts = dict.fromkeys(self.count_names, 0.0)
        for name, count in self.loader.counters.items():
            counts[name if name in counts else "bad_other"] += count
        return counts

    def of_whole_run(self, counts: Sequence[float]) -> dict[str, int]:
        """Return counts over all starts, without reasons that never occurred.

        Args:
            counts: counts since this start, in the order of `count_names`, summed over the ranks.
        """
        always = {name: 0 for name in self.count_names if name in ("samples", "bad") or "/" in name}
        total = Counter({**always, **self._earlier})
        total.update({name: int(count) for name, count in zip(self.count_names, counts, strict=True) if count})
        return dict(total)
