"""Everything a training run works with, put together once: data, text encoder, U-Net, engine, checkpoints, tracking.

train.py holds the loop; this file holds what the loop calls.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from data_pipeline.common.errors import CascadeError
from data_pipeline.reading.loader import Batch, Loader
from data_pipeline.shards.embeddings import pad
from training.checkpoint.downloads import Share, shared_downloads
from training.checkpoint.provenance import code_version
from training.checkpoint.store import Checkpoint, CheckpointStore, step_name
from training.checkpoint.writer import CheckpointWriter
from training.config.experiment import Experiment
from training.config.unet import UNetConfig, for_stage
from training.diffusion import random
from training.diffusion.objective import loss
from training.engine.deepspeed import build_engine
from training.model.unet import UNet
from training.optim.averages import state_name
from training.optim.registry import skip_compiler, states_to_load
from training.plan.checks import check_heldout
from training.plan.fits import check_memory, remarks
from training.plan.flops import flops_and_peak
from training.processes.distributed import Ranks, all_gather, all_sum, each, thread_count, together
from training.processes.endings import LossGuard, NotFinite, Signals
from training.run.directory import RunDir, check_same_run, to_dict
from training.run.metering import Hours, Meter, TimeLeft
from training.run.quick_evaluation import QuickEvaluation
from training.run.sample_grid import Inputs, choose, draw, write
from training.run.starting_weights import begin_with
from training.run.tracking import SILENT, Tracker, finite, start_logging, stop_logging
from training.run.validation import Validation
from training.run.watchdog import Watchdog
from training.text.encoder import build_text_encoder
from training.text.identity import identity, pinned

log = logging.getLogger("cascade")

MARGIN_S = 60.0
"""The watchdog waits so much longer than the process groups, whose time-outs say more about what happened."""


class Session:
    """One start of a run. `step` and `position` are where it begins."""

    def __init__(self, config: Experiment, ranks: Ranks) -> None:
        config = replace(config, text=each(lambda: pinned(config.text), ranks))
        self.config, self.ranks = config, ranks
        self._config = to_dict(config)
        self._code = code_version() if ranks.is_main else {}
        self.run = RunDir(config)
        together(self.run.create, ranks)
        start_logging(self.run, ranks)
        train = config.train
        limits = train.stall_s, train.timeout_s + MARGIN_S, train.timeout_first_s + MARGIN_S
        self.watchdog = Watchdog(ranks, self.run.log_file(ranks.rank), *limits)
        self.store = CheckpointStore(self.run.checkpoints)
        downloads = ExitStack()
        share = downloads.enter_context(self._downloads(train.init_from))
        checkpoint = self.store.resume(ranks, self._check_checkpoint, share)
        meta = checkpoint.meta if checkpoint else {}
        self.step: int = checkpoint.step if checkpoint else 0
        self.position: int = meta.get("position", 0)
        self.counters: dict[str, int] = {"skipped": 0, "rollbacks": 0, **meta.get("counters", {})}
        self._data_counters: dict[str, int] = meta.get("data_counters", {})
        self.guard = LossGuard(train.spike_factor, meta.get("losses", ()))
        self.wandb_id: str = together(lambda: self.run.wandb_id(meta.get("wandb_id")), ranks)

        own = config.data.own_process
        each(lambda: check_memory(config, ranks), ranks)
        for remark in remarks(config, ranks.device) if ranks.is_main else ():
            log.warning("%s", remark)
        self.loader = each(lambda: self._open_loader(self.position, own_process=own), ranks)
        if checkpoint is not None:
            self.loader.check_state(meta["data"])
        if self.loader.embeddings is not None:
            self.loader.embeddings.check(identity(config.text))
        self.text_encoder = each(lambda: build_text_encoder(config.text, ranks.device), ranks)
        self.validation: Validation | None = None
        if config.validation.every:
            self.validation = each(self._open_validation, ranks)
        self.evaluation: QuickEvaluation | None = None
        if config.evaluation.every:
            encode = self.text_encoder.encode
            self.evaluation = each(lambda: QuickEvaluation(config, ranks, encode), ranks)
        unet = for_stage(config.stage, self.text_encoder.dim)
        self.lora: dict[str, Any] | None = meta.get("lora")
        model = each(lambda: self._build_model(unet, fresh=checkpoint is None), ranks)
        self.engine = build_engine(model, config, ranks, self.accumulate)
        self.ema_since = [0 for _ in config.ema.decays]
        """Updates after which each average began."""
        if checkpoint is not None:
            self._load(checkpoint)
        downloads.close()
        self.writer = CheckpointWriter(self.store, config.checkpoint, ranks, self.run.record_saved)
        self.writer.last_step = self._announced = self.step if checkpoint else -1
        together(self._record_start, ranks)
        self.tracker = Tracker(self.run, config, ranks, self.step, self.wandb_id, self._code)
        hours = self.run.path / "hours.json"
        self.hours = Hours(hours, self.store.attempt, ranks.world_size) if ranks.is_main else None
        size, tokens = config.stage.train_size, self.text_encoder.max_tokens
        work = flops_and_peak(unet, size, tokens, ranks.device, train.peak_tflops, frozen=bool(self.lora))
        self.meter = Meter(ranks, config.data.global_batch, *work)
        self.validated, self.validated_step = math.inf, -1
        self._left = TimeLeft(train.steps)
        self._grid: Inputs | None = None
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

    def _downloads(self, also: str | None = None) -> AbstractContextManager[Share | None]:
        """While checkpoints (and `also`) are read: what comes from an object store is fetched once per machine."""
        remote = "://" in self.run.checkpoints or "://" in (also or "")
        return shared_downloads(self.ranks) if remote else nullcontext()

    def _record_start(self) -> None:
        if self.step == 0:
            log.info("starting a new run in %s", self.run.path)
        self.run.write_config(self.config)
        self.run.record_start(self._code, self.step, self.store.attempt, self.ranks.world_size)

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
        torch.set_num_threads(thread_count(self.config.cluster))
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
        all_gather(None, self.ranks)
        self.meter.start(self.step)

    def next_batch(self, healthy: bool) -> list[Batch]:
        """The micro-batches of the next step. What goes wrong on one rank is raised on all of them, after the state
        before this step has been saved (`healthy`: that step was applied)."""
        batches, error = None, None
        try:
            batches = next(self.loader)
        except (CascadeError, OSError) as caught:
            error = caught
        step, counts = self.position // self.config.data.global_batch, self.loader.counters
        self.watchdog.phase("wait for data", step)
        with self.meter.phase("wait"):
            own = [float(error is not None), counts["samples"], counts["bad"]]
            failed, seen, bad = all_sum(own, self.ranks)
        if not failed and self.ranks.world_size > 1 and self.loader.too_many(int(seen), int(bad)):
            shards = all_gather(self.loader.bad_shards, self.ranks)
            failed, error = 1.0, self.loader.too_many_error(int(seen), int(bad), shards)
        if failed:
            self.save(step, healthy, wait=True)
            raise next(e for e in all_gather(error, self.ranks) if e is not None)
        assert batches is not None
        self.position += self.config.data.global_batch
        return batches

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
        self.meter.losses(each_sample["t"], each_sample["loss"])
        return mean

    def agree(self, share: float, received: int) -> tuple[float, int]:
        """What all ranks must know before they decide: the loss of the global batch, and a signal that any of them
        received."""
        total, *asked = all_sum([share, *(float(received == n) for n in Signals.HANDLED)], self.ranks)
        number = next((n for n, count in zip(Signals.HANDLED, asked, strict=True) if count), 0)
        return total / self.ranks.world_size, number

    def _text(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, T, D) and mask (B, T) of the captions: precomputed ones, else encoded now."""
        if batch.embeddings is None:
            return self.text_encoder.encode(batch.captions)
        text, mask = pad(batch.embeddings, self.text_encoder.max_tokens)
        return torch.from_numpy(text), torch.from_numpy(mask)

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Metrics after `step` steps. Collective."""
        if all_sum([float(self.writer.busy)], self.ranks)[0] == 0:
            self.finish_saving()  # a failed one is not left unsaid until the next is due
        measured = self.meter.record(step)
        if self.hours is not None:
            record = {**record, "device_hours": self.hours.total()}
        bad = {name: count for name, count in self._all_data_counters().items() if name.startswith("bad")}
        record = {
            "position": self.position,
            **record,
            **measured,
            "param_norm": self.engine.norm(),
            **self.counters,
            "bad": 0,
            **bad,
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

    def _all_data_counters(self) -> dict[str, int]:
        """Counts of the data over all ranks and all starts. Collective."""
        total = Counter(self._data_counters)
        for counters in all_gather(self.loader.counters, self.ranks):
            total.update(counters)
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
            **self.counters,
            "device_hours": self.hours.total() if self.hours is not None else None,
            "run_dir": str(self.run.path),
            "checkpoint": str(self.store.folder.sub(step_name(self.writer.last_step))),
            "complete": True,
        }

    # ------------------------------------------------------------------------------------- checkpoints and rolling back

    def save(self, step: int, healthy: bool = True, wait: bool = False) -> None:
        """Begins to write the checkpoint of `step`; the previous one is finished first. Collective."""
        with self.phase("checkpoint", step):
            self.finish_saving()
            if step != self.writer.last_step:
                if healthy:
                    self.counters["rollbacks"] = 0
                meta = {
                    "step": step,
                    "position": self.position,
                    "updates": self.engine.updates,
                    "adam_step": self.engine.updates,
                    "ema_updates": self.engine.updates,
                    "ema_since": self.ema_since,
                    "config": self._config,
                    "data": {**self.loader.state(), "position": self.position},
                    "counters": dict(self.counters),  # it is written later, in the background
                    "data_counters": self._all_data_counters(),
                    "losses": self.guard.history,
                    "healthy": healthy,
                    "validation": self.validated if self.validated_step == step else None,
                    "wandb_id": self.wandb_id,
                    "lora": self.lora,
                    "code": self._code,
                }
                self.writer.start(step, self.engine.snapshot(), meta)
            if wait:
                self.finish_saving()

    def finish_saving(self) -> None:
        """Waits until the checkpoint under way is committed; a failure is said and survived."""
        self.watchdog.phase("checkpoint", self.position // self.config.data.global_batch)
        error = self.writer.wait()
        if error is not None and self.ranks.is_main:
            log.warning("%s", error)
        if self.writer.last_step > self._announced:  # W&B looks at the files, so they must be there
            self._announced = self.writer.last_step
            self.tracker.checkpoint(self._announced, self.store.folder.sub(step_name(self._announced)))

    def roll_back(self, step: int, skipped: int) -> None:
        """Sets weights, moments and averages back to the last healthy checkpoint; the position goes on. Collective.

        Raises:
            NotFinite: that has been tried already, or there is nothing to go back to.
        """
        with self.phase("checkpoint", step), self._downloads() as share:
            self.finish_saving()
            checkpoint = self.store.newest(self.ranks, wanted=lambda meta: meta.get("healthy", True), share=share)
            trouble = f"step {step}: the last {skipped} steps could not be applied (train.max_skipped)"
            advice = f"the skipped samples are named in {self.run.path}/logs; lower optimizer.lr, or drop bad shards"
            if checkpoint is None:
                raise NotFinite(f"{trouble}, and there is no checkpoint to go back to; {advice}")
            if self.counters["rollbacks"] >= self.config.train.max_rollbacks:
                raise NotFinite(
                    f"{trouble}, also after going back to the checkpoint of step {checkpoint.step} "
                    f"(train.max_rollbacks); {advice}"
                )
            self.counters["rollbacks"] += 1
            self._load(checkpoint)
        self.guard.history = list(checkpoint.meta.get("losses", ()))
        if self.ranks.is_main:
            log.warning(
                "%s: the weights are set back to the checkpoint of step %d; training goes on with step %d, past the "
                "data in between",
                trouble, checkpoint.step, step + 1,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------- validation and sample grid

    def validate(self, step: int) -> dict[str, float]:
        """Validation loss of the raw and of the averaged weights. Collective."""
        assert self.validation is not None
        with self.phase("validation", step), self._stance("force_eager"):
            self.engine.module.eval()
            raw = self.validation.measure(self.engine.module)
            self.engine.module.train()
            with self.engine.averaged(0) as module:
                averaged = self.validation.measure(module)
        self.validated, self.validated_step = averaged, step
        return {"validation_loss": raw, "validation_loss_ema": averaged}

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
                self._grid = together(lambda: choose(prompts, self.config.stage, open_loader), self.ranks)
            with self.engine.averaged(0) as module:
                pictures = draw(module, self._grid, self.text_encoder.encode, self.config, self.ranks)
            path = self.run.sample_file(step)
            title = f"{self.config.stage.name}, step {step}, guidance {self.config.stage.sampler.guidance:g}"
            if self.ranks.is_main and write(pictures, self._grid, path, title):
                self.tracker.image(step, path)

    def close(self, exit_code: int) -> None:
        """Ends everything; with an error under way, the rank's own log says which."""
        if sys.exc_info()[0] is not None:
            log.log(SILENT, "ends with code %d", exit_code, exc_info=True)
        self.watchdog.close()
        self.loader.close()
        self.writer.close(hurry=exit_code != 0)
        self.tracker.close(exit_code)
        stop_logging()
