"""The parts of a run that the loop in train.py uses, opened in order, and the ranks' common decisions."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.reading.loader import Batch
from data_pipeline.storage.retry import StoppedWaiting
from training.checkpoint.provenance import code_version
from training.checkpoint.store import Checkpoint
from training.config.experiment import Experiment
from training.model.dinov2 import pinned_dino
from training.plan.checks import check_heldout
from training.plan.fits import check_memory, remarks
from training.plan.flops import flops_and_peak
from training.processes.collectives import all_sum, each, together
from training.processes.endings import LossGuard, Signals, stop_error
from training.processes.ranks import Ranks
from training.run.directory import RunDir, check_same_run, to_dict
from training.run.preflight import preflight
from training.run.profiling import Profile
from training.run.quick_evaluation import QuickEvaluation
from training.run.reporting.report import Report
from training.run.reporting.tracking import SILENT, finite, start_logging, stop_logging
from training.run.sample_grid import Inputs, choose, draw, write_samples
from training.run.saving import Saving
from training.run.training_data import TrainingData, open_loader
from training.run.training_state import TrainingState
from training.run.validation import Validation, by_noise_level
from training.run.watchdog import Watchdog
from training.text.encoder import build_text_encoder
from training.text.identity import pinned

log = logging.getLogger("cascade")
NO_DATA = "there is no data for it"


class Session:
    """One start of a run, from `step` on: `data`, `state` (the engine), `saving` (checkpoints) and `report`."""

    def __init__(self, config: Experiment, ranks: Ranks, watchdog: Watchdog) -> None:
        watchdog.phase("run directory")
        config = replace(config, text=each(lambda: pinned(config.text), ranks))
        if config.compares_features:
            config = replace(config, dino=each(lambda: pinned_dino(config.dino), ranks))
        self.config, self.ranks, self.watchdog = config, ranks, watchdog
        self._config = to_dict(config)
        self._code = code_version() if ranks.is_main else {}
        self.run = RunDir(config)
        made = together(self.run.create, ranks)
        try:
            each(lambda: start_logging(self.run, ranks), ranks)
            self._open()
        except (UserError, OSError):  # a setting, or a full disk
            self._discard(made)
            raise

    # --------------------------------------------------------------------------------------------------- opening

    def _open(self) -> None:
        """Open all parts, in order."""
        config, ranks, watchdog = self.config, self.ranks, self.watchdog
        if config.cluster.preflight:
            watchdog.phase("preflight")
            preflight(config, ranks, self.run)
        watchdog.log_file = self.run.log_file(ranks.rank)

        watchdog.phase("checkpoint")
        self.saving = Saving(self.run, config, ranks, lambda step, place: self.report.tracker.checkpoint(step, place))
        with self.saving.downloads(config.train.init_from, config.distill.teacher) as share:
            checkpoint = self.saving.resume(self._check_checkpoint, share)
            meta = checkpoint.meta if checkpoint else {}
            self.step: int = checkpoint.step if checkpoint else 0
            self.skipped: int = meta.get("counters", {}).get("skipped", 0)
            """Number of skipped steps in the whole run."""
            self.unmeasured: bool = meta.get("unmeasured", False)
            """A signal ended the last start before it could measure what was due at `step`."""
            self.guard = LossGuard(config.train.spike_factor, meta.get("losses", ()), meta.get("refused", 0))
            self._open_data(meta)
            watchdog.phase("engine")
            self.state = TrainingState(config, ranks, self.text_encoder.dim, self.data.accumulate, checkpoint)

        watchdog.phase("tracking")
        origin = meta.get("config", {}).get("run", {}).get("dir")
        self.wandb_id: str = together(lambda: self.run.wandb_id(meta.get("wandb_id"), origin), ranks)
        together(self._record_start, ranks)
        self.report = each(self._open_report, ranks)
        self.profile = Profile(config.train.profile, self.run, ranks)
        self._validated, self._validated_step = math.inf, -1
        self._grid: Inputs | None = None
        self._writing = True
        """Whether any rank was writing a checkpoint at the last step."""

    def _open_data(self, meta: dict[str, Any]) -> None:
        """Open the training data and what else reads captions or pictures. `meta`: see TrainingData."""
        config, ranks, watchdog = self.config, self.ranks, self.watchdog
        watchdog.phase("data")
        each(lambda: check_memory(config, ranks), ranks)
        for remark in remarks(config, ranks.device) if ranks.is_main else ():
            log.warning("%s", remark)
        self.data = each(lambda: TrainingData(config, ranks, self.run, meta), ranks)
        self.data.check(meta)
        watchdog.phase("text encoder")
        self.text_encoder = each(lambda: build_text_encoder(config.text, ranks.device), ranks)
        self.validation = each(self._open_validation, ranks) if config.validation.every else None
        encode = self.text_encoder.encode
        self.evaluation: QuickEvaluation | None = None
        if config.evaluation.every:
            self.evaluation = each(lambda: QuickEvaluation(config, ranks, encode), ranks)

    def _discard(self, made: list[str]) -> None:
        """Remove what this start has created, after it was refused."""
        stop_logging()
        if made and self.ranks.is_main and (saving := getattr(self, "saving", None)) is not None:
            saving.store.disclaim()
        self.run.discard(made, self.ranks.rank)

    def _check_checkpoint(self, checkpoint: Checkpoint | None) -> None:
        """Refuse to resume with incompatible settings, or if this run's checkpoints have vanished."""
        if checkpoint is None:
            self.run.check_nothing_lost()
            return
        for key in ("position", "data", "updates"):
            checkpoint.recorded(key)
        self.run.check_own(checkpoint.recorded("config"))
        changes = check_same_run(checkpoint.recorded("config"), self._config, str(checkpoint.folder))
        log.info("resuming from step %d (%s)", checkpoint.step, checkpoint.folder)
        for change in changes:
            log.info("changed since: %s", change)

    def _open_validation(self) -> Validation:
        together(lambda: check_heldout(self.config, self.data.loader.dataset.urls), self.ranks)
        return Validation(self.config, self.ranks, self._text)

    def _record_start(self) -> None:
        if self.step == 0:
            log.info("starting a new run in %s", self.run.path)
        self.run.write_config(self.config)
        self.run.record_start(self._code, self.step, self.saving.store.attempt, self.ranks.world_size)

    def _open_report(self) -> Report:
        config, state = self.config, self.state
        flops, peak = flops_and_peak(
            state.unet,
            config.stage.train_size,
            self.text_encoder.max_tokens,
            self.ranks.device,
            config.precision.dtype,
            config.train.peak_tflops,
            frozen=bool(state.lora),
            teacher_passes=config.distill.teacher_passes,
        )
        return Report(
            self.run,
            config,
            self.ranks,
            step=self.step,
            attempt=self.saving.store.attempt,
            flops=flops,
            peak_flops=peak,
            datasets=self.data.datasets,
            wandb_id=self.wandb_id,
            code=self._code,
        )

    # ---------------------------------------------------------------------------------------- what the loop calls

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Report a phase to the watchdog, and measure its time."""
        self.watchdog.phase(name, step)
        with self.report.meter.phase(name):
            yield
        self.watchdog.phase(f"after {name}", step)

    def begin(self) -> None:
        """Start the loop: reset the clocks on all ranks at the same time (rank 0 first has to start W&B)."""
        self.watchdog.phase("wait for rank 0")
        left = 0 < self.step < self.config.train.steps
        told = self.ranks.is_main and left and bool(self.run.asked_to_stop())
        self.told_to_stop = bool(all_sum([float(told)], self.ranks)[0])
        """Another program has asked the run to end early (RUN/stop.json)."""
        self.report.meter.start(self.step)

    def next_batch(self, healthy: bool) -> list[Batch]:
        """Return the micro-batches of the next step (see TrainingData.next).

        Args:
            healthy: the last step was applied.

        Raises:
            CascadeError: there is no data; the state has been saved.
        """
        batches = self.data.next()
        if batches is None:
            self._end_without_data(healthy)
        return batches

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean loss of one micro-batch, and record its per-sample losses."""
        batch = batch.to(self.ranks.device)
        mean, each_sample = self.state.loss(batch, *self._text(batch), self.data.step - 1)
        self.report.meter.losses(each_sample["t"], each_sample["loss"], batch.datasets)
        return mean

    def _text(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data.text(batch, self.text_encoder)

    def votes(self, received: int) -> list[float]:
        """Return this rank's votes at a step: whether it lacks data, numbers of samples seen and of bad ones, whether a
        checkpoint is being written, whether the run was asked to stop (only rank 0 checks), and one flag per signal."""
        told = self.ranks.is_main and bool(self.run.asked_to_stop())
        counts = self.data.loader.counters
        own = [self.data.failed, counts["samples"], counts["bad"], self.saving.writer.busy, told]
        return [float(value) for value in (*own, *(received == number for number in Signals.HANDLED))]

    def judge(self, loss: float, votes: Sequence[float]) -> str:
        """Return why a step must not be applied, empty if it may be; the same on all ranks."""
        return NO_DATA if self.data.ends(*votes[:3]) else self.guard.problem(loss)

    def hear(self, votes: Sequence[float], healthy: bool) -> int:
        """Process the summed votes of all ranks at a step; return the signal that any of them received, or 0.

        Args:
            healthy: the previous step was applied.

        Raises:
            CascadeError: a rank has no data, or too many samples were bad; the state before the step has been saved.
        """
        failed, seen, bad, writing, told, *signals = votes
        if self.data.ends(failed, seen, bad):
            self.data.take_back()
            self._end_without_data(healthy, seen, bad)
        self._writing, self.told_to_stop = bool(writing), bool(told)
        return next((number for number, count in zip(Signals.HANDLED, signals, strict=True) if count), 0)

    def _end_without_data(self, healthy: bool, seen: float = 0.0, bad: float = 0.0) -> NoReturn:
        self.save(self.data.step, healthy, wait=True)
        error = self.data.error(seen, bad)
        if isinstance(error, StoppedWaiting):
            raise stop_error(error.number, self.data.step, self.saving.last_step) from error
        raise error

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log metrics after `step` steps. One collective."""
        if not self._writing:
            self.finish_saving()  # reports a failure without waiting for the next checkpoint
        own = {"param_norm": self.state.engine.squared_norm(), **self.data.counts()}
        measured = self.report.meter.record(step, own)
        counts = self.data.of_whole_run([measured.pop(name) for name in self.data.count_names])
        self.report.log(
            step,
            {
                "position": self.data.position,
                **record,
                **measured,
                "param_norm": math.sqrt(measured["param_norm"]),
                "skipped": self.skipped,
                "rollbacks": self.saving.rollbacks,
                **{name: count for name, count in counts.items() if name.startswith("bad") or "_dataset/" in name},
            },
        )

    def log_late(self, step: int, figures: dict[str, float]) -> None:
        """Log figures of `step`, whose record an earlier start has written without them."""
        self.report.tracker.add(step, figures)

    def report_skip(self, step: int, loss: float, why: str, batches: list[Batch]) -> None:
        """Log that a step was skipped, with its samples."""
        self.report.skipped(step, loss, why, [key for batch in batches for key in batch.keys])

    def summary(self, loss: float, step: int) -> dict[str, Any]:
        """Return the result of `cascade train` after `step` steps."""
        early = {"stopped": self.run.asked_to_stop()} if step < self.config.train.steps else {}
        return {
            "step": step,
            "position": self.data.position,
            "loss": finite(loss),
            "skipped": self.skipped,
            "rollbacks": self.saving.rollbacks,
            "device_hours": self.report.device_hours(),
            "run_dir": str(self.run.path),
            "checkpoint": self.saving.place,
            "complete": not early,
            **early,
        }

    # ----------------------------------------------------------------------------------- checkpoints and rolling back

    def save(self, step: int, healthy: bool = True, wait: bool = False, unmeasured: bool = False) -> None:
        """Start writing the checkpoint of `step`, after finishing the previous one. Collective."""
        with self.phase("checkpoint", step):
            self.saving.save(
                step, healthy, self.state.engine.snapshot, lambda: {**self._meta(step), "unmeasured": unmeasured}, wait
            )

    def _meta(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint of `step`. Collective."""
        data, counts = self.data, list(self.data.counts().values())
        return {
            "step": step,
            "position": data.position,
            **self.state.meta(),
            "config": self._config,
            "data": {**data.loader.state(), "position": data.position},
            "counters": {"skipped": self.skipped, "rollbacks": self.saving.recent_rollbacks},
            "data_counters": data.of_whole_run(all_sum(counts, self.ranks)),
            "losses": self.guard.history,
            "refused": self.guard.refused,
            "rollbacks": self.saving.rollbacks,
            "validation": self._validated if self._validated_step == step else None,
            "wandb_id": self.wandb_id,
            "code": self._code,
        }

    def finish_saving(self) -> None:
        """Wait until the checkpoint in progress is committed; a failure is logged, not raised. Collective."""
        with self.phase("checkpoint", self.data.step):
            self.saving.finish()

    def roll_back(self, step: int) -> None:
        """Roll weights, moments and averages back to the last healthy checkpoint; the data position does not change.
        Collective.

        Raises:
            NotFinite: train.max_rollbacks is exceeded, or there is no healthy checkpoint.
        """
        with self.phase("checkpoint", step):
            checkpoint = self.saving.roll_back(step, self.guard.refused, self.state.load)
        self.guard.roll_back(checkpoint.meta.get("losses", ()))

    # ------------------------------------------------------------------------- validation, evaluation, sample grid

    def validate(self, step: int) -> dict[str, float]:
        """Return the validation losses of the raw and of the averaged weights. Collective."""
        assert self.validation is not None
        engine, lesson = self.state.engine, self.state.lesson
        with self.phase("validation", step), self.state.stance("force_eager"):
            engine.module.eval()
            raw, _ = self.validation.measure(engine.module, lesson)
            engine.module.train()
            with engine.averaged(0) as module:
                averaged, losses = self.validation.measure(module, lesson)
        self._validated, self._validated_step = averaged, step
        if self.ranks.is_main:
            self.run.record_validation(step, losses)
        return {"validation_loss": raw, "validation_loss_ema": averaged, **by_noise_level(losses)}

    def evaluate(self, step: int) -> dict[str, float]:
        """Return feature-based figures of pictures drawn by the averaged weights. Collective."""
        assert self.evaluation is not None
        averaged = self.state.engine.averaged(0)
        with self.phase("evaluation", step), self.state.stance("force_eager"), averaged as module:
            return self.evaluation.measure(module, beat=lambda: self.watchdog.phase("evaluation", step))

    def sample_grid(self, step: int) -> None:
        """Draw the fixed prompts to samples/step-########.png. Collective."""
        config, ranks = self.config, self.ranks
        with self.phase("samples", step), self.state.stance("force_eager"):
            if self._grid is None:
                squares = replace(config, data=replace(config.data, buckets=[]))
                first = partial(open_loader, squares, ranks, self.run, position=0, rank=0, world_size=1)
                self._grid = choose(config.train.sample_prompts, config.stage, first, ranks)
            with self.state.engine.averaged(0) as module:
                pictures = draw(module, self._grid, self.text_encoder.encode, config, ranks)
            path = self.run.sample_file(step)
            title = f"{config.stage.name}, step {step}, guidance {config.stage.sampler.guidance:g}"
            if ranks.is_main and write_samples(pictures, self._grid, path, title):
                self.report.tracker.image(step, path)

    def close(self, exit_code: int) -> None:
        """Close everything; an exception in progress is recorded in the rank's own log."""
        if sys.exc_info()[0] is not None:
            log.log(SILENT, "ends with code %d", exit_code, exc_info=True)
        self.profile.close()
        self.data.loader.close()
        self.saving.close(hurry=exit_code != 0)
        self.report.tracker.close(exit_code)
        stop_logging()
