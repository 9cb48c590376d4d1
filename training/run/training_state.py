"""The state that training changes: weights, their averages and the optimizer's moments, in the engine."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from data_pipeline.reading.loader import Batch
from training.checkpoint.store import Checkpoint
from training.config.experiment import Experiment
from training.config.unet import for_stage
from training.diffusion import random
from training.diffusion.distillation import Lesson
from training.diffusion.objective import loss
from training.engine.base import DTYPES, in_precision
from training.engine.start import build_engine
from training.model.alignment import Alignment, repa_term
from training.model.dinov2 import Dinov2, dino_settings
from training.model.perceptual import perceptual_term
from training.model.unet import UNet
from training.optim.averages import state_name
from training.optim.base import skip_compiler
from training.optim.registry import states_to_load
from training.processes.collectives import each
from training.processes.ranks import Ranks, thread_count
from training.run.starting_weights import begin_with, open_teacher

log = logging.getLogger("cascade")


class TrainingState:
    """A stage's U-Net in its engine, new or from a checkpoint. Creating one is collective.

    Args:
        text_dim: width D of the text embeddings.
        accumulate: micro-batches per rank and optimizer step.
        checkpoint: the checkpoint to resume from; None: random weights, or those of `train.init_from` or the teacher.
    """

    def __init__(
        self, config: Experiment, ranks: Ranks, text_dim: int, accumulate: int, checkpoint: Checkpoint | None
    ) -> None:
        self.config, self.ranks = config, ranks
        self.lora: dict[str, Any] | None = checkpoint.meta.get("lora") if checkpoint else None
        """Record of the frozen weights under the adapters: path, sha256, scale."""
        self.teacher: dict[str, Any] | None = checkpoint.meta.get("teacher") if checkpoint else None
        """Record of the teacher: path, sha256."""
        self.unet = for_stage(config.stage, text_dim)
        self._dino = each(self._open_dino, ranks)
        model = each(lambda: self._build_model(fresh=checkpoint is None), ranks)
        self.lesson = each(self._open_lesson, ranks) if config.distill.steps else None
        self.engine = build_engine(model, config, ranks, accumulate)
        self.ema_since = [0 for _ in config.ema.decays]
        """For each average, the number of updates after which it started."""
        if checkpoint is not None:
            self.load(checkpoint)
        compiled = config.precision.compile
        self._normal = torch.compile(random.normal, dynamic=False) if compiled else random.normal
        self.stance = torch.compiler.set_stance if compiled else nullcontext
        """`stance("force_eager")` avoids compiling for rare shapes."""

    def _build_model(self, fresh: bool) -> UNet:
        cluster, same_bits = self.config.cluster, self.config.train.deterministic_reduction
        torch.set_num_threads(1 if same_bits and not cluster.threads else thread_count(cluster))
        torch.manual_seed(self.config.seed)
        model = UNet(self.unet)
        repa = self.config.repa
        if repa.weight:
            features = dino_settings(str(self.config.dino.path)).hidden_size
            model.alignment = Alignment(self.unet.widths[-1], repa.width, features)
        if self.config.starts_from and (fresh or self.lora):
            self.lora = begin_with(model, self.config, self.lora)
        if self.config.precision.compile:
            model.compile_blocks()
        else:
            skip_compiler()
        return model

    def _open_dino(self) -> Dinov2 | None:
        if not self.config.compares_features:
            return None
        return Dinov2(self.config.dino, DTYPES[self.config.precision.dtype], self.ranks.device)

    def _open_lesson(self) -> Lesson:
        config = self.config
        teacher = open_teacher(config, self.teacher)
        self.teacher = teacher.record
        log.info("teacher: %s (sha256 %s)", teacher.record["path"], teacher.record["sha256"][:16])
        unet, precision = teacher.unet, config.precision
        unet.to(device=self.ranks.device, dtype=DTYPES[precision.dtype])
        if precision.compile:
            unet.compile_blocks()

        return Lesson.of(
            lambda *given: unet(*in_precision(precision, *given)),
            teacher.config.diffusion,
            config.distill.teacher_sampler(config.stage.sampler),
            config.stage.diffusion,
            config.distill.steps,
            config.stage.image_size,
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Load weights, moments and averages from a checkpoint. Collective."""
        config, updates = self.config, checkpoint.meta["updates"]
        kinds, self.ema_since = states_to_load(checkpoint.meta, checkpoint.names, config.optimizer.name, config.ema)
        new = [d for i, d in enumerate(config.ema.decays) if kinds[state_name(i)] == "param" and updates]
        if new and self.ranks.is_main:
            log.info("ema.decays: %s not in the checkpoint; starting from the weights of step %d", new, checkpoint.step)
        self.engine.import_tensors(checkpoint.read, kinds, updates)

    def loss(
        self, batch: Batch, text: torch.Tensor, mask: torch.Tensor, step: int = 0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean loss of one micro-batch, and per-sample tensors (B,) as `objective.loss` does.

        Args:
            batch: the micro-batch, on the device.
            text, mask: embeddings (B, T, D) and mask (B, T) of its captions, on any device.
            step: the run's step, from 0, which decides whether `repa` still applies.
        """
        config, device = self.config, self.ranks.device
        return loss(
            self.engine,
            batch.images,
            text.to(device, non_blocking=True),
            mask.to(device, non_blocking=True),
            config=config.stage.diffusion,
            seed=config.seed,
            positions=batch.positions,
            low_res=batch.low_res,
            image_size=config.stage.image_size,
            global_batch=config.data.global_batch,
            sizes=batch.frames,
            extra=partial(self._beside, step) if self._dino is not None else None,
            normal=self._normal,
            lesson=self.lesson,
        )

    def _beside(self, step: int, x0: torch.Tensor, estimate: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """Return the losses on features for each sample, (B,)."""
        assert self._dino is not None
        repa, perceptual, total = self.config.repa, self.config.perceptual, torch.zeros(len(x0), device=x0.device)
        aligned = bool(repa.weight) and step < repa.until
        wanted, grid = self._dino(x0) if aligned or perceptual.weight else (None, (1, 1))
        if repa.weight:
            module: Any = self.engine.module
            total = total + repa_term(module.alignment.take(), wanted if aligned else None, grid, repa)
        if perceptual.weight and wanted is not None:
            total = total + perceptual_term(self._dino(estimate, learn=True)[0], wanted, log_snr, perceptual)
        return total

    def meta(self) -> dict[str, Any]:
        """Return the metadata that belongs to the tensors in a checkpoint."""
        own = {"lora": self.lora, "teacher": self.teacher}
        return {"updates": self.engine.updates, "ema_since": self.ema_since, **own}
