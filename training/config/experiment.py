"""Every setting that an experiment composes, as typed dataclasses that refuse what cannot work. Imports neither torch
nor deepspeed. What single commands add, and the list of commands, is in commands.py.

`conf/*.yaml` composes the values (Hydra), these classes own their validity: unknown keys and wrong types are refused by
OmegaConf's structured configs, impossible values by `__post_init__`, impossible combinations by `plan/checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from data_pipeline.config import DataConfig, PrepareConfig, at_least, positive, require
from training.config.cluster import ClusterConfig
from training.config.diffusion import DiffusionConfig, DistillConfig, SamplerConfig
from training.config.features import DinoConfig, PerceptualConfig, RepaConfig

MOST_PROFILED = 50
"""Steps of a trace: more make a file that no viewer opens."""
SENTENCES = {"sentences": True}
"""Marks a field of free text: on the command line `a red circle, on white` is one text (training/cli/overrides.py)."""


@dataclass
class RunConfig:
    """Where a run lives. One run = one stage's training, in one directory, over any number of restarts."""

    name: str = "default"
    """Of the experiment; the directories of its data, runs and results carry it."""
    dir: str = "runs/default/stage"
    """Of this stage's run: checkpoints, logs, metrics, sample grids."""

    def __post_init__(self) -> None:
        require(bool(self.dir), "run.dir: it is empty; name a directory")


@dataclass
class ModelConfig:
    """The U-Net of a stage: a preset, and what differs from it."""

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
    """Side of the pictures this stage makes, pixels."""
    low_res_size: int = 0
    """Side of the pictures it starts from; 0 for a base stage."""
    crop_size: int = 0
    """Super-resolution only: train on crops of this side (output pixels); 0: whole pictures."""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", "..", "words"),
            f"stage.name={self.name}: directories are named by it; it must be a word without a slash, and not `words`",
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
        """Whether the stage enlarges a smaller picture."""
        return self.low_res_size > 0

    @property
    def train_size(self) -> int:
        """Side of the training pictures: the crop, or the whole image."""
        return self.crop_size or self.image_size


@dataclass
class TextConfig:
    """The frozen text encoder."""

    kind: str = "words"
    """`words` (deterministic vectors per word, character and neighbour; no meaning, no download), `t5` (T5, mT5, umT5,
    ByT5), `hidden` (hidden states of T5Gemma, Gemma, Qwen, Qwen-VL and other language models) or `clip`."""
    path: str | None = None
    """Of a model: a local directory or a name in the Hugging Face cache."""
    tokenizer: str | None = None
    """Its tokenizer's directory; null: in `path`, or beside it as pipelines ship it (text_encoder_2, tokenizer_2)."""
    max_tokens: int = 32
    """Captions are cut to this many tokens (with `also`: of both encoders together)."""
    dim: int = 384
    """Width of the embeddings; for a model it must equal the model's (with `also`: the larger of the two)."""
    layer: int = -1
    """`hidden`, `clip`: which hidden states: -1 the last ones, after the final norm, -2 those of the layer before."""
    prefix: str = field(default="", metadata=SENTENCES)
    """`hidden`: an instruction in front of each caption; the embeddings are those of the caption alone."""
    also: dict[str, Any] = field(default_factory=dict)
    """A second encoder, whose tokens follow: {kind: clip, path: DIR, dim: 768, max_tokens: 77}."""
    dtype: str = "fp32"
    """`fp32` or `bf16`, for the frozen encoder."""
    sha: str | None = None
    """Hash of the encoder's weights and tokenizer. Null: found out at the start; checkpoints and bundles keep it and
    refuse another encoder."""

    def __post_init__(self) -> None:
        kinds = ("words", "t5", "hidden", "clip")
        require(self.kind in kinds, f"text.kind={self.kind}: it must be {', '.join(kinds[:-1])} or {kinds[-1]}")
        require(self.dtype in ("fp32", "bf16"), f"text.dtype={self.dtype}: it must be fp32 or bf16")
        at_least(self, "text", max_tokens=1, dim=1)
        require(
            self.kind == "words" or bool(self.path),
            f"text.path: text={self.kind} needs a directory or a name in the HF cache",
        )
        require(self.layer == -1 or self.kind in ("hidden", "clip"), f"text.layer: text.kind={self.kind} has none")
        require(not self.prefix or self.kind == "hidden", f"text.prefix: text.kind={self.kind} takes none")
        require(self.kind != "words" or self.tokenizer is None, "text.tokenizer: text.kind=words takes none")
        if self.also:
            self.encoders()

    def encoders(self) -> list[TextConfig]:
        """This one and `also`, each by itself.

        Raises:
            ConfigError: `also` has an unknown key, an encoder more, or as many tokens as there are.
        """
        if not self.also:
            return [self]
        known = [one.name for one in fields(self) if one.name not in ("also", "sha")]
        for key in self.also:
            require(key in known, f"text.also: it has no {key!r}; its keys are {', '.join(known)}")
        second = TextConfig(**{"dtype": self.dtype, **self.also})
        first = self.max_tokens - second.max_tokens
        require(
            first >= 1,
            f"text.max_tokens={self.max_tokens}: it counts the tokens of both encoders, of which text.also.max_tokens="
            f"{second.max_tokens} are the second's; the first needs some, too",
        )
        return [replace(self, also={}, sha=None, max_tokens=first), second]


@dataclass
class OptimizerConfig:
    """Optimizer, learning rate and its schedule, clipping."""

    name: str = "adamw"
    """`adamw`, `adamw8bit` (moments of 8 bits), `adafactor`, `muon`: `optimizer=NAME` takes its file."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled: per step, times the learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    decay: str = "linear"
    """`constant`, `cosine` or `linear`, after the warm-up, to zero at train.steps."""
    decay_from: float = 0.7
    """Share of train.steps after which the decay starts."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of a step; 0: none."""
    options: dict[str, float] = field(default_factory=dict)
    """What only this optimizer has."""

    def __post_init__(self) -> None:
        require(
            self.decay in ("constant", "cosine", "linear"),
            f"optimizer.decay={self.decay}: it must be constant, cosine or linear",
        )
        positive(self, "optimizer", "lr", "eps")
        at_least(self, "optimizer", weight_decay=0, warmup_steps=0, clip_norm=0)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={self.betas}: it must be two numbers from 0 to below 1",
        )
        require(0 <= self.decay_from <= 1, f"optimizer.decay_from={self.decay_from}: it must lie between 0 and 1")


@dataclass
class EmaConfig:
    """Moving averages of the weights."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """One average per decay; the first one is sampled from. Ramped up as (1 + n) / (10 + n). With `profile: power`
    these are relative widths, for example [0.05, 0.1]."""
    profile: str = "constant"
    """`constant` decay, or `power`: averages from which, with checkpoint.keep_every, `cascade checkpoints action=export
    sigma_rel=...` makes one of any other width afterwards."""

    def __post_init__(self) -> None:
        require(bool(self.decays), "ema.decays: give at least one decay")
        for decay in self.decays:
            require(0 <= decay < 1, f"ema.decays: {decay} is not in [0, 1)")
            require(
                self.profile != "power" or 0 < decay < 0.288,
                f"ema.decays: {decay} is no relative width; ema.profile=power needs values between 0 and 0.288",
            )
        require(self.profile in ("constant", "power"), f"ema.profile={self.profile}: it must be constant or power")


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
        require(self.stage in (0, 1, 2, 3), f"zero.stage={self.stage}: it must be 0, 1, 2 or 3")
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
        require(self.dtype in ("fp32", "bf16"), f"precision.dtype={self.dtype}: it must be fp32 or bf16")


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
    """The training loop: steps, logging, what to do about trouble."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    sample_every: int = 500
    """A grid of fixed prompts with fixed seeds every so many steps; 0: never."""
    sample_prompts: list[str] = field(default_factory=list, metadata=SENTENCES)
    """Captions of the sample grid; empty, and for super-resolution: the first captions of the data."""
    init_from: str | None = None
    """A bundle or checkpoint whose weights a fresh run of this stage starts from."""
    max_skipped: int = 10
    """After this many steps in a row that could not be applied (loss or gradient not finite, loss a spike) the run
    goes back to the weights of its last healthy checkpoint and steps past the data."""
    max_rollbacks: int = 1
    """Rollbacks without a healthy checkpoint in between, before the run stops (code 76)."""
    spike_factor: float = 20.0
    """A step whose loss is more than this many times the median of the last 64 is not applied; 0: every finite one
    is."""
    stall_s: float = 120.0
    """A rank that makes no progress for this many seconds is reported, with its stacks in its log file."""
    peak_tflops: float = 0.0
    """Stated peak of one device, for MFU; 0: the data sheet's figure for a known GPU, else no MFU."""
    deterministic_reduction: bool = False
    """Gradients, losses and norms are added up in an order that does not depend on the number of processes, so that any
    number of them, and any ZeRO stage, trains the same bits. Needs data.micro_batch (which must then stay as it is) and
    optimizer.name=adamw; costs memory for two to log2(micro-batches) more gradients per process, and time."""
    timeout_first_s: float = 1800.0
    """Time-out of the process groups up to the first step (compilation, warm-up)."""
    timeout_s: float = 600.0
    """The same afterwards."""
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
    """Low-rank adaptation of the weights of train.init_from, which stay frozen; needs the `peft` package."""

    rank: int = 0
    """Inner width of the adapters; 0: off, all weights are trained."""
    alpha: float = 0.0
    """The adapters' sum is multiplied by alpha / rank; 0: alpha = rank."""
    targets: list[str] = field(
        default_factory=lambda: ["query", "key_value", "text_key_value", "out", "conv_in", "conv_out", "cond"]
    )
    """Layers that get an adapter, by the last part of their names: attention, residual blocks, their conditioning."""

    def __post_init__(self) -> None:
        at_least(self, "lora", rank=0, alpha=0)
        require(self.rank == 0 or bool(self.targets), "lora.targets: name at least one kind of layer")

    @property
    def scale(self) -> float:
        """Factor of the adapters' sum."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0


@dataclass
class ValidationConfig:
    """The loss on held-out pictures at fixed noise levels with fixed noise: comparable between steps and between
    runs."""

    every: int = 0
    """Steps between two measurements; 0: never."""
    shards: Any = None
    """Held-out shards; null: evaluation.reference."""
    samples: int = 64
    """Pictures; a multiple of the number of processes."""

    def __post_init__(self) -> None:
        at_least(self, "validation", every=0, samples=1)


@dataclass
class CheckpointConfig:
    """Where checkpoints go, how often, and which are kept."""

    every: Any = 1000
    """Steps between two checkpoints; `auto`: by what one costs and how often this run fails (Young and Daly)."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Keep each checkpoint whose step is a multiple of this for ever; 0: none."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss (averaged weights)."""
    dir: str | None = None
    """Where checkpoints go (a directory or s3://bucket/prefix); null: RUN_DIR/checkpoints."""
    background: bool = True
    """Write in the background; the loop waits only for the copy to host memory."""

    def __post_init__(self) -> None:
        at_least(self, "checkpoint", keep_last=1, keep_every=0)
        whole = isinstance(self.every, int) and not isinstance(self.every, bool)
        require(self.every == "auto" or whole, f"checkpoint.every={self.every}: it must be a number of steps, or auto")
        if whole:
            at_least(self, "checkpoint", every=1)


@dataclass
class WandbConfig:
    """Weights & Biases. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP, WANDB_NOTES and
    WANDB_TAGS hold for what the command line does not give."""

    mode: str = "offline"
    """`online`, `offline` or `disabled`."""
    project: str = "cascade"
    """At W&B, where the run is shown."""
    entity: str | None = None
    """User or team at W&B; null: the account's own."""
    name: str | None = None
    """Of the run; null: RUN_NAME/STAGE_NAME."""
    group: str | None = None
    """Runs of one group are shown together."""
    notes: str | None = field(default=None, metadata=SENTENCES)
    """Free text about the run."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""

    def __post_init__(self) -> None:
        require(
            self.mode in ("online", "offline", "disabled"),
            f"wandb.mode={self.mode}: it must be online, offline or disabled",
        )
        wrong = sorted(set(self.project) & set("/\\#?%:"))
        require(
            not wrong and 0 < len(self.project) <= 128,
            f"wandb.project={self.project}: W&B takes 1 to 128 characters, and none of / \\ # ? % :",
        )
        for name in ("name", "group"):
            value = getattr(self, name)
            require(value is None or 0 < len(value) <= 128, f"wandb.{name}={value}: W&B takes 1 to 128 characters")
        for tag in self.tags:
            require(0 < len(tag) <= 64, f"wandb.tags: W&B takes tags of 1 to 64 characters, not {tag!r}")


@dataclass
class TrackersConfig:
    """Where metrics go besides metrics.jsonl and W&B; any of them together."""

    tensorboard: bool = False
    """Event files in RUN_DIR/tensorboard; needs the `tensorboardX` package."""
    csv: bool = False
    """RUN_DIR/metrics.csv, brought up to date at each checkpoint and at the end."""


@dataclass
class BundleConfig:
    """`cascade bundle`: which runs, and where the bundle goes."""

    runs: list[str] = field(default_factory=list)
    """Run directories (or checkpoints) of the stages, base first."""
    dir: str = "runs/default/bundle"
    """The bundle: a directory or s3:// prefix."""
    text_path: str | None = None
    """`sample` and `evaluate`: where the text encoder lies on this machine; null: where the bundle says."""

    def __post_init__(self) -> None:
        require(bool(self.dir), "bundle.dir: it is empty; name a directory or an s3:// prefix")


@dataclass
class SamplingConfig:
    """The prompts that `cascade sample` draws by default, and where to."""

    prompts: list[str] = field(default_factory=list, metadata=SENTENCES)
    """The experiment's own prompts, used when the command line gives none."""
    output: str = "runs/default/samples"
    """Directory of the pictures."""
    columns: int = 4
    """Prompts in a row of the grid."""
    certificate: str | None = None
    """PEM file of a certificate chain: final pictures are signed as content credentials (C2PA); null: they are not."""
    key: str | None = None
    """PEM file of the certificate's private key."""

    def __post_init__(self) -> None:
        at_least(self, "sampling", columns=1)
        require(
            (self.certificate is None) == (self.key is None),
            "sampling.certificate and sampling.key: signing needs both, the chain and its private key",
        )


EXTRACTORS = ("inception", "clip", "dinov2", "vlm")


@dataclass
class ExtractorConfig:
    """A network that turns pictures into features: `extractor=[inception,clip]` chooses from conf/extractor."""

    kind: str = "inception"
    """`inception`, `clip` or `dinov2`; `vlm`: a vision-language model, whose answers to questions are scores."""
    path: str = ""
    """Local file (inception) or directory (the others); nothing is downloaded."""
    sha256: str = ""
    """Of the weights' file; required, so that figures of other weights are never compared."""
    source: str = ""
    """Where the weights can be fetched; for the message when they are missing."""
    batch: int = 32
    """Pictures per forward pass."""

    def __post_init__(self) -> None:
        require(
            self.kind in EXTRACTORS,
            f"evaluation.extractors: kind={self.kind}: it must be {', '.join(EXTRACTORS[:-1])} or {EXTRACTORS[-1]}",
        )
        at_least(self, "evaluation.extractors", batch=1)


@dataclass
class EvaluationConfig:
    """`cascade evaluate`: what is measured on how many samples."""

    every: int = 0
    """`train`: steps between two measurements of figures on features, with the averaged weights on all ranks; 0:
    never."""
    kind: str = "shapes"
    """`shapes`: the oracle that reads captioned shapes; `pictures`: figures on features only."""
    reference: Any = None
    """Held-out shards, or the file that `action=reference` made of them."""
    prompts: Any = None
    """`pictures`: a text file with one prompt per line, or a table with a column `Prompt`; null: the reference's
    captions. With prompts no reference is needed."""
    samples: int = 96
    """Captions to sample; fewer where there are fewer."""
    images_per_prompt: int = 1
    """Pictures of each caption; from 2 on their diversity is measured."""
    reference_samples: int = 0
    """`pictures`: reference pictures that the samples are compared with; 0: as many as samples."""
    training: Any = None
    """Shards that the model was trained on: each sample is compared with the nearest picture there, and copies are
    reported; null: the page shows the nearest reference pictures."""
    training_samples: int = 10000
    """Pictures of `training` to look through."""
    from_stage: str | None = None
    """Draw this stage and those after it from true low-res versions of the reference pictures; null: draw all stages
    from text. The difference between the two is what the stages before it lose."""
    psnr_samples: int = 32
    """`shapes`: pictures that each super-resolution stage restores from their true low-res version; 0: none."""
    extractors: dict[str, ExtractorConfig] = field(default_factory=dict)
    """Networks with local weights, by the name of their features; those without weights always stand beside them."""
    batch: int = 32
    """Pictures drawn at once per device."""
    output: str = "runs/default/evaluation"
    """Directory of result, report and parts."""

    def __post_init__(self) -> None:
        require(self.kind in ("shapes", "pictures"), f"evaluation.kind={self.kind}: it must be shapes or pictures")
        at_least(self, "evaluation", every=0)
        require(
            not self.every or bool(self.reference),
            f"evaluation.every={self.every}: name held-out shards in evaluation.reference to compare with",
        )
        at_least(self, "evaluation", samples=2, images_per_prompt=1, batch=1, reference_samples=0, psnr_samples=0)
        at_least(self, "evaluation", training_samples=2)
        require(
            self.kind == "pictures" or not self.prompts,
            "evaluation.prompts: evaluation=shapes reads captions of drawn shapes; say evaluation=pictures",
        )


@dataclass
class Experiment:
    """All sections that an experiment composes; the base of every command's config."""

    seed: int = 0
    """Of everything random: order, crops, captions, noise, initial weights."""
    json: bool = False
    """The last line on stdout is one JSON object."""
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
        """Whether a loss needs the frozen picture encoder."""
        return bool(self.repa.weight or self.perceptual.weight)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed={self.seed}: it must lie between 0 and 2**63 - 1")
        require(
            self.wandb.mode == "disabled" or bool(self.wandb.name) or len(self.run.name + self.stage.name) < 128,
            f"run.name={self.run.name}: W&B takes run names of at most 128 characters; set wandb.name",
        )
        require(
            self.lora.rank == 0 or bool(self.train.init_from),
            f"lora.rank={self.lora.rank}: adapters change trained weights; name a bundle or run in train.init_from",
        )
        if self.distill.steps:  # all that draws with the stage draws as the student is meant to be drawn
            self.stage = replace(self.stage, sampler=self.distill.student_sampler(self.stage.sampler))

    @property
    def starts_from(self) -> str | None:
        """Whose weights a fresh run begins with."""
        return self.train.init_from or (self.distill.teacher if self.distill.steps else None)
