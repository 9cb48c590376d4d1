"""The loss on held-out pictures at fixed noise levels with fixed noise, comparable across steps and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from data_pipeline.common.errors import about
from data_pipeline.config import divisors
from data_pipeline.reading.loader import Batch, Loader
from training.config.diffusion import DiffusionConfig
from training.config.experiment import Experiment
from training.diffusion.distillation import Lesson
from training.diffusion.objective import loss
from training.plan.checks import check_validation, validation_shards
from training.processes.collectives import RankTeam, all_sum
from training.processes.ranks import Ranks
from training.run.reporting.metering import BANDS

SEED = 20_220_523
"""Fixed seed, so that runs with different seeds are measured on the same noise; never change it."""


class Validation:
    """Keeps this rank's share of the held-out samples in host memory.

    Args:
        text: encodes the captions of a batch as embeddings (B, T, D) and mask (B, T).

    Raises:
        ConfigError: no held-out shards are set, or the samples cannot be divided among the ranks.
        DataError: the shards are missing.
    """

    def __init__(self, config: Experiment, ranks: Ranks, text: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]):
        self.config, self.ranks, self._text = config, ranks, text
        self.count = config.validation.samples
        key, shards = validation_shards(config)
        check_validation(config, ranks.world_size)
        share = self.count // ranks.world_size
        most = min(share, config.data.micro_batch_of(ranks.world_size))
        data = replace(
            config.data,
            shards=shards,
            global_batch=self.count,
            lanes=self.count,
            window=1,
            micro_batch=max(size for size in divisors(share) if size <= most),
            embeddings=None,
            captions=config.data.captions.of_members(),
            buckets=[],
        )
        stage = config.stage
        with about(key):
            loader = Loader(
                data,
                image_size=stage.image_size,
                low_res_size=stage.low_res_size,
                crop_size=stage.crop_size,
                seed=SEED,
                rank=ranks.rank,
                world_size=ranks.world_size,
                team=RankTeam(ranks),
            )
        try:
            self._batches = next(loader)
        finally:
            loader.close()

    @torch.no_grad()
    def measure(self, model: Callable[..., Any], lesson: Lesson | None = None) -> tuple[float, list[float]]:
        """Return the mean loss, and the loss of each sample; their times are spread evenly over (0, 1). With a `lesson`
        it is the student's distance from its teacher. Collective."""
        diffusion = replace(self.config.stage.diffusion, text_drop=0.0)
        singles = torch.zeros(self.count, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for batch in self._batches:
            t = ((batch.positions + 0.5) / self.count).to(self.ranks.device)
            each = self._ask(model, batch, diffusion, t=t, lesson=lesson)
            total += each["loss"].double().sum()
            singles[batch.positions] = each["loss"].double().cpu()
        summed = all_sum([float(total), *singles.tolist()], self.ranks)
        return summed[0] / self.count, summed[1:]

    @torch.no_grad()
    def at_levels(self, model: Callable[..., Any], levels: Sequence[float]) -> list[float]:
        """Return the mean x0 error at each of these log-SNRs. It does not depend on schedule, weighting or
        parametrisation, so runs that differ in them can be compared. Super-resolution starts from the true low-res
        picture without augmentation, since augmentation levels depend on the schedule. Collective."""
        diffusion = replace(self.config.stage.diffusion, text_drop=0.0, aug_max=0.0)
        sums = torch.zeros(len(levels), dtype=torch.float64, device=self.ranks.device)
        for batch in self._batches:
            for place, level in enumerate(levels):
                log_snr = torch.full((len(batch.positions),), level, device=self.ranks.device)
                sums[place] += self._ask(model, batch, diffusion, log_snr=log_snr)["x0_error"].double().sum()
        return [total / self.count for total in all_sum(sums.tolist(), self.ranks)]

    def _ask(
        self,
        model: Callable[..., Any],
        batch: Batch,
        diffusion: DiffusionConfig,
        t: torch.Tensor | None = None,
        log_snr: torch.Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the per-sample results of `objective.loss`."""
        device = self.ranks.device
        text, mask = self._text(batch)
        return loss(
            model,
            batch.images.to(device),
            text.to(device),
            mask.to(device),
            config=diffusion,
            seed=SEED,
            positions=batch.positions,
            low_res=None if batch.low_res is None else batch.low_res.to(device),
            image_size=self.config.stage.image_size,
            sizes=batch.frames.to(device),
            t=t,
            log_snr=log_snr,
            lesson=lesson,
        )[1]


def by_noise_level(losses: Sequence[float]) -> dict[str, float]:
    """Return the means of the losses from `Validation.measure` in BANDS equal bands of the time, by their names in
    metrics.jsonl; bands without samples are left out."""
    found: dict[str, float] = {}
    for band in range(BANDS):
        low, high = band / BANDS, (band + 1) / BANDS
        inside = [loss for i, loss in enumerate(losses) if low <= (i + 0.5) / len(losses) < high]
        if inside:
            found[f"validation_t/{low:.1f}-{high:.1f}"] = sum(inside) / len(inside)
    return found
