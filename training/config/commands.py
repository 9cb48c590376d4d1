"""The keys that each command adds to an experiment's sections, and the table that describes all commands.

Imports neither torch nor deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_pipeline.config import at_least, one_of, require
from training.config.diffusion import DistillConfig
from training.config.experiment import SENTENCES, Experiment


@dataclass
class SamplerKeys(Experiment):
    """Sampler settings of a bundle that `sample` and `evaluate` can override, with one value, one per stage drawn, or a
    mapping by stage name."""

    guidance: Any = None
    """Guidance weight: one number, or one per stage; null: the bundle's."""
    steps: Any = None
    """Number of sampling steps: one number, or one per stage; null: the bundle's."""
    sampler: Any = None
    """`ddpm`, `ddim`, `heun` or `dpmpp_2m`: one name, or one per stage; null: the bundle's."""
    aug_level: Any = None
    """Level of the noise added to the low-res input of super-resolution: one number, or one per stage; null: the
    bundle's."""
    spacing: Any = None
    """Spacing of the steps, `time`, `log_snr`, `karras` or `auto`: one name, or one per stage; null: the bundle's."""
    threshold: Any = None
    """`none`, `static` or `dynamic`: one name, or one per stage; null: the bundle's."""
    original_side: Any = None
    """Stages with size_condition: shorter side of the original picture to condition on, pixels: one number, or one per
    stage; null: the bundle's."""

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """The arguments of `Cascade.draw` for these keys."""
        return {key: getattr(self, key) for key in SAMPLER_KEYS}


SAMPLER_KEYS = ("guidance", "steps", "sampler", "aug_level", "spacing", "threshold", "original_side")
ACTIONS = ("evaluate", "reference", "compare", "pareto", "bisect")


@dataclass
class EvaluateCommand(SamplerKeys):
    """`cascade evaluate`: its own keys are at the top level."""

    action: str = "evaluate"
    """`evaluate` a bundle; make `reference` statistics; `compare` results picture by picture; `pareto`: plot distance
    against CLIP score over the results of a sweep; `bisect`: find the stored checkpoint of `run` at which `figure`
    became worse."""
    results: list[str] = field(default_factory=list)
    """`compare`, `pareto`: result.json files or their directories."""
    record: bool = False
    """`evaluate`: also write the figures and their protocol to the bundle's model card; `pareto`: write those of the
    point with the smallest distance, and make its sampler settings the bundle's."""
    watch: bool = False
    """Evaluate each committed checkpoint of the run `run.dir` once, newest first, until the run is complete."""
    figure: str = ""
    """`watch`, `bisect`: the figure that decides which checkpoint is better, for example kid.inception; empty: KID on
    the last feature space."""
    stop_after: int = 0
    """`watch`: stop the run after this many consecutive checkpoints that are significantly worse than the best; 0:
    never."""
    steps_between: list[int] = field(default_factory=list)
    """`bisect`: a good and a bad step, [GOOD,BAD]; empty: the first and the newest checkpoint."""
    wait_s: float = 3600.0
    """`watch`: give up after this many seconds without a new checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("action", self.action, ACTIONS)
        require(
            not self.watch or self.action == "evaluate", f"watch=true: it belongs to action=evaluate, not {self.action}"
        )
        require(self.stop_after >= 0, f"stop_after={self.stop_after}: it must be at least 0")
        require(self.wait_s > 0, f"wait_s={self.wait_s}: it must be positive")
        needs = self.action in ("compare", "pareto")
        require(needs or not self.results, f"results: only action=compare and action=pareto use it, not {self.action}")
        require(not needs or len(self.results) > 1, f"results: action={self.action} needs at least two: results=[A,B]")


@dataclass
class SampleCommand(SamplerKeys):
    """`cascade sample`: its own keys are at the top level."""

    prompts: Any = field(default=None, metadata=SENTENCES)
    """One prompt, a text file with one prompt per line, `-` for standard input (likewise), or a list: '["a red circle,
    on white","a blue square"]'; null: the experiment's."""
    negative_prompts: Any = field(default=None, metadata=SENTENCES)
    """One negative prompt for all prompts, or a list or file with one for each."""
    from_bundle: str | None = None
    """Bundle directory; null: bundle.dir."""
    output: str | None = None
    """Directory of the pictures; null: sampling.output."""
    num_images: int = 1
    """Pictures per prompt."""
    layout: str | None = None
    """Also write the pictures in the layout of another tool: `flat`, `geneval`, `geneval2`, `dpg`, `t2i_compbench`,
    `parti` or `oneig`."""
    size: Any = None
    """Width and height of the final pictures, [WIDTH,HEIGHT] in pixels; null: the size the last stage was trained
    for."""
    stages: Any = None
    """How many stages to run, from the first, or names of stages; null: all."""
    low_res: Any = None
    """Picture file, or one per prompt, to start from if the first of `stages` is super-resolution."""
    image: Any = None
    """Picture file, or one per prompt, to redraw (by `strength`, or where `mask` is light)."""
    mask: Any = None
    """Picture file, or one per prompt: `image` is redrawn where the mask is light; null: everywhere."""
    strength: Any = 1.0
    """How much of `image` is redrawn, above 0 and up to 1: one number for the first stage drawn, or one per stage."""
    batch: int = 16
    """Pictures drawn at once per device."""
    explain: bool = False
    """Also write heat maps that show which pixels attended to which word."""


@dataclass
class DistillCommand(Experiment):
    """`cascade distill`: distils the experiment's stage into a student; four steps unless distill.steps is set."""

    distill: DistillConfig = field(default_factory=lambda: DistillConfig(steps=4))


@dataclass
class OrderCommand(Experiment):
    """`cascade order`: the part of a run's data order to show."""

    world_size: int = 1
    """Number of processes of the run."""
    workers: int = 0
    """DataLoader workers per process."""
    position: int = 0
    """Where to start: samples consumed since step 0."""
    batches: int = 1
    """Global batches to show."""
    quality: bool = False
    """Also print, as the last line, how well the batches are shuffled."""


@dataclass
class IndexCommand(Experiment):
    """`cascade index`: whether to index shards again."""

    rebuild: bool = False
    """Also index shards that already have an index."""


@dataclass
class VerifyCommand(Experiment):
    """`cascade verify`: its report."""

    report: bool = False
    """Also write an HTML page about the data."""
    output: str = "verify"
    """Directory for the quarantine file and the report."""


@dataclass
class LaunchCommand(Experiment):
    """`cascade launch`: which command to submit, and how."""

    verb: Any = "train"
    """The command to submit; a list such as ["train stage=demo_base", "train stage=demo_sr", bundle] is submitted as a
    chain, each job starting after the previous one succeeds; `all`: the whole cascade of the experiment, as a graph."""
    embed_tasks: int = 1
    """verb=all: array tasks that divide the text embedding among them."""
    evaluate_checkpoints: bool = True
    """verb=all: for each stage, an additional job evaluates its checkpoints as they appear (on one device)."""
    at_once: int = 0
    """Maximum number of concurrent jobs of a local launch or a --multirun; 0: one locally, no limit for a sweep."""
    overrides: list[str] = field(default_factory=list)
    """Additional key=value overrides for the submitted command."""
    dry_run: bool = False
    """Print and write the script without submitting it."""
    script: str | None = None
    """Where to write the script; null: RUN_DIR/launch/."""
    separate: str = ""
    """Appended to run.dir; set by --multirun, so that each job has its own run directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.embed_tasks >= 1, f"embed_tasks={self.embed_tasks}: it must be at least 1")
        require(self.at_once >= 0, f"at_once={self.at_once}: it must not be negative")


@dataclass
class StatusCommand(Experiment):
    """`cascade status`: how to list the runs of a directory."""

    sort: str = "stage"
    """Column of the JSON output to sort by: stage, state, step, validation_loss ..."""
    watch: float = 0.0
    """Seconds between updates; 0: print once."""
    price: float = 2.0
    """Dollars per GPU hour."""
    html: str | None = None
    """Also write this file: a self-contained page with curves and sample grids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.watch >= 0, f"watch={self.watch}: it must not be negative")
        require(self.price >= 0, f"price={self.price}: it must not be negative")


@dataclass
class CompareCommand(Experiment):
    """`cascade compare`: which runs to compare."""

    runs: list[str] = field(default_factory=list)
    """Run directories; the key can be omitted."""
    curves: list[str] = field(default_factory=lambda: ["loss", "validation_loss_ema"])
    """Metrics in metrics.jsonl to plot."""
    output: str = "compare.png"
    """File for the plot."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len({*self.runs}) == len(self.runs), "runs: the same run is listed twice")
        require(self.output.endswith(".png"), f"output={self.output}: it must end in .png")


@dataclass
class ResumeCommand(Experiment):
    """`cascade resume`: how to resume a launch."""

    at_once: int = 1
    """Maximum number of concurrent jobs of a local launch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.at_once >= 1, f"at_once={self.at_once}: it must be at least 1")


@dataclass
class LogsCommand(Experiment):
    """`cascade logs`: which log of a run to show, and how much of it."""

    rank: int | None = None
    """Show the log of this rank; null: the output of the newest job."""
    lines: int = 40
    """Number of last lines to show."""
    follow: bool = False
    """Keep printing new lines until Ctrl-C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lines >= 1, f"lines={self.lines}: it must be at least 1")


@dataclass
class PlanCommand(Experiment):
    """`cascade plan`: the hardware to plan for."""

    doctor: bool = False
    """Also test everything for real: credentials, stores, weights, one batch, one step, writing and reading one
    checkpoint."""
    mfu: float = 0.4
    """Model FLOPs utilization (MFU) to assume."""
    gpu: str | None = None
    """h100, h200, a100, ... or cpu (measured on this machine); null: h100, or cpu if cluster.gpus=false."""
    memory_gib: float = 0.0
    """Memory per GPU, GiB; 0: from the data sheet, or this machine's memory per process."""
    price: float = 2.0
    """Dollars per GPU hour."""
    store_gb_s: float = 1.0
    """Write speed of one node to the checkpoint store, GB/s."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.mfu <= 1, f"mfu={self.mfu}: it must be above 0 and at most 1")
        require(self.store_gb_s > 0, f"store_gb_s={self.store_gb_s}: it must be positive")
        for name in ("price", "memory_gib"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: it must not be negative")


@dataclass
class CheckpointsCommand(Experiment):
    """`cascade checkpoints`: what to do with which checkpoints of a run."""

    action: str = "list"
    """`list`, `verify`, `diff` or `export`."""
    steps: list[int] = field(default_factory=list)
    """Steps of the checkpoints; empty: all (verify), the newest (export), the two newest (diff)."""
    output: str | None = None
    """`export`: the safetensors file to write."""
    average: int = 0
    """`export`: index of the average in ema.decays; -1: the raw weights."""
    sigma_rel: float | None = None
    """`export`: reconstruct the average of this relative width from the stored ones (ema.profile=power)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("action", self.action, ("list", "verify", "diff", "export"))
        require(self.action != "export" or bool(self.output), "output: action=export needs the file to write")
        require(
            self.sigma_rel is None or 0 < self.sigma_rel < 0.288,
            f"sigma_rel={self.sigma_rel}: it must lie between 0 and 0.288",
        )


@dataclass
class EmbedCommand(Experiment):
    """`cascade embed`: where the embeddings go, and which share of the shards this process handles."""

    output: str | None = None
    """Directory or s3:// prefix for the embeddings; null: next to the shards. Training reads it as data.embeddings."""
    part: int = 0
    """Which of the `parts` shares this process handles, from 0."""
    parts: int = 1
    """Number of shares: this process handles the shards whose number is `part` modulo `parts`. The tasks of a Slurm
    array divide the work automatically."""
    dtype: str = "bf16"
    """`bf16` or `int8` (half the size)."""
    batch: int = 64
    """Captions per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("dtype", self.dtype, ("bf16", "int8"))
        require(self.batch >= 1, f"batch={self.batch}: it must be at least 1")
        require(0 <= self.part < self.parts, f"part={self.part}: it must lie between 0 and parts - 1={self.parts - 1}")


@dataclass
class VlmConfig:
    """The vision-language model of `cascade caption`."""

    path: str | None = None
    """Local directory of the model, with its processor, in transformers format (LLaVA, Qwen-VL, SmolVLM, ...)."""
    prompt: str = field(
        default="Describe this picture in two or three sentences: what it shows, where, the colours and the style.",
        metadata=SENTENCES,
    )
    """The prompt for every picture."""
    max_tokens: int = 128
    """Maximum length of a caption, in tokens of the model."""
    side: int = 448
    """Pictures are decoded so that their shorter side is about this long, pixels."""
    dtype: str = "bf16"
    """Number format of the model: `bf16` or `fp32`."""

    def __post_init__(self) -> None:
        one_of("vlm.dtype", self.dtype, ("bf16", "fp32"))
        require(bool(self.prompt), "vlm.prompt: it is empty; give the model a prompt")
        at_least(self, "vlm", max_tokens=1, side=1)


@dataclass
class CaptionCommand(Experiment):
    """`cascade caption`: which model describes the pictures, and which share of the shards this process handles."""

    vlm: VlmConfig = field(default_factory=VlmConfig)
    output: str | None = None
    """Directory or s3:// prefix for the captions. Training reads it as data.captions.files."""
    part: int = 0
    """Which of the `parts` shares this process handles, from 0."""
    parts: int = 1
    """Number of shares: this process handles the shards whose number is `part` modulo `parts`. The tasks of a Slurm
    array divide the work automatically."""
    batch: int = 16
    """Pictures per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, f"batch={self.batch}: it must be at least 1")
        require(0 <= self.part < self.parts, f"part={self.part}: it must lie between 0 and parts - 1={self.parts - 1}")


@dataclass
class AblateConfig:
    """How `cascade ablate` measures ingredients."""

    seeds: int = 3
    """Number of trainings per arm, with the seeds `seed`, `seed` + 1, ...; at least 2, to give an interval."""
    output: str | None = None
    """Directory for the trainings, ablate.json and ablate.png; null: RUN_DIR-ablation."""
    levels: list[float] = field(default_factory=lambda: [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
    """Increasing log-SNRs at which to measure the x0 error of every arm; negative: mostly noise."""
    together: bool = False
    """Also train one arm with all the ingredients that are not already in the experiment."""
    dry_run: bool = False
    """Print the arms and the command of each training, without training."""

    def __post_init__(self) -> None:
        require(self.seeds >= 2, f"ablate.seeds={self.seeds}: it must be at least 2; one training gives no interval")
        require(self.output != "", "ablate.output: it is empty; name a directory, or use null")
        distinct = self.levels and self.levels == sorted({*self.levels})
        require(bool(distinct), f"ablate.levels={self.levels}: give at least one log-SNR, in increasing order")


@dataclass
class AblateCommand(Experiment):
    """`cascade ablate`: an experiment, and how to measure its ingredients."""

    ablate: AblateConfig = field(default_factory=AblateConfig)


@dataclass(frozen=True)
class Verb:
    """Everything the program knows about one command."""

    config: type[Experiment]
    """Its settings."""
    module: str
    """The module whose `main(config)` runs it."""
    line: str
    """Its description in the list of commands."""
    examples: tuple[str, ...]
    """Command lines shown by its help."""
    sections: tuple[str, ...]
    """Sections that its help lists in addition to its own keys; all other sections exist too."""
    outputs: tuple[str, ...] = ()
    """Keys of the paths it writes to; each job of a --multirun appends the values that differ."""
    local: tuple[str, ...] = ()
    """Keys that must name local directories: files that people read, and that are written incrementally, stay local."""
    draws: bool = False
    """It samples with the stages and settings of a bundle: `stage.*` would have no effect, and is refused."""
    trains: bool = False
    """It builds a model for training: stage, batch and number of processes must be compatible."""
    run_dir: str = ""
    """Its default run directory, if not that of conf/base.yaml."""
    bare: str = ""
    """Key of the list that arguments without a key belong to."""
    distributed: bool = False
    """A Slurm job starts it once per rank, on every node; other commands are one process on one node."""
    continues: bool = False
    """When it is stopped, what is finished is kept, and the same command does the rest."""

    @property
    def makes_run(self) -> bool:
        """Whether it trains in a run directory, so that the same command resumes it."""
        return self.trains and self.distributed


EVERYTHING = (
    "run",
    "train",
    "data",
    "stage",
    "text",
    "optimizer",
    "ema",
    "lora",
    "dino",
    "repa",
    "perceptual",
    "zero",
    "precision",
    "validation",
    "evaluation",
    "checkpoint",
    "wandb",
    "trackers",
    "cluster",
    "seed",
)
COMMANDS: dict[str, Verb] = {
    "prepare": Verb(
        Experiment,
        "data_pipeline.commands.prepare",
        "draw, import or repack data into WebDataset shards",
        (
            "cascade prepare experiment=demo",
            "cascade prepare prepare.kind=folder prepare.source=pictures/ prepare.output=data/mine "
            "prepare.max_side=512",
        ),
        ("prepare", "seed"),
        continues=True,
    ),
    "index": Verb(
        IndexCommand,
        "data_pipeline.commands.index",
        "read shards once and write their index",
        ("cascade index 'data.shards=s3://bucket/laion/{00000..00999}.tar'",),
        ("data",),
        continues=True,
    ),
    "verify": Verb(
        VerifyCommand,
        "data_pipeline.commands.verify",
        "read and decode every sample as training would, and report damage",
        ("cascade verify data.shards=data/mine report=true output=verify",),
        ("data", "stage"),
        outputs=("output",),
    ),
    "order": Verb(
        OrderCommand,
        "data_pipeline.commands.order",
        "show which samples a run would read, batch by batch",
        ("cascade order data.shards=data/mine data.global_batch=64 world_size=4 position=0 batches=2",),
        ("data", "seed"),
    ),
    "embed": Verb(
        EmbedCommand,
        "training.commands.embed",
        "compute the text embeddings of all captions once, next to the shards",
        ("cascade embed data.shards=data/mine text=t5 text.path=google/t5-v1_1-xxl output=data/mine-t5",),
        ("data", "text"),
        outputs=("output",),
        continues=True,
    ),
    "caption": Verb(
        CaptionCommand,
        "training.commands.caption",
        "caption the pictures with a local vision-language model",
        ("cascade caption data.shards=data/mine vlm.path=models/vlm output=data/mine-captions",),
        ("data",),
        outputs=("output",),
        continues=True,
    ),
    "train": Verb(
        Experiment,
        "training.train",
        "train one stage; repeat the command to resume",
        (
            "cascade train experiment=demo stage=demo_sr",
            "cascade train stage=base64 text=t5 text.path=google/t5-v1_1-xxl precision=bf16 zero=zero2 "
            "'data.shards=s3://bucket/laion/{00000..00999}.tar' data.global_batch=2048 run.name=first",
            "cascade train experiment=demo --multirun optimizer.lr=1e-4,3e-4",
        ),
        EVERYTHING,
        outputs=("run.dir", "checkpoint.dir"),
        local=("run.dir",),
        trains=True,
        distributed=True,
    ),
    "ablate": Verb(
        AblateCommand,
        "training.ablation.ablate",
        "measure what each ingredient gains, by paired trainings with and without it",
        (
            "cascade ablate experiment=demo ingredient=muon train.steps=200",
            "cascade ablate experiment=demo 'ingredient=[muon,x_pred_v_loss]' ablate.seeds=5 ablate.dry_run=true",
        ),
        EVERYTHING,
        outputs=("run.dir", "ablate.output"),
        local=("run.dir", "ablate.output"),
        trains=True,
        continues=True,
    ),
    "distill": Verb(
        DistillCommand,
        "training.train",
        "distil a trained stage, with its guidance, to a few sampling steps; repeat the command to resume",
        (
            "cascade distill experiment=demo stage=demo_base train.steps=400 optimizer.lr=1e-3",
            "cascade distill experiment=demo stage=demo_sr distill.steps=2 train.steps=200 optimizer.lr=1e-3",
            "cascade distill stage=base64 run.name=first distill.steps=4 distill.guidance=4 train.steps=20000 "
            "'data.shards=s3://bucket/laion/{00000..00999}.tar' data.global_batch=2048",
        ),
        ("distill", *EVERYTHING),
        outputs=("run.dir", "checkpoint.dir"),
        local=("run.dir",),
        trains=True,
        distributed=True,
        run_dir="runs/${run.name}/${stage.name}_${distill.steps}steps",
    ),
    "bundle": Verb(
        Experiment,
        "training.cascade.bundle",
        "collect the stages' averaged weights into one directory",
        (
            "cascade bundle experiment=demo",
            "cascade bundle 'bundle.runs=[runs/a/base64,runs/a/sr256]' bundle.dir=runs/a/bundle",
        ),
        ("bundle",),
    ),
    "sample": Verb(
        SampleCommand,
        "training.commands.sample",
        "draw pictures from a bundle",
        (
            "cascade sample experiment=demo",
            "cascade sample from_bundle=runs/demo/bundle prompts='a red circle, on a white background'",
            "cascade sample from_bundle=runs/demo/bundle prompts=prompts.txt output=pictures guidance=4 num_images=2",
        ),
        ("sampling", "bundle", "seed"),
        outputs=("sampling.output", "output"),
        draws=True,
        local=("output", "sampling.output"),
        distributed=True,
        continues=True,
    ),
    "evaluate": Verb(
        EvaluateCommand,
        "training.commands.evaluate",
        "evaluate a bundle on held-out captions, or compare results",
        (
            "cascade evaluate experiment=demo",
            "cascade evaluate experiment=demo guidance=1.5 evaluation.output=runs/demo/guided",
            "cascade evaluate action=compare 'results=[runs/demo/evaluation,runs/demo/guided]'",
        ),
        ("evaluation", "bundle", "seed"),
        outputs=("evaluation.output",),
        draws=True,
        local=("evaluation.output",),
        distributed=True,
        continues=True,
    ),
    "checkpoints": Verb(
        CheckpointsCommand,
        "training.commands.checkpoints",
        "list, verify, compare and export checkpoints",
        (
            "cascade checkpoints run=runs/demo/demo_base",
            "cascade checkpoints run=runs/demo/demo_base action=verify",
        ),
        ("run", "checkpoint"),
    ),
    "plan": Verb(
        PlanCommand,
        "training.plan.plan",
        "estimate memory, time and cost before spending an allocation",
        (
            "cascade plan experiment=modern stage=base64 cluster=slurm cluster.nodes=8",
            "cascade plan experiment=demo doctor=true",
        ),
        EVERYTHING,
        local=("run.dir",),
        trains=True,
    ),
    "launch": Verb(
        LaunchCommand,
        "slurm.commands.launch",
        "submit a command, a chain, or a whole cascade",
        (
            "cascade launch verb=all cluster=slurm experiment=demo dry_run=true",
            "cascade launch verb=all cluster=slurm experiment=demo "
            '\'bundle.students=["demo_base distill.steps=4","demo_sr distill.steps=2"]\'',
            "cascade launch cluster=slurm experiment=demo dry_run=true",
            "cascade launch cluster=slurm experiment=demo "
            "verb=\"['train stage=demo_base','train stage=demo_sr',bundle]\"",
            "cascade launch cluster=slurm experiment=demo --multirun optimizer.lr=1e-4,3e-4",
            "cascade launch cluster=slurm experiment=demo verb=evaluate",
        ),
        ("cluster", "run"),
        outputs=("separate",),
        local=("run.dir",),
    ),
    "status": Verb(
        StatusCommand,
        "slurm.commands.status",
        "show the runs of a directory: state, speed, restarts, time left, cost",
        ("cascade status run=runs/demo", "cascade status run=runs/sweep sort=validation_loss"),
        ("run",),
    ),
    "compare": Verb(
        CompareCommand,
        "slurm.commands.compare",
        "compare runs: settings, curves, validation loss sample by sample",
        ("cascade compare runs/a/base64 runs/b/base64 output=compare.png",),
        ("run",),
        local=("output",),
        bare="runs",
    ),
    "logs": Verb(
        LogsCommand,
        "slurm.commands.logs",
        "show the end of a run's log, of its job or of one rank",
        ("cascade logs run=runs/demo/demo_base rank=3 follow=true",),
        ("run",),
    ),
    "resume": Verb(
        ResumeCommand,
        "slurm.commands.resume",
        "resubmit the unfinished jobs of a launch",
        ("cascade resume run=runs/demo", "cascade resume run=runs/demo/demo_base"),
        ("run",),
    ),
    "stop": Verb(
        Experiment,
        "slurm.commands.stop",
        "cancel the jobs of a run or an experiment; trainings save first",
        ("cascade stop run=runs/demo",),
        ("run",),
    ),
}
"""All commands by name; every other list of them is derived from this one."""
