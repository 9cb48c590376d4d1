"""`cascade plan doctor=true`: tries everything that a training will need, once, on the machine where it is run.

The training is real: `cascade train` runs one step in a scratch directory inside the run's directory, and then resumes
from its checkpoint for a second step. The scratch directories are removed afterwards.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import CascadeError, ConfigError, UserError
from data_pipeline.storage import store
from data_pipeline.storage.folder import open_folder
from training.config.commands import PlanCommand
from training.config.experiment import Experiment, ValidationConfig
from training.plan.checks import check_heldout, planned_world_size, training_problems
from training.plan.table import counted
from training.processes.launcher import launch
from training.processes.ranks import process_count

PROBE_BYTES = 1 << 20
MOST_PER_RANK = 64
"""Maximum pictures per process and step, if data.micro_batch is not set."""
CPU_PARAMETERS = 200e6
"""Number of parameters above which a network for GPUs is not tried on a CPU."""


def examine(config: PlanCommand) -> dict[str, Any]:
    """Run all checks, print a line for each, and return their results.

    Raises:
        UserError: some checks failed; raised after all were tried.
    """
    found: list[dict[str, Any]] = []
    with ExitStack() as scratch:
        trial = Trial(config, scratch)
        checks: dict[str, Callable[[], str]] = {
            "settings": lambda: settings(config),
            "software": lambda: software(config),
            "credentials": lambda: credentials(config),
            "weights": lambda: weights(config),
            "checkpoint store": lambda: checkpoint_store(config),
            "batch": lambda: batch(config),
            "step": trial.step,
            "checkpoint round trip": trial.round_trip,
        }
        for name, check in checks.items():
            began = time.monotonic()
            try:
                detail, good = check(), True
            except (CascadeError, OSError) as error:
                detail, good = str(error), False
            except SystemExit as ended:  # a training process failed and has printed the reason
                detail, good = f"ended with code {ended.code}; see its output above", False
            found.append({"name": name, "ok": good, "detail": detail, "seconds": round(time.monotonic() - began, 3)})
            print(f"doctor: {'ok  ' if good else 'FAIL'}  {name}: {detail}", flush=True)
    failed = [check["name"] for check in found if not check["ok"]]
    if failed:
        if config.json:
            print(json.dumps({"doctor": {"ok": False, "checks": found}}), flush=True)
        raise UserError(
            f"doctor: {len(failed)} of {len(found)} checks failed: {', '.join(failed)}; see the lines above"
        )
    return {"ok": True, "checks": found}


# ------------------------------------------------------------------------------------------------------ checks


def settings(config: PlanCommand) -> str:
    """Check the settings as `cascade train` would, before the other checks use smaller ones. Raises ConfigError."""
    world_size = planned_world_size(config.cluster)
    problems = training_problems(config, world_size)
    if problems:
        raise ConfigError("; ".join(problems))
    return f"cascade train accepts them on {counted(world_size, 'process')}"


def software(config: PlanCommand) -> str:
    """Report versions and visible devices. Raises UserError if there are fewer GPUs than processes."""
    import torch

    packages = ("torch", "deepspeed", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    count = torch.cuda.device_count()
    if not count:
        return f"python {platform.python_version()}, {versions}; no GPU is visible here"
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    devices = f"{count} x {name} with {memory / 2**30:.0f} GiB"
    if config.cluster.processes > count:
        raise UserError(f"cluster.processes={config.cluster.processes}, but this machine has {devices}")
    return f"python {platform.python_version()}, {versions}; {devices}"


def credentials(config: PlanCommand) -> str:
    """Check that the data and the checkpoint store can be listed, and that there is a W&B key if it is needed."""
    from data_pipeline.shards.dataset import patience_of
    from data_pipeline.shards.mixture import entries_of

    patience = patience_of(config.data)
    entries = [entry for _, entry, _ in entries_of(config.data)]
    heldout = check_heldout(config, [entry.url for entry in entries])
    where = checkpoint_place(config)
    store.list_dir(where, patience)
    held = f", {len(heldout):,} held-out ones" if heldout else ""
    found = f"{len(entries):,} shards ({sum(e.size for e in entries) / 1e9:,.2f} GB){held} and {where} can be listed"
    if config.wandb.mode != "online":
        return found
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not os.environ.get("WANDB_API_KEY") and not (netrc.exists() and "wandb" in netrc.read_text()):
        raise UserError("wandb.mode=online: there is no WANDB_API_KEY; run `wandb login`, or use tracking=offline")
    return f"{found}; W&B has a key"


def weights(config: PlanCommand) -> str:
    """Check that the text encoder loads and encodes; report the SHA-256 of its weight files."""
    from training.text.encoder import build_text_encoder

    encoder = build_text_encoder(config.text)
    text, mask = encoder.encode(["a small red circle"])
    found = f"{encoder.name}: {int(mask.sum())} tokens of {text.shape[-1]}"
    for file in weight_files(config):
        with open(file, "rb") as content:
            found += f"; {file.name} sha256 {file_digest(content, 'sha256').hexdigest()}"
    return found


def weight_files(config: PlanCommand) -> list[Path]:
    """Return the weight files of the text encoder, in its directory or in the Hugging Face cache."""
    if config.text.kind == "words":
        return []
    from transformers.utils import cached_file

    folder = Path(str(cached_file(str(config.text.path), "config.json", local_files_only=True))).parent
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def checkpoint_store(config: PlanCommand) -> str:
    """Write, read back and remove a file of random bytes where the checkpoints will be."""
    where = checkpoint_place(config)
    with scratch_in(where) as path:
        folder, content = open_folder(path), os.urandom(PROBE_BYTES)
        began = time.monotonic()
        folder.write("probe", [content])
        if folder.read("probe") != content:
            raise UserError(f"{where}: the data read back differs from the data written")
        seconds = time.monotonic() - began
    return f"{where}: {PROBE_BYTES / 2**20:.0f} MiB written and read back in {seconds:.2f} s, and removed"


def batch(config: PlanCommand) -> str:
    """Read and decode one batch."""
    from data_pipeline.reading.loader import Loader

    stage = config.stage
    loader = Loader(
        small(config).data,
        image_size=stage.image_size,
        low_res_size=stage.low_res_size,
        crop_size=stage.crop_size,
        seed=config.seed,
        rank=0,
        world_size=1,
    )
    try:
        began = time.monotonic()
        first = next(loader)[0]
        seconds = time.monotonic() - began
    finally:
        loader.close()
    return f"{len(first.keys)} pictures in {seconds:.2f} s; the first: {first.keys[0]} {first.captions[0][:60]!r}"


class Trial:
    """`cascade train` in a scratch directory: one step with a checkpoint, then a second start that resumes from it."""

    def __init__(self, config: PlanCommand, scratch: ExitStack) -> None:
        self.config = config
        self.run = scratch.enter_context(scratch_in(config.run.dir))
        self.checkpoints = f"{self.run}/checkpoints"
        if config.checkpoint.dir:
            self.checkpoints = scratch.enter_context(scratch_in(config.checkpoint.dir))
        self.done = 0

    def step(self) -> str:
        """Run one training step on this machine's processes, with a checkpoint."""
        self._refuse_giants()
        line, seconds = self._train(1)
        return f"{self._where()}, loss {line['loss']:.4f}, {seconds:.1f} s with start and checkpoint"

    def round_trip(self) -> str:
        """Resume from the checkpoint of the first start, and run a second step."""
        if not self.done:
            raise UserError("there is no checkpoint to resume from, because the step failed")
        size = sum(store.size(url) for url in self._files())
        line, seconds = self._train(2)
        lines = [json.loads(text) for text in (Path(self.run) / "metrics.jsonl").read_text().splitlines()]
        if [line["step"] for line in lines] != [1, 2]:
            raise UserError(f"the second start did not resume: it logged steps {[line['step'] for line in lines]}")
        return f"{size / 1e6:,.1f} MB written, verified, loaded; step 2 has loss {line['loss']:.4f}, {seconds:.1f} s"

    def _train(self, steps: int) -> tuple[dict[str, Any], float]:
        part, config = small(self.config), self.config
        trial = replace(
            part,
            run=replace(config.run, dir=self.run),
            train=replace(config.train, steps=steps, log_every=1, sample_every=0),
            validation=self._validation(part.cluster.processes),
            checkpoint=replace(config.checkpoint, dir=self.checkpoints, every=1),
            wandb=replace(config.wandb, mode="disabled"),
        )
        began = time.monotonic()
        result = launch("training.train", trial)
        if result["step"] != steps:
            raise UserError(f"the training ended at step {result['step']}, not {steps}")
        self.done = steps
        last = (Path(self.run) / "metrics.jsonl").read_text().splitlines()[-1]
        return json.loads(last), time.monotonic() - began

    def _validation(self, processes: int) -> ValidationConfig:
        """Return the run's validation settings, reduced to one batch of its pictures."""
        settings = self.config.validation
        return replace(settings, every=min(settings.every, 1), samples=min(settings.samples, MOST_PER_RANK) * processes)

    def _files(self) -> list[str]:
        place = store.join(self.checkpoints, "step-00000001")
        return [store.join(place, name) for name in store.list_dir(place)]

    def _where(self) -> str:
        part = small(self.config)
        return f"{counted(part.cluster.processes, 'process')}, batch {part.data.global_batch}"

    def _refuse_giants(self) -> None:
        import torch

        from training.plan.memory import parameter_count

        count = parameter_count(self.config.stage, self.config.text.dim)
        if self.config.cluster.gpus and not torch.cuda.is_available() and count > CPU_PARAMETERS:
            raise UserError(
                f"{count / 1e6:,.0f} M parameters are not tested without a GPU: run the doctor inside an allocation, "
                f"for example srun --gpus=1 cascade plan doctor=true ..."
            )


# ------------------------------------------------------------------------------------------------------- parts


def small(config: PlanCommand) -> Experiment:
    """Return the experiment with one micro-batch per process on this machine, for `cascade train`."""
    processes = local_processes(config)
    micro_batch = config.data.micro_batch or max(1, min(MOST_PER_RANK, config.data.share_of(processes)))
    names = {name: getattr(config, name) for name in Experiment.__dataclass_fields__}
    everything = [{**asdict(one), "start": 0, "end": None, "weight": 1.0} for one in config.data.datasets()]
    shards = everything or config.data.shards  # each data set of a mixture is tried
    data = replace(config.data, shards=shards, global_batch=micro_batch * processes, micro_batch=0, lanes=0)
    cluster = replace(config.cluster, kind="local", nodes=1, processes=processes)
    return Experiment(**{**names, "data": data, "cluster": cluster, "json": False})


def local_processes(config: PlanCommand) -> int:
    """Return the number of processes to try: at most one per GPU, or two without GPUs, and at most as many as planned;
    one with zero.stage=0."""
    import torch

    most = torch.cuda.device_count() or 2
    return 1 if config.zero.stage == 0 else min(process_count(config.cluster), most)


def checkpoint_place(config: Experiment) -> str:
    """Return where the checkpoints of the run will be."""
    return config.checkpoint.dir or str(Path(config.run.dir) / "checkpoints")


@contextmanager
def scratch_in(place: str) -> Iterator[str]:
    """Yield a path for a scratch directory inside `place` (or its nearest existing parent), and remove it at the end. A
    directory elsewhere could be on another disk or bucket, or have other permissions."""
    home = place.rstrip("/")
    while "://" not in home and not os.path.lexists(home):
        home = os.path.dirname(home) or "."
    path = f"{home}/.doctor-{uuid.uuid4().hex[:8]}"
    try:
        yield path
    finally:
        try:
            store.remove(path)
        except (CascadeError, OSError) as error:
            print(f"doctor: {path} was not deleted ({error})", flush=True)
