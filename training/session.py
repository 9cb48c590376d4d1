"""Everything a training run works with, put together once: data, text encoder, U-Net, engine, checkpoints, tracking.

train.py holds the loop; this file holds what the loop calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from data_pipeline.embeddings import pad
from data_pipeline.loader import Batch, Loader
from training.checkpoint import Checkpoint, CheckpointStore, step_name
from training.config import Experiment
from training.diffusion.objective import loss
from training.diffusion.sampler import sample_stage
from training.distributed import Ranks, all_gather, thread_count, together
from training.ema import state_name
from training.embed import identity
from training.engine import build_engine
from training.model.presets import for_stage
from training.model.text_encoder import build_text_encoder
from training.model.unet import UNet
from training.optimizers import STATES, skip_compiler
from training.run_dir import RunDir, check_same_run, code_version, to_dict
from training.tracking import Tracker, finite, start_logging
from training.writer import CheckpointWriter

log = logging.getLogger("cascade")


class Session:
    """One start of a run. `step` and `position` are where it begins."""

    def __init__(self, config: Experiment, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self._config = to_dict(config)
        self._code = code_version() if ranks.is_main else {}
        self.run = RunDir(config)
        together(self.run.create, ranks)
        start_logging(self.run, ranks)
        self.store = CheckpointStore(self.run.checkpoints)
        checkpoint = self.store.newest(ranks)
        if checkpoint is not None:
            together(lambda: self._say_changes(checkpoint), ranks)
        meta = checkpoint.meta if checkpoint else {}
        self.step: int = checkpoint.step if checkpoint else 0
        self.position: int = meta.get("position", 0)
        self.counters: dict[str, int] = {"skipped": 0, **meta.get("counters", {})}
        self.seconds: float = meta.get("seconds", 0.0)
        self.wandb_id: str = meta.get("wandb_id") or together(self.run.wandb_id, ranks)

        self.loader = self._open_loader(self.position)
        if checkpoint is not None:
            self.loader.check_state(meta["data"])
        if self.loader.embeddings is not None:
            self.loader.embeddings.check(identity(config.text))
        self.text_encoder = build_text_encoder(config.text, ranks.device)
        self.engine = build_engine(self._build_model(), config, ranks, self.accumulate)
        if checkpoint is not None:
            self._load(checkpoint)
        self.store.claim(ranks)
        self.writer = CheckpointWriter(self.store, config.checkpoint, ranks)
        self.writer.last_step = self.step if checkpoint else -1
        together(self._record_start, ranks)
        self.tracker = Tracker(self.run, config, ranks, self.step, self.wandb_id)
        self._clock = time.monotonic()
        self._waited = 0.0
        self._logged = (self.step, self._clock)
        self._grid: tuple[Any, ...] | None = None

    # ------------------------------------------------------------------------------------------ putting together

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        share = self.config.data.global_batch // self.ranks.world_size
        return share // (self.config.data.micro_batch or share)

    def _say_changes(self, checkpoint: Checkpoint) -> None:
        changes = check_same_run(checkpoint.meta["config"], self._config, str(checkpoint.folder))
        log.info("resuming from step %d (%s)", checkpoint.step, checkpoint.folder)
        for change in changes:
            log.info("changed since: %s", change)

    def _record_start(self) -> None:
        if self.step == 0:
            log.info("starting a new run in %s", self.run.path)
        self.run.write_config(self.config)
        self.run.record_start(self._code, self.step, self.store.attempt, self.ranks.world_size)

    def _open_loader(self, position: int, rank: int | None = None, world_size: int | None = None) -> Loader:
        stage = self.config.stage
        return Loader(
            self.config.data,
            image_size=stage.image_size,
            low_res_size=stage.low_res_size,
            crop_size=stage.crop_size,
            seed=self.config.seed,
            rank=self.ranks.rank if rank is None else rank,
            world_size=self.ranks.world_size if world_size is None else world_size,
            position=position,
            quarantine=str(self.run.path / "logs" / f"quarantine-{self.ranks.rank}.jsonl"),
        )

    def _build_model(self) -> UNet:
        torch.set_num_threads(thread_count(self.config.cluster))
        torch.manual_seed(self.config.seed)
        model = UNet(for_stage(self.config.stage, self.text_encoder.dim))
        if self.config.precision.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.config.precision.compile:
            model.compile_blocks()
        else:
            skip_compiler()
        return model

    def _load(self, checkpoint: Checkpoint) -> None:
        kinds = {kind: kind for kind in STATES[self.config.optimizer.name]}
        saved = list(checkpoint.meta["config"]["ema"]["decays"])
        for index, decay in enumerate(self.config.ema.decays):
            known = decay in saved and bool(checkpoint.names(f"{state_name(saved.index(decay))}/"))
            kinds[state_name(index)] = state_name(saved.index(decay)) if known else "param"
            if not known and self.ranks.is_main:
                log.info(
                    "ema.decays: %s is not in the checkpoint; this average starts from the weights of step %d",
                    decay,
                    self.step,
                )
        self.engine.import_tensors(checkpoint.read, kinds, checkpoint.meta["updates"])

    # ---------------------------------------------------------------------------------------- what the loop calls

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss of one micro-batch."""
        config, device = self.config, self.ranks.device
        text, mask = self._text(batch)
        low_res = None if batch.low_res is None else batch.low_res.to(device, non_blocking=True)
        mean, _ = loss(
            self.engine,
            batch.images.to(device, non_blocking=True),
            text.to(device),
            mask.to(device),
            config=config.stage.diffusion,
            seed=config.seed,
            positions=batch.positions,
            low_res=low_res,
            image_size=config.stage.image_size,
            global_batch=config.data.global_batch,
        )
        return mean

    def _text(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, T, D) and mask (B, T) of the captions: precomputed ones, else encoded now."""
        if batch.embeddings is None:
            return self.text_encoder.encode(batch.captions)
        text, mask = pad(batch.embeddings, self.text_encoder.max_tokens)
        return torch.from_numpy(text), torch.from_numpy(mask)

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Metrics after `step` steps."""
        now = time.monotonic()
        last_step, last_time = self._logged
        seconds = max(now - last_time, 1e-9)
        rate = (step - last_step) / seconds
        record = {
            "position": self.position,
            **record,
            "images_per_second": rate * self.config.data.global_batch,
            "data_wait": self._waited / seconds,
            "skipped": self.counters["skipped"],
            "seconds": self.seconds + now - self._clock,
        }
        self.tracker.log(step, record, (self.config.train.steps - step) / rate)
        self._logged, self._waited = (step, now), 0.0

    def report_skip(self, step: int, loss: float, batches: list[Batch]) -> None:
        """Names the samples of a step that was not applied, in the log of the rank that had them."""
        if self.ranks.is_main:
            log.warning("step %d was skipped: its gradient is not finite (loss %s); weights are as before", step, loss)
        keys = [key for batch in batches for key in batch.keys]
        logging.getLogger("cascade.skipped").warning("step %d: samples of this rank: %s", step, " ".join(keys))

    def summary(self, loss: float) -> dict[str, Any]:
        """What `cascade train` answers."""
        return {
            "step": self.config.train.steps,
            "position": self.position,
            "loss": finite(loss),
            "skipped": self.counters["skipped"],
            "seconds": round(self.seconds + time.monotonic() - self._clock, 3),
            "run_dir": str(self.run.path),
            "checkpoint": str(self.store.folder.sub(step_name(self.writer.last_step))),
            "complete": True,
        }

    def save(self, step: int, wait: bool = False) -> None:
        """Begins to write the checkpoint of `step`; the previous one is finished first. Collective."""
        self.finish_saving()
        if step != self.writer.last_step:
            meta = {
                "step": step,
                "position": self.position,
                "updates": self.engine.updates,
                "adam_step": self.engine.updates,
                "ema_updates": self.engine.updates,
                "config": self._config,
                "data": self.loader.state(),
                "counters": {**self.loader.counters, **self.counters},
                "seconds": self.seconds + time.monotonic() - self._clock,
                "wandb_id": self.wandb_id,
                "code": self._code,
            }
            self.writer.start(step, self.engine.snapshot(), meta)
        if wait:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Waits until the checkpoint under way is committed; a failure is said and survived."""
        error = self.writer.wait()
        if error is not None and self.ranks.is_main:
            log.warning("%s", error)

    # ------------------------------------------------------------------------------------------------- sample grid

    def sample_grid(self, step: int) -> None:
        """Draws fixed prompts with fixed seeds from the averaged weights into samples/step-########.png. Collective:
        the ranks share the pictures, in equal numbers, because ZeRO 3 wants them all to call the module equally
        often."""
        self.finish_saving()
        if self._grid is None:
            self._grid = together(self._grid_inputs, self.ranks)
        captions, low_res = self._grid
        each = -(-len(captions) // self.ranks.world_size)
        mine = [min(self.ranks.rank * each + i, len(captions) - 1) for i in range(each)]
        text, mask = self.text_encoder.encode([captions[i] for i in mine])
        stage = self.config.stage
        with self.engine.averaged(0) as module, torch.no_grad():
            pictures = sample_stage(
                module,
                text.to(self.ranks.device),
                mask.to(self.ranks.device),
                config=stage.diffusion,
                sampler=stage.sampler,
                image_size=stage.image_size,
                seeds=mine,
                low_res=None if low_res is None else low_res[mine].to(self.ranks.device),
            )
        drawn = ((pictures.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        parts = all_gather(drawn, self.ranks)
        if self.ranks.is_main:
            path = self.run.sample_file(step)
            save_grid(torch.cat(parts)[: len(captions)], path)
            self.tracker.image(step, path)

    def _grid_inputs(self) -> tuple[list[str], torch.Tensor | None]:
        """Captions (and true low-res pictures): the configured prompts, else the first captions of the data."""
        prompts = list(self.config.train.sample_prompts)
        if prompts and not self.config.stage.is_super_resolution:
            return prompts, None
        loader = self._open_loader(0, rank=0, world_size=1)
        try:
            batch = next(loader)[0]
        finally:
            loader.close()
        count = min(8, len(batch.captions))
        low_res = None if batch.low_res is None else batch.low_res[:count]
        return list(batch.captions[:count]), low_res

    def close(self, exit_code: int) -> None:
        self.loader.close()
        self.tracker.close(exit_code)


def save_grid(pictures: torch.Tensor, path: Any, columns: int = 8) -> None:
    """uint8 (B, 3, H, W) side by side in a PNG, `columns` per row."""
    count, _, height, width = pictures.shape
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(tile, (i % columns * width, i // columns * height))
    sheet.save(path)
