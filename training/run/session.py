"""Everything a training run works with, put together once: data, text encoder, U-Net, engine, checkpoints, tracking.

train.py holds the loop; this file holds what the loop calls.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from data_pipeline.common.errors import BAD_REASONS, CascadeError
from data_pipeline.reading.loader import Batch, Loader
from data_pipeline.shards.embeddings import pad
from data_pipeline.storage.retry import StoppedWaiting
from training.checkpoint.provenance import code_version
from training.checkpoint.store import Checkpoint
from training.config.experiment import Experiment
from training.config.unet import UNetConfig, for_stage
from training.diffusion import random
from training.diffusion.objective import loss
from training.engine.deepspeed import build_engine
from training.model.unet import UNet
from training.optim.averages import state_name
from training.optim.base import skip_compiler
from training.optim.registry import states_to_load
from training.plan.checks import check_heldout
from training.plan.fits import check_memory, remarks
from training.plan.flops import flops_and_peak
from training.processes.collectives import all_sum, barrier, each, errors_of_all, gather_objects, together
from training.processes.endings import LossGuard, Signals, stop_error
from training.processes.ranks import Ranks, thread_count
from training.run.directory import RunDir, check_same_run, to_dict
from training.run.metering import Hours, Meter, TimeLeft
from training.run.quick_evaluation import QuickEvaluation
from training.run.sample_grid import Inputs, choose, draw, write_samples
from training.run.saving import Saving
from training.run.starting_weights import begin_with
from training.run.tracking import SILENT, Tracker, finite, start_logging, stop_logging
from training.run.validation import Validation, by_noise_level
from training.run.watchdog import Watchdog
from training.text.encoder import build_text_encoder
from training.text.identity import identity, pinned

log = logging.getLogger("cascade")


NO_DATA = "there is no data for it"
DATA_COUNTS = ("samples", "bad", *(f"bad_{reason}" for reason in BAD_REASONS), "bad_other")
"""Counts of the loader that the ranks add up, in this order."""


class Session:
    """One start of a run. `step` and `position` are where it begins."""

    def __init__(self, config: Experiment, ranks: Ranks, watchdog: Watchdog) -> None:
        watchdog.phase("run directory")
        config = replace(config, text=each(lambda: pinned(config.text), ranks))
        self.config, self.ranks = config, ranks
        self._config = to_dict(config)
        self._code = code_version() if ranks.is_main else {}
        self.run = RunDir(config)
        together(self.run.create, ranks)
        start_logging(self.run, ranks)
        train, self.watchdog = config.train, watchdog
        watchdog.log_file = self.run.log_file(ranks.rank)
        watchdog.phase("checkpoint")
        self.saving = Saving(self.run, config, ranks, lambda step, place: self.tracker.checkpoint(step, place))
        downloads = ExitStack()
        share = downloads.enter_context(self.saving.downloads(train.init_from))
        checkpoint = self.saving.resume(self._check_checkpoint, share)
        meta = checkpoint.meta if checkpoint else {}
        self.step: int = checkpoint.step if checkpoint else 0
        self.position: int = meta.get("position", 0)
        self.skipped: int = meta.get("counters", {}).get("skipped", 0)
        """Steps that were not applied, of the whole run."""
        self._data_counters: dict[str, int] = meta.get("data_counters", {})
        self.guard = LossGuard(train.spike_factor, meta.get("losses", ()), meta.get("refused", 0))
        self.wandb_id: str = together(lambda: self.run.wandb_id(meta.get("wandb_id")), ranks)

        watchdog.phase("data")
        own = config.data.own_process
        each(lambda: check_memory(config, ranks), ranks)
        for remark in remarks(config, ranks.device) if ranks.is_main else ():
            log.warning("%s", remark)
        self.loader = each(lambda: self._open_loader(self.position, own_process=own), ranks)
        if checkpoint is not None:
            self.loader.check_state(meta["data"])
        if self.loader.embeddings is not None:
            self.loader.embeddings.check(identity(config.text))
        watchdog.phase("text encoder")
        self.text_encoder = each(lambda: build_text_encoder(config.text, ranks.device), ranks)
        self.validation: Validation | None = None
        if config.validation.every:
            self.validation = each(self._open_validation, ranks)
        self.evaluation: QuickEvaluation | None = None
        if config.evaluation.every:
            encode = self.text_encoder.encode
            self.evaluation = each(lambda: QuickEvaluation(config, ranks, encode), ranks)
        watchdog.phase("engine")
        unet = for_stage(config.stage, self.text_encoder.dim)
        self.lora: dict[str, Any] | None = meta.get("lora")
        model = each(lambda: self._build_model(unet, fresh=checkpoint is None), ranks)
        self.engine = build_engine(model, config, ranks, self.accumulate)
        self.ema_since = [0 for _ in config.ema.decays]
        """Updates after which each average began."""
        if checkpoint is not None:
            self._load(checkpoint)
        downloads.close()
        watchdog.phase("tracking")
        together(self._record_start, ranks)
        self.tracker = Tracker(self.run, config, ranks, self.step, self.wandb_id, self._code)
        hours = self.run.path / "hours.json"
        self.hours = Hours(hours, self.saving.store.attempt, ranks.world_size) if ranks.is_main else None
        size, tokens = config.stage.train_size, self.text_encoder.max_tokens
        work = flops_and_peak(unet, size, tokens, ranks.device, train.peak_tflops, frozen=bool(self.lora))
        self.meter = Meter(ranks, config.data.global_batch, *work)
        self.meter.datasets = [dataset.name for dataset in config.data.datasets()]
        self.validated, self.validated_step = math.inf, -1
        self._left = TimeLeft(train.steps)
        self._grid: Inputs | None = None
        self._batches: list[Batch] | None = None
        self._failure: Exception | None = None
        self._writing = True
        """Some rank is writing a checkpoint, as far as is known."""
        self._slow = 0
        compiled = config.precision.compile
        self._normal = torch.compile(random.normal, dynamic=False) if compiled else random.normal
        self._stance = torch.compiler.set_stance if compiled else nullcontext  # rare shapes are not worth compiling

    # ------------------------------------------------------------------------------------------ putting together

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        share = self.config.data.global_batch // self.ranks.world_size
        return share // (self.config.data.micro_batch or share)

    def _check_checkpoint(self, checkpoint: Checkpoint | None) -> None:
        """Refuses to go on with another run's settings, or without the checkpoints that this run has had."""
        if checkpoint is None:
            self.run.check_nothing_lost()
            return
        for key in ("position", "data", "updates"):
            checkpoint.recorded(key)
        changes = check_same_run(checkpoint.recorded("config"), self._config, str(checkpoint.folder))
        log.info("resuming from step %d (%s)", checkpoint.step, checkpoint.folder)
        for change in changes:
            log.info("changed since: %s", change)

    def _record_start(self) -> None:
        if self.step == 0:
            log.info("starting a new run in %s", self.run.path)
        self.run.write_config(self.config)
        self.run.record_start(self._code, self.step, self.saving.store.attempt, self.ranks.world_size)

    def _open_loader(self, position: int, **others: Any) -> Loader:
        stage, ranks = self.config.stage, self.ranks
        return Loader(
            self.config.data,
            image_size=stage.image_size,
            low_res_size=stage.low_res_size,
            crop_size=stage.crop_size,
            seed=self.config.seed,
            position=position,
            quarantine=str(self.run.path / "logs" / f"quarantine-{ranks.rank}.jsonl"),
            **{"rank": ranks.rank, "world_size": ranks.world_size, **others},
        )

    def _open_validation(self) -> Validation:
        check_heldout(self.config, self.loader.dataset.urls)
        return Validation(self.config, self.ranks, self._text)

    def _build_model(self, config: UNetConfig, fresh: bool) -> UNet:
        cluster, same_bits = self.config.cluster, self.config.train.deterministic_reduction
        torch.set_num_threads(1 if same_bits and not cluster.threads else thread_count(cluster))
        torch.manual_seed(self.config.seed)
        model = UNet(config)
        if self.config.train.init_from and (fresh or self.lora):
            self.lora = begin_with(model, self.config, self.lora)
        if self.config.precision.compile:
            model.compile_blocks()
        else:
            skip_compiler()
        return model

    def _load(self, checkpoint: Checkpoint) -> None:
        config, updates = self.config, checkpoint.meta["updates"]
        kinds, self.ema_since = states_to_load(checkpoint.meta, checkpoint.names, config.optimizer.name, config.ema)
        new = [d for i, d in enumerate(config.ema.decays) if kinds[state_name(i)] == "param" and updates]
        if new and self.ranks.is_main:
            log.info("ema.decays: %s not in the checkpoint; begun from the weights of step %d", new, checkpoint.step)
        self.engine.import_tensors(checkpoint.read, kinds, updates)

    # ---------------------------------------------------------------------------------------- what the loop calls

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Tells the watchdog what comes, and counts its time."""
        self.watchdog.phase(name, step)
        with self.meter.phase(name):
            yield
        self.watchdog.phase(f"after {name}", step)

    def begin(self) -> None:
        """The loop starts: clocks to zero, on all ranks at once (rank 0 has W&B to start)."""
        self.watchdog.phase("wait for rank 0")
        barrier(self.ranks)
        self.meter.start(self.step)

    def next_batch(self, healthy: bool) -> list[Batch]:
        """The micro-batches of the next step.

        Where a rank gets none, it repeats its last ones, so that the others do not wait for it in vain; `judge` then
        refuses the step, and `hear` ends the run on all ranks. Without last ones (the first step, or one process) the
        run ends here, after the state has been saved (`healthy`: the last step was applied).
        """
        first = self._batches is None
        try:
            self._batches = next(self.loader)
        except (CascadeError, OSError) as caught:
            self._failure = caught
        if (first or self.ranks.world_size == 1) and all_sum([float(self._failure is not None)], self.ranks)[0]:
            self._end_without_data(healthy)
        assert self._batches is not None
        self.position += self.config.data.global_batch
        return self._batches

    def votes(self, received: int) -> list[float]:
        """What this rank has to say at a step: has it no data, samples seen and bad ones, is a checkpoint being
        written, and which signal it has received."""
        counts = self.loader.counters
        own = [self._failure is not None, counts["samples"], counts["bad"], self.saving.writer.busy]
        return [float(value) for value in (*own, *(received == number for number in Signals.HANDLED))]

    def judge(self, loss: float, votes: Sequence[float]) -> str:
        """Why a step must not be applied; the same on all ranks."""
        return NO_DATA if self._data_ends(votes) else self.guard.problem(loss)

    def hear(self, votes: Sequence[float], healthy: bool) -> int:
        """Takes in what all ranks have said at a step; the signal that any of them received, or 0.

        Raises:
            CascadeError: one has no data, or too many samples were bad; the state before the step is saved
                (`healthy`: the step before it was applied).
        """
        if self._data_ends(votes):
            self.position -= self.config.data.global_batch
            self._end_without_data(healthy, votes)
        self._writing = bool(votes[3])
        return next((n for n, count in zip(Signals.HANDLED, votes[4:], strict=True) if count), 0)

    def _data_ends(self, votes: Sequence[float]) -> bool:
        failed, seen, bad = votes[:3]
        return bool(failed) or (self.ranks.world_size > 1 and self.loader.too_many(int(seen), int(bad)))

    def _end_without_data(self, healthy: bool, votes: Sequence[float] = ()) -> None:
        step = self.position // self.config.data.global_batch
        self.save(step, healthy, wait=True)
        for error in errors_of_all(self._failure, self.ranks):
            if isinstance(error, StoppedWaiting):
                raise stop_error(error.number, step, self.saving.last_step) from error
            if error is not None:
                raise error
        shards = gather_objects(self.loader.bad_shards, self.ranks)
        raise self.loader.too_many_error(int(votes[1]), int(votes[2]), shards)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss of one micro-batch."""
        config, batch = self.config, batch.to(self.ranks.device)
        text, mask = self._text(batch)
        mean, each_sample = loss(
            self.engine,
            batch.images,
            text.to(self.ranks.device, non_blocking=True),
            mask.to(self.ranks.device, non_blocking=True),
            config=config.stage.diffusion,
            seed=config.seed,
            positions=batch.positions,
            low_res=batch.low_res,
            image_size=config.stage.image_size,
            global_batch=config.data.global_batch,
            normal=self._normal,
        )
        self.meter.losses(each_sample["t"], each_sample["loss"], batch.datasets)
        return mean

    def _text(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, T, D) and mask (B, T) of the captions: precomputed ones, else encoded now."""
        if batch.embeddings is None:
            return self.text_encoder.encode(batch.captions)
        text, mask = pad(batch.embeddings, self.text_encoder.max_tokens)
        return torch.from_numpy(text), torch.from_numpy(mask)

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Metrics after `step` steps. One collective."""
        if not self._writing:
            self.finish_saving()  # a failed one is not left unsaid until the next is due
        measured = self.meter.record(step, {"param_norm": self.engine.squared_norm(), **self._own_data_counts()})
        counts = self._with_earlier_starts({name: measured.pop(name) for name in self._data_counts})
        if self.hours is not None:
            record = {**record, "device_hours": self.hours.total()}
        record = {
            "position": self.position,
            **record,
            **measured,
            "param_norm": math.sqrt(measured["param_norm"]),
            "skipped": self.skipped,
            "rollbacks": self.saving.rollbacks,
            **{name: count for name, count in counts.items() if name.startswith("bad") or "_dataset/" in name},
        }
        self._name_slow_rank(step, record)
        rate = measured["images_per_second"] / self.config.data.global_batch
        self.tracker.log(step, record, self._left.seconds(step, rate, time.monotonic()))

    def _name_slow_rank(self, step: int, record: dict[str, Any]) -> None:
        """One line when the same rank was slow in three records running."""
        self._slow = self._slow + 1 if "slow_rank" in record else 0
        if self._slow == 3 and self.ranks.is_main:
            log.warning(
                "step %d: rank %d is slow: its data and forward pass take %.1f times the median rank's; "
                "all others wait for it",
                step, record["slow_rank"], record["slow_factor"],
            )  # fmt: skip

    @property
    def _data_counts(self) -> tuple[str, ...]:
        """Counts of the loader that the ranks add up: the same names in the same order on all of them."""
        by_dataset = [f"{kind}_dataset/{name}" for kind in ("samples", "bad") for name in self.meter.datasets]
        return (*DATA_COUNTS, *by_dataset)

    def _own_data_counts(self) -> dict[str, float]:
        """This rank's counts, by DATA_COUNTS and data set; a reason that is not among them counts as bad_other."""
        counts = dict.fromkeys(self._data_counts, 0.0)
        for name, count in self.loader.counters.items():
            counts[name if name in counts else "bad_other"] += count
        return counts

    def _sum(self, values: dict[str, float]) -> dict[str, float]:
        """Summed over the ranks. Collective."""
        return dict(zip(values, all_sum(list(values.values()), self.ranks), strict=True))

    def _with_earlier_starts(self, counts: Mapping[str, float]) -> dict[str, int]:
        """Counts of the data over all ranks (`counts`) and all starts; reasons that never occurred are left out."""
        always = {name: 0 for name in self._data_counts if name in ("samples", "bad") or "/" in name}
        total = Counter({**always, **self._data_counters})
        total.update({name: int(count) for name, count in counts.items() if count})
        return dict(total)

    def report_skip(self, step: int, loss: float, why: str, batches: list[Batch]) -> None:
        """Names the samples of a step that was not applied, in the log of the rank that had them."""
        if self.ranks.is_main:
            log.warning("step %d was skipped: %s (loss %.4g); weights and averages are as before", step, why, loss)
        keys = [key for batch in batches for key in batch.keys]
        logging.getLogger("cascade.skipped").log(SILENT, "step %d: samples of this rank: %s", step, " ".join(keys))

    def summary(self, loss: float) -> dict[str, Any]:
        """What `cascade train` answers."""
        return {
            "step": self.config.train.steps,
            "position": self.position,
            "loss": finite(loss),
            "skipped": self.skipped,
            "rollbacks": self.saving.rollbacks,
            "device_hours": self.hours.total() if self.hours is not None else None,
            "run_dir": str(self.run.path),
            "checkpoint": self.saving.place,
            "complete": True,
        }

    # ------------------------------------------------------------------------------------- checkpoints and rolling back

    def save(self, step: int, healthy: bool = True, wait: bool = False) -> None:
        """Begins to write the checkpoint of `step`; the previous one is finished first. Collective."""
        with self.phase("checkpoint", step):
            self.saving.save(step, healthy, self.engine.snapshot, lambda: self._meta(step), wait)

    def _meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` holds beside the tensors. Collective."""
        return {
            "step": step,
            "position": self.position,
            "updates": self.engine.updates,
            "ema_since": self.ema_since,
            "config": self._config,
            "data": {**self.loader.state(), "position": self.position},
            "counters": {"skipped": self.skipped, "rollbacks": self.saving.recent_rollbacks},
            "data_counters": self._with_earlier_starts(self._sum(self._own_data_counts())),
            "losses": self.guard.history,
            "refused": self.guard.refused,
            "rollbacks": self.saving.rollbacks,
            "validation": self.validated if self.validated_step == step else None,
            "wandb_id": self.wandb_id,
            "lora": self.lora,
            "code": self._code,
        }

    def finish_saving(self) -> None:
        """Waits until the checkpoint under way is committed; a failure is logged, not raised. Collective."""
        self.watchdog.phase("checkpoint", self.position // self.config.data.global_batch)
        self.saving.finish()

    def roll_back(self, step: int) -> None:
        """Sets weights, moments and averages back to the last healthy checkpoint; the position goes on. Collective.

        Raises:
            NotFinite: that has been tried already, or there is nothing to go back to.
        """
        with self.phase("checkpoint", step):
            checkpoint = self.saving.roll_back(step, self.guard.refused, self._load)
        self.guard.roll_back(checkpoint.meta.get("losses", ()))

    # ------------------------------------------------------------------------------------- validation and sample grid

    def validate(self, step: int) -> dict[str, float]:
        """Validation loss of the raw and of the averaged weights. Collective."""
        assert self.validation is not None
        with self.phase("validation", step), self._stance("force_eager"):
            self.engine.module.eval()
            raw, _ = self.validation.measure(self.engine.module)
            self.engine.module.train()
            with self.engine.averaged(0) as module:
                averaged, losses = self.validation.measure(module)
        self.validated, self.validated_step = averaged, step
        if self.ranks.is_main:
            self.run.record_validation(step, losses)
        return {"validation_loss": raw, "validation_loss_ema": averaged, **by_noise_level(losses)}

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures on features of pictures that the averaged weights draw. Collective."""
        assert self.evaluation is not None
        with self.phase("evaluation", step), self._stance("force_eager"), self.engine.averaged(0) as module:
            return self.evaluation.measure(module, beat=lambda: self.watchdog.phase("evaluation", step))

    def sample_grid(self, step: int) -> None:
        """Draws the fixed prompts into samples/step-########.png. Collective."""
        with self.phase("samples", step), self._stance("force_eager"):
            if self._grid is None:
                prompts = self.config.train.sample_prompts
                open_loader = partial(self._open_loader, 0, rank=0, world_size=1)
                self._grid = choose(prompts, self.config.stage, open_loader, self.ranks)
            with self.engine.averaged(0) as module:
                pictures = draw(module, self._grid, self.text_encoder.encode, self.config, self.ranks)
            path = self.run.sample_file(step)
            title = f"{self.config.stage.name}, step {step}, guidance {self.config.stage.sampler.guidance:g}"
            if self.ranks.is_main and write_samples(pictures, self._grid, path, title):
                self.tracker.image(step, path)

    def close(self, exit_code: int) -> None:
        """Ends everything; with an error under way, the rank's own log says which."""
        if sys.exc_info()[0] is not None:
            log.log(SILENT, "ends with code %d", exit_code, exc_info=True)
        self.loader.close()
        self.saving.close(hurry=exit_code != 0)
        self.tracker.close(exit_code)
        stop_logging()
