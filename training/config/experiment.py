"""Every setting of an experiment, as typed dataclasses that refuse invalid values. Imports neither torch nor deepspeed.
The keys of individual commands, and the table of commands, are in commands.py.

Hydra composes the values from `conf/*.yaml`; these classes decide what is valid. OmegaConf's structured configs refuse
unknown keys and wrong types, `__post_init__` refuses invalid values, and `plan/checks.py` invalid combinations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from data_pipeline.config import DataConfig, PrepareConfig, at_least, one_of, positive, require
from training.config.cluster import ClusterConfig
from training.config.diffusion import DiffusionConfig, DistillConfig, SamplerConfig
from training.config.features import DinoConfig, PerceptualConfig, RepaConfig

MOST_PROFILED = 50
"""Maximum number of steps in a trace: viewers cannot open larger files."""
SENTENCES = {"sentences": True}
"""Marks a field of free text: on the command line, `a red circle, on white` is one text (training/cli/overrides.py)."""


@dataclass
class RunConfig:
    """Where a run lives. One run = one stage's training, in one directory, over any number of restarts."""

    name: str = "default"
    """Name of the experiment, part of the paths of its data, runs and results."""
    dir: str = "runs/default/stage"
    """Directory of this stage's run: checkpoints, logs, metrics, sample grids. Short: `run=DIR`. `status`, `resume` and
    `stop` also take a directory of several runs."""

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir: it is empty; name a directory")
        inside = not self.name.startswith(("/", "~")) and ".." not in self.name.split("/")
        require(
            bool(self.name.strip()) and inside and self.name.isprintable(),
            f"run.name={self.name!r}: it is part of paths; give a name without line breaks, .. and a leading / or ~ "
            "(the directory of a run is run.dir)",
        )


@dataclass
class ModelConfig:
    """The U-Net of a stage: a preset and overrides."""

    preset: str = "demo_base"
    """A row of training/config/unet.py."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of `UNetConfig` that differ from the preset."""


@dataclass
class StageConfig:
    """One U-Net of the cascade."""

    name: str = "demo_base"
    """Part of the run's directory and of file names in a bundle."""
    image_size: int = 16
    """Side of the pictures this stage generates, pixels."""
    low_res_size: int = 0
    """Side of the pictures it upsamples, pixels; 0 for a base stage."""
    crop_size: int = 0
    """Super-resolution only: train on crops of this side (output pixels); 0: whole pictures."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", "..", "words"),
            f"stage.name={self.name}: it names directories, so it must not be empty, contain a slash, or be `words`",
        )
        at_least(self, "stage", image_size=1, low_res_size=0, crop_size=0)
        if self.low_res_size:
            require(
                self.image_size % self.low_res_size == 0 and self.low_res_size < self.image_size,
                f"stage.low_res_size={self.low_res_size}: it must divide stage.image_size={self.image_size} and be "
                "smaller",
            )
            factor = self.image_size // self.low_res_size
            require(
                self.crop_size % factor == 0 and self.crop_size <= self.image_size,
                f"stage.crop_size={self.crop_size}: it must be a multiple of the scale factor {factor}, up to "
                f"stage.image_size={self.image_size}",
            )
        else:
            require(self.crop_size == 0, "stage.crop_size: only a super-resolution stage trains on crops")

    @property
    def is_super_resolution(self) -> bool:
        """Whether the stage upsamples a smaller picture."""
        return self.low_res_size > 0

    @property
    def train_size(self) -> int:
        """Side of the training pictures: the crop, or the whole image."""
        return self.crop_size or self.image_size

    def check_aug_level(self, sampler: SamplerConfig, key: str) -> None:
        """Raise ConfigError, naming `key`, for more noise on the low-res picture than the stage is trained with."""
        require(
            not self.is_super_resolution or sampler.aug_level <= self.diffusion.aug_max,
            f"{key}={sampler.aug_level:g}: {self.name} is trained with low-res pictures of at most "
            f"stage.diffusion.aug_max={self.diffusion.aug_max:g}; choose a level up to that",
        )


TEXT_KINDS = ("words", "t5", "hidden", "clip")
"""Text encoders: `text.kind`; training/text/encoder.py builds them."""


@dataclass
class TextConfig:
    """The frozen text encoder."""

    kind: str = "words"
    """`words` (deterministic vectors from words, characters and neighbours: no semantics, no download), `t5` (T5, mT5,
    umT5, ByT5), `hidden` (hidden states of T5Gemma, Gemma, Qwen, Qwen-VL and other language models) or `clip`."""
    path: str | None = None
    """The model: a local directory or a name in the Hugging Face cache."""
    tokenizer: str | None = None
    """Directory of the tokenizer; null: in `path`, or next to it as in pipelines (text_encoder_2, tokenizer_2)."""
    max_tokens: int = 32
    """Captions are truncated to this many tokens (with `also`: of both encoders together)."""
    dim: int = 384
    """Width of the embeddings; must equal the model's (with `also`: the larger of the two)."""
    layer: int = -1
    """`hidden`, `clip`: which hidden states to use: -1 for the last (after the final norm), -2 for the layer before."""
    prefix: str = field(default="", metadata=SENTENCES)
    """`hidden`: an instruction put before each caption; only the caption's own embeddings are used."""
    also: dict[str, Any] = field(default_factory=dict)
    """A second encoder, whose tokens are appended: {kind: clip, path: DIR, dim: 768, max_tokens: 77}."""
    dtype: str = "fp32"
    """Number format of the frozen encoder: `fp32` or `bf16`."""
    sha: str | None = None
    """Hash of the encoder's weights and tokenizer; null: computed at the start. Checkpoints and bundles store it, and
    refuse a different encoder."""

    def __post_init__(self) -> None:
        one_of("text.kind", self.kind, TEXT_KINDS)
        one_of("text.dtype", self.dtype, ("fp32", "bf16"))
        at_least(self, "text", max_tokens=1, dim=1)
        require(
            self.kind == "words" or bool(self.path),
            f"text.path: text.kind={self.kind} needs a local directory or a name in the Hugging Face cache",
        )
        require(self.layer == -1 or self.kind in ("hidden", "clip"), f"text.layer: text.kind={self.kind} has no layers")
        require(not self.prefix or self.kind == "hidden", f"text.prefix: text.kind={self.kind} does not use it")
        require(self.kind != "words" or self.tokenizer is None, "text.tokenizer: text.kind=words does not use one")
        if self.also:
            self.encoders()

    def encoders(self) -> list[TextConfig]:
        """Return this encoder and `also` as separate configs.

        Raises:
            ConfigError: `also` has an unknown key or an `also` of its own, or leaves the first encoder no tokens.
        """
        if not self.also:
            return [self]
        known = [one.name for one in fields(self) if one.name not in ("also", "sha")]
        for key in self.also:
            require(key in known, f"text.also: unknown key {key!r}; the keys are {', '.join(known)}")
        second = TextConfig(**{"dtype": self.dtype, **self.also})
        first = self.max_tokens - second.max_tokens
        require(
            first >= 1,
            f"text.max_tokens={self.max_tokens}: it covers both encoders, so it must be larger than "
            f"text.also.max_tokens={second.max_tokens}",
        )
        return [replace(self, also={}, sha=None, max_tokens=first), second]


@dataclass
class OptimizerConfig:
    """Optimizer, learning rate and its schedule, clipping."""

    name: str = "adamw"
    """Name of the optimizer; `optimizer=NAME` also loads its defaults."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay: multiplied by the learning rate in each step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    decay: str = "linear"
    """Decay of the learning rate, to zero at train.steps: `constant` (none), `cosine` or `linear`."""
    decay_from: float = 0.7
    """Fraction of train.steps after which the decay starts."""
    clip_norm: float = 1.0
    """Gradients are clipped to this norm; 0: no clipping."""
    options: dict[str, float] = field(default_factory=dict)
    """Settings specific to the optimizer."""

    def __post_init__(self) -> None:
        one_of("optimizer.decay", self.decay, ("constant", "cosine", "linear"))
        positive(self, "optimizer", "lr", "eps")
        at_least(self, "optimizer", weight_decay=0, warmup_steps=0, clip_norm=0)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={self.betas}: it must be two numbers of at least 0 and less than 1",
        )
        require(0 <= self.decay_from <= 1, f"optimizer.decay_from={self.decay_from}: it must lie between 0 and 1")


@dataclass
class EmaConfig:
    """Moving averages of the weights."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """One average per decay; sampling uses the first. Ramped up as (1 + n) / (10 + n). With `profile: power` these are
    relative widths, for example [0.05, 0.1]."""
    profile: str = "constant"
    """`constant` decay, or `power`: with checkpoint.keep_every, `cascade checkpoints action=export sigma_rel=...` can
    later reconstruct an average of any width."""

    def __post_init__(self) -> None:
        require(bool(self.decays), "ema.decays: give at least one decay")
        for decay in self.decays:
            require(0 <= decay < 1, f"ema.decays: {decay} is not in [0, 1)")
            require(
                self.profile != "power" or 0 < decay < 0.288,
                f"ema.decays: {decay} is not a relative width; ema.profile=power needs values between 0 and 0.288",
            )
        one_of("ema.profile", self.profile, ("constant", "power"))


@dataclass
class ZeroConfig:
    """How DeepSpeed shards optimizer states, gradients and weights over the ranks."""

    stage: int = 1
    """DeepSpeed ZeRO stage: 0 (one device only), 1, 2 or 3."""
    offload_optimizer: bool = False
    """Moments and master weights in host memory."""
    offload_parameters: bool = False
    """ZeRO 3: weights in host memory."""

    def __post_init__(self) -> None:
        one_of("zero.stage", self.stage, (0, 1, 2, 3))
        require(
            not self.offload_parameters or self.stage == 3,
            f"zero.offload_parameters=true: it needs zero.stage=3, not {self.stage}",
        )
        require(
            not self.offload_optimizer or self.stage >= 2,
            f"zero.offload_optimizer=true: it needs zero.stage=2 or 3, not {self.stage}",
        )


@dataclass
class PrecisionConfig:
    """Number formats, compilation and memory layout."""

    dtype: str = "fp32"
    """`fp32`, or `bf16` with fp32 master weights."""
    channels_last: bool = False
    """Memory layout of pictures, often faster for bf16 convolutions on a GPU."""
    compile: bool = False
    """torch.compile per block (GPU)."""

    def __post_init__(self) -> None:
        one_of("precision.dtype", self.dtype, ("fp32", "bf16"))


@dataclass
class ProfileConfig:
    """A trace of a few steps (torch.profiler), one file per rank."""

    steps: list[int] = field(default_factory=list)
    """First and last step of the trace, counted from 1, for example [100, 105]; empty: none."""

    def __post_init__(self) -> None:
        if not self.steps:
            return
        fits = len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[-1] < self.steps[0] + MOST_PROFILED
        require(
            fits, f"train.profile.steps={self.steps}: it must be [FIRST, LAST], at most {MOST_PROFILED} steps from 1 on"
        )


@dataclass
class TrainConfig:
    """The training loop: steps, logging, and how to handle failures."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    sample_every: int = 500
    """Steps between two sample grids (fixed prompts, fixed seeds); 0: never."""
    sample_prompts: list[str] = field(default_factory=list, metadata=SENTENCES)
    """Captions of the sample grid; empty, and for super-resolution: the first captions of the data."""
    init_from: str | None = None
    """A bundle or checkpoint whose weights a new run of this stage starts from."""
    max_skipped: int = 10
    """After this many consecutive skipped steps (loss or gradient not finite, or a loss spike), the run rolls back to
    its last healthy checkpoint and skips the data in between."""
    max_rollbacks: int = 1
    """Rollbacks without a healthy checkpoint in between before the run stops (code 76)."""
    spike_factor: float = 20.0
    """A step is skipped if its loss exceeds this many times the median of the last 64; 0: only if it is not finite."""
    stall_s: float = 120.0
    """A rank that makes no progress for this many seconds is reported, and its stacks are written to its log."""
    peak_tflops: float = 0.0
    """Peak of one device, for MFU; 0: the data sheet's figure if the GPU is known, otherwise no MFU."""
    deterministic_reduction: bool = False
    """Sum gradients, losses and norms in an order that does not depend on the number of processes, so that any number
    of processes and any ZeRO stage gives bit-identical training. Needs data.micro_batch (fixed for the run) and
    optimizer.name=adamw; costs time, and memory for 2 to log2(micro-batches) more gradients per process."""
    timeout_first_s: float = 1800.0
    """Time-out of the process groups until the first step (compilation, warm-up)."""
    timeout_s: float = 600.0
    """Time-out of the process groups after the first step."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        at_least(self, "train", steps=1, log_every=1, sample_every=0, max_skipped=1, max_rollbacks=0, spike_factor=0)
        at_least(self, "train", peak_tflops=0)
        positive(self, "train", "stall_s", "timeout_first_s", "timeout_s")
        require(
            not self.profile.steps or self.profile.steps[1] <= self.steps,
            f"train.profile.steps={self.profile.steps}: the run ends after step train.steps={self.steps}",
        )


@dataclass
class LoraConfig:
    """Low-rank adaptation (LoRA) of the weights of train.init_from, which stay frozen; needs the `peft` package."""

    rank: int = 0
    """Rank of the adapters; 0: off, all weights are trained."""
    alpha: float = 0.0
    """The output of the adapters is scaled by alpha / rank; 0: alpha = rank."""
    targets: list[str] = field(
        default_factory=lambda: ["query", "key_value", "text_key_value", "out", "conv_in", "conv_out", "cond"]
    )
    """Layers that get an adapter, by the last part of their names: attention, residual blocks, their conditioning."""

    def __post_init__(self) -> None:
        at_least(self, "lora", rank=0, alpha=0)
        require(self.rank == 0 or bool(self.targets), "lora.targets: name at least one kind of layer")

    @property
    def scale(self) -> float:
        """Scale of the adapters' output."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0


@dataclass
class ValidationConfig:
    """The loss on held-out pictures at fixed noise levels with fixed noise: comparable across steps and runs."""

    every: int = 0
    """Steps between two measurements; 0: never."""
    shards: Any = None
    """Held-out shards; null: evaluation.reference."""
    samples: int = 64
    """Number of pictures; a multiple of the number of processes."""

    def __post_init__(self) -> None:
        at_least(self, "validation", every=0, samples=1)


@dataclass
class CheckpointConfig:
    """Where checkpoints go, how often, and which are kept."""

    every: Any = 1000
    """Steps between two checkpoints; `auto`: from their cost and this run's failure rate (Young and Daly)."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Never delete a checkpoint whose step is a multiple of this; 0: no such checkpoints."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss (averaged weights)."""
    dir: str | None = None
    """Where checkpoints go (a directory or s3://bucket/prefix); null: RUN_DIR/checkpoints."""
    background: bool = True
    """Write in the background; training only waits for the copy to host memory."""

    def __post_init__(self) -> None:
        at_least(self, "checkpoint", keep_last=1, keep_every=0)
        whole = isinstance(self.every, int) and not isinstance(self.every, bool)
        require(self.every == "auto" or whole, f"checkpoint.every={self.every}: it must be a number of steps, or auto")
        if whole:
            at_least(self, "checkpoint", every=1)


@dataclass
class WandbConfig:
    """Weights & Biases. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP, WANDB_NOTES and
    WANDB_TAGS apply unless the command line sets the key."""

    mode: str = "offline"
    """`online`, `offline` or `disabled`."""
    project: str = "cascade"
    """W&B project of the run."""
    entity: str | None = None
    """W&B user or team; null: the account's default."""
    name: str | None = None
    """Name of the run; null: RUN_NAME/STAGE_NAME, of a student of four steps RUN_NAME/STAGE_NAME-distilled-4."""
    group: str | None = None
    """Runs of a group are shown together."""
    notes: str | None = field(default=None, metadata=SENTENCES)
    """Free text about the run."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""

    def __post_init__(self) -> None:
        one_of("wandb.mode", self.mode, ("online", "offline", "disabled"))
        wrong = sorted(set(self.project) & set("/\\#?%:"))
        require(
            not wrong and 0 < len(self.project) <= 128,
            f"wandb.project={self.project}: W&B accepts 1 to 128 characters, and none of / \\ # ? % :",
        )
        require(
            self.entity is None or re.fullmatch(r"[\w.-]+", self.entity) is not None,
            f"wandb.entity={self.entity}: it is the name of a W&B user or team, without blanks or slashes; null: the "
            f"account's default",
        )
        for name in ("name", "group"):
            value = getattr(self, name)
            require(value is None or 0 < len(value) <= 128, f"wandb.{name}={value}: W&B accepts 1 to 128 characters")
        for tag in self.tags:
            require(0 < len(tag) <= 64, f"wandb.tags: W&B accepts tags of 1 to 64 characters, not {tag!r}")


@dataclass
class TrackersConfig:
    """Where to log metrics in addition to metrics.jsonl and W&B."""

    tensorboard: bool = False
    """Event files in RUN_DIR/tensorboard; needs the `tensorboardX` package."""
    csv: bool = False
    """RUN_DIR/metrics.csv, updated at each checkpoint and at the end."""


@dataclass
class BundleConfig:
    """`cascade bundle`: which runs, and where the bundle goes."""

    runs: list[str] = field(default_factory=list)
    """Run directories (or checkpoints) of the stages, base first."""
    students: list[str] = field(default_factory=list)
    """`launch verb=all`: stages of bundle.runs to distil once they are trained, each with words of its own for `cascade
    distill`: ["demo_base distill.steps=4 train.steps=400","demo_sr distill.steps=2"]; the bundle takes the students."""
    dir: str = "runs/default/bundle"
    """The bundle: a directory or s3:// prefix."""
    text_path: str | None = None
    """`sample` and `evaluate`: path of the text encoder on this machine; null: the path stored in the bundle."""

    def __post_init__(self) -> None:
        require(bool(self.dir), "bundle.dir: it is empty; name a directory or an s3:// prefix")


@dataclass
class SamplingConfig:
    """The default prompts and output of `cascade sample`."""

    prompts: list[str] = field(default_factory=list, metadata=SENTENCES)
    """The experiment's own prompts, used when the command line gives none."""
    output: str = "runs/default/samples"
    """Directory of the pictures."""
    columns: int = 4
    """Prompts per row of the grid."""
    certificate: str | None = None
    """PEM file of a certificate chain to sign the final pictures with (Content Credentials, C2PA); null: unsigned."""
    key: str | None = None
    """PEM file of the certificate's private key."""

    def __post_init__(self) -> None:
        at_least(self, "sampling", columns=1)
        require(
            (self.certificate is None) == (self.key is None),
            "sampling.certificate and sampling.key: signing needs both the certificate chain and its private key",
        )


EXTRACTORS = ("inception", "clip", "dinov2", "vlm")


@dataclass
class ExtractorConfig:
    """A feature extractor: `extractor=[inception,clip]` selects from conf/extractor."""

    kind: str = "inception"
    """`inception`, `clip` or `dinov2`; `vlm`: a vision-language model, which scores pictures by answering questions."""
    path: str = ""
    """Local file (inception) or directory (the others); nothing is downloaded."""
    sha256: str = ""
    """SHA-256 of the weights; required, so that figures from different weights are never compared."""
    source: str = ""
    """Where to get the weights; shown if they are missing."""
    batch: int = 32
    """Pictures per forward pass."""

    def __post_init__(self) -> None:
        one_of("evaluation.extractors: kind", self.kind, EXTRACTORS)
        at_least(self, "evaluation.extractors", batch=1)


@dataclass
class EvaluationConfig:
    """`cascade evaluate`: what to measure, and on how many samples."""

    every: int = 0
    """`train`: steps between two evaluations (feature-based figures, averaged weights, all ranks); 0: never."""
    kind: str = "shapes"
    """`shapes`: an oracle reads the captioned shapes; `pictures`: feature-based figures only."""
    reference: Any = None
    """Held-out shards, or the file that `action=reference` made from them."""
    prompts: Any = None
    """`pictures`: a text file with one prompt per line, or a table with a column `Prompt`; null: the reference's
    captions. With prompts, no reference is needed."""
    samples: int = 96
    """Maximum number of captions to sample."""
    images_per_prompt: int = 1
    """Pictures per caption; with 2 or more, their diversity is measured."""
    reference_samples: int = 0
    """`pictures`: number of reference pictures to compare the samples with; 0: as many as samples."""
    training: Any = None
    """Shards that the model was trained on: each sample is compared with its nearest training picture, and copies are
    reported; null: the page shows the nearest reference pictures."""
    training_samples: int = 10000
    """Pictures of `training` to search."""
    from_stage: str | None = None
    """Sample from this stage on, starting from real low-res versions of the reference pictures; null: sample all
    stages from text. The difference shows what the earlier stages lose."""
    psnr_samples: int = 32
    """`shapes`: pictures that each super-resolution stage restores from their real low-res version; 0: none."""
    extractors: dict[str, ExtractorConfig] = field(default_factory=dict)
    """Extractors with local weights, by the name of their features; those without weights are always included."""
    batch: int = 32
    """Pictures drawn at once per device."""
    output: str = "runs/default/evaluation"
    """Directory of the results, the report and the parts."""

    def __post_init__(self) -> None:
        one_of("evaluation.kind", self.kind, ("shapes", "pictures"))
        at_least(self, "evaluation", every=0)
        require(
            not self.every or bool(self.reference),
            f"evaluation.every={self.every}: set evaluation.reference to held-out shards to compare with",
        )
        at_least(self, "evaluation", samples=2, images_per_prompt=1, batch=1, reference_samples=0, psnr_samples=0)
        at_least(self, "evaluation", training_samples=2)
        require(
            self.psnr_samples != 1, "evaluation.psnr_samples=1: an interval needs at least 2 pictures; 0 restores none"
        )
        require(
            self.kind == "pictures" or not self.prompts,
            "evaluation.prompts: evaluation=shapes only understands captions of drawn shapes; use evaluation=pictures",
        )


def trained_name(stage: str, steps: int) -> str:
    """The stage's own name, or with `steps` above 0 that of its student."""
    return f"{stage}-distilled-{steps}" if steps else stage


@dataclass
class Experiment:
    """All sections that an experiment composes; the base of every command's config."""

    seed: int = 0
    """Seed of everything random: order, crops, captions, noise, initial weights."""
    json: bool = False
    """Print a JSON object as the last line on stdout."""
    debug: bool = False
    """Show tracebacks."""
    run: RunConfig = field(default_factory=RunConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    repa: RepaConfig = field(default_factory=RepaConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    bundle: BundleConfig = field(default_factory=BundleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def compares_features(self) -> bool:
        """Whether any loss needs the frozen picture encoder."""
        return bool(self.repa.weight or self.perceptual.weight)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed={self.seed}: it must lie between 0 and 2**63 - 1")
        require(
            self.wandb.mode == "disabled" or bool(self.wandb.name) or len(self.run.name + self.trained) < 128,
            f"run.name={self.run.name}: W&B accepts run names of at most 128 characters; set wandb.name",
        )
        require(
            self.lora.rank == 0 or bool(self.train.init_from),
            f"lora.rank={self.lora.rank}: LoRA adapts trained weights; set train.init_from to a bundle or run",
        )
        if self.distill.steps:  # sample grids, validation and bundles must all use the student's sampler
            self.stage = replace(self.stage, sampler=self.distill.student_sampler(self.stage.sampler))

    @property
    def trained(self) -> str:
        """What a run trains, by which it is known in W&B and in a queue: `base64`, or `base64-distilled-4`, its student
        of four steps."""
        return trained_name(self.stage.name, self.distill.steps)

    @property
    def starts_from(self) -> str | None:
        """The run, checkpoint or bundle whose weights a new run starts from; None: random weights."""
        return self.train.init_from or (self.distill.teacher if self.distill.steps else None)
