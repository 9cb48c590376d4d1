"""The commands: what each one takes besides an experiment's sections, which module does it, and its line in the help.
Imports neither torch nor deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_pipeline.config import require
from training.config.experiment import Experiment


@dataclass
class SampleCommand(Experiment):
    """`cascade sample`: its own keys stand at the top level."""

    prompts: Any = None
    """A text file with one prompt per line, or a list; null: the experiment's."""
    negative_prompts: Any = None
    from_bundle: str | None = None
    """Bundle directory; null: bundle.dir."""
    output: str | None = None
    num_images: int = 1
    """Pictures per prompt."""
    guidance: Any = None
    """One number, or one per stage; null: the bundle's."""
    steps: Any = None
    """Sampling steps, one number or one per stage; null: the bundle's."""
    sampler: Any = None
    """`ddpm`, `ddim`, `heun` or `dpmpp_2m`, one or one per stage; null: the bundle's."""
    aug_level: Any = None
    """Noise put on the picture that super-resolution starts from, one number or one per stage; null: the bundle's."""
    stages: Any = None
    """How many of the first stages to draw, or names of stages; null: all."""
    low_res: Any = None
    """Picture file, or one per prompt, to start from when the first of `stages` is super-resolution."""
    image: Any = None
    """Picture file, or one per prompt, to redraw (by `strength`, or where `mask` is light)."""
    mask: Any = None
    strength: Any = 1.0
    """How much of `image` is redrawn, above 0 to 1: one number for the first stage drawn, or one per stage."""
    batch: int = 16
    explain: bool = False
    """Heat maps of which words drew which pixels."""


@dataclass
class OrderCommand(Experiment):
    """`cascade order`: what a run would read."""

    world_size: int = 1
    workers: int = 0
    position: int = 0
    batches: int = 1
    quality: bool = False
    """Also report, as a last line, how well the batches mix the data."""


@dataclass
class VerifyCommand(Experiment):
    """`cascade verify`: an experiment, and where its report goes."""

    report: bool = False
    """Also write one HTML page about the data."""
    output: str = "verify"
    """Directory for the quarantine file and the report."""


@dataclass
class LaunchCommand(Experiment):
    """`cascade launch`: which command to submit, and how."""

    verb: Any = "train"
    """Which command to submit; a list ["train stage=demo_base", "train stage=demo_sr", bundle] is submitted as a
    chain, each job after the success of the one before."""
    overrides: list[str] = field(default_factory=list)
    """More key=value words for the submitted command."""
    dry_run: bool = False
    """Print and write the script without submitting it."""
    script: str | None = None
    """Where the script is written; null: RUN_DIR/launch/."""
    separate: str = ""
    """Appended to run.dir; --multirun sets it, so that each job has its own."""


@dataclass
class PlanCommand(Experiment):
    """`cascade plan`: an experiment, and the hardware to plan it for."""

    doctor: bool = False
    """Also try the real thing: credentials, stores, weights, one batch, one step, one checkpoint there and back."""
    mfu: float = 0.4
    """Model FLOPs utilisation to assume."""
    gpu: str | None = None
    """h100, h200, a100, ... or cpu (measured now); null: h100, or cpu where cluster.gpus=false."""
    memory_gib: float = 0.0
    """Memory per GPU; 0: the data sheet's, or this machine's share per process."""
    price: float = 2.0
    """Dollars per GPU hour."""
    store_gb_s: float = 1.0
    """GB/s that one node writes to the checkpoint store."""

    def __post_init__(self) -> None:
        require(0 < self.mfu <= 1, f"mfu={self.mfu}: it must lie above 0 and at most at 1")
        require(self.store_gb_s > 0, f"store_gb_s={self.store_gb_s}: it must be positive")
        for name in ("price", "memory_gib"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: it must not be negative")


@dataclass
class CheckpointsCommand(Experiment):
    """`cascade checkpoints`: what to do with which checkpoints of a run."""

    action: str = "list"
    """`list`, `verify`, `diff` or `export`."""
    steps: list[int] = field(default_factory=list)
    """Which ones; empty: all (verify), the newest (export), the two newest (diff)."""
    output: str | None = None
    """`export`: the safetensors file to write."""
    average: int = 0
    """`export`: which of ema.decays; -1: the raw weights."""
    sigma_rel: float | None = None
    """`export`: the average of this relative width, made from the stored ones (ema.profile=power)."""

    def __post_init__(self) -> None:
        actions = ("list", "verify", "diff", "export")
        require(self.action in actions, f"action={self.action}: it must be {', '.join(actions)}")
        require(self.action != "export" or bool(self.output), "output: action=export needs the file to write")
        require(
            self.sigma_rel is None or 0 < self.sigma_rel < 0.288,
            f"sigma_rel={self.sigma_rel}: it must lie between 0 and 0.288",
        )


@dataclass
class EmbedCommand(Experiment):
    """`cascade embed`: where the embeddings go, and which share of the shards this process does."""

    output: str | None = None
    """Directory or s3:// prefix of the sidecars; null: beside the shards. Training reads them by data.embeddings."""
    part: int = 0
    parts: int = 1
    """This process does the shards whose number is `part` modulo `parts`; tasks of a Slurm array share by
    themselves."""
    dtype: str = "bf16"
    """`bf16` or `int8` (half the size)."""
    batch: int = 64
    """Captions encoded together."""

    def __post_init__(self) -> None:
        require(self.dtype in ("bf16", "int8"), f"dtype={self.dtype}: it must be bf16 or int8")
        require(self.batch >= 1, f"batch={self.batch}: it must be at least 1")
        require(0 <= self.part < self.parts, f"part={self.part}: it must lie between 0 and parts={self.parts} less 1")


COMMANDS: dict[str, tuple[type[Experiment], str, str]] = {
    "prepare": (Experiment, "data_pipeline.commands.prepare", "draw, import or repack data into WebDataset shards"),
    "index": (Experiment, "data_pipeline.commands.index", "walk shards once and write their index"),
    "verify": (
        VerifyCommand,
        "data_pipeline.commands.verify",
        "read and decode every sample as training would; report what is broken",
    ),
    "order": (OrderCommand, "data_pipeline.commands.order", "show which samples a run would read, batch by batch"),
    "embed": (
        EmbedCommand,
        "training.commands.embed",
        "compute the text embeddings of all captions once, beside the shards",
    ),
    "train": (Experiment, "training.train", "train one stage; the same command again resumes"),
    "bundle": (Experiment, "training.cascade.bundle", "collect the stages' averaged weights into one directory"),
    "sample": (SampleCommand, "training.commands.sample", "draw pictures from a bundle"),
    "evaluate": (Experiment, "training.commands.evaluate", "measure a bundle on held-out captions"),
    "checkpoints": (
        CheckpointsCommand,
        "training.commands.checkpoints",
        "list, verify, compare and export checkpoints",
    ),
    "plan": (PlanCommand, "training.plan.plan", "memory, time and cost before an allocation is spent"),
    "launch": (LaunchCommand, "slurm.launch", "write and submit the Slurm script of a command"),
}
"""Verb -> (its config class, the module whose `main(config)` does it, one line for the help)."""
