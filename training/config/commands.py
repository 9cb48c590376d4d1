"""The commands: what each one takes besides an experiment's sections, and the one table of what is known about them.
Imports neither torch nor deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_pipeline.config import at_least, require
from training.config.diffusion import DistillConfig
from training.config.experiment import SENTENCES, Experiment


@dataclass
class SamplerKeys(Experiment):
    """What `sample` and `evaluate` may change of a bundle's own sampler settings: one value, one per stage drawn, or a
    mapping by stage name."""

    guidance: Any = None
    """One number, or one per stage; null: the bundle's."""
    steps: Any = None
    """Sampling steps, one number or one per stage; null: the bundle's."""
    sampler: Any = None
    """`ddpm`, `ddim`, `heun` or `dpmpp_2m`, one or one per stage; null: the bundle's."""
    aug_level: Any = None
    """Noise put on the picture that super-resolution starts from, one number or one per stage; null: the bundle's."""
    spacing: Any = None
    """Where the steps lie: `time`, `log_snr`, `karras` or `auto`, one or one per stage; null: the bundle's."""
    threshold: Any = None
    """`none`, `static` or `dynamic`, one or one per stage; null: the bundle's."""
    original_side: Any = None
    """Stages with size_condition: shorter side of the original that a picture is drawn as if from, pixels, one or one
    per stage; null: the bundle's."""

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """Of `Cascade.draw`."""
        return {key: getattr(self, key) for key in SAMPLER_KEYS}


SAMPLER_KEYS = ("guidance", "steps", "sampler", "aug_level", "spacing", "threshold", "original_side")
ACTIONS = ("evaluate", "reference", "compare", "pareto", "bisect")


@dataclass
class EvaluateCommand(SamplerKeys):
    """`cascade evaluate`: its own keys stand at the top level."""

    action: str = "evaluate"
    """`evaluate` a bundle; make `reference` statistics; `compare` results picture by picture; `pareto`: the curve of
    distance against CLIP score over results of a sweep; `bisect`: the stored checkpoint of `run` at which `figure`
    turned worse."""
    results: list[str] = field(default_factory=list)
    """`compare`, `pareto`: result.json files or their directories."""
    record: bool = False
    """`evaluate`: also write the figures and their protocol into the bundle's model card; `pareto`: those of the point
    with the least distance, whose sampler settings become the bundle's."""
    watch: bool = False
    """Evaluate each committed checkpoint of the run `run.dir` once, newest first, until the run is complete."""
    figure: str = ""
    """`watch`, `bisect`: the figure that decides which checkpoint is better, for example kid.inception; empty: KID by
    the last features."""
    stop_after: int = 0
    """`watch`: ask the run to stop once so many checkpoints in a row are worse than the best by more than chance; 0:
    never."""
    steps_between: list[int] = field(default_factory=list)
    """`bisect`: a good and a bad step, [GOOD,BAD]; empty: the first and the newest checkpoint."""
    wait_s: float = 3600.0
    """`watch`: give up after so long without a new checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.action in ACTIONS, f"action={self.action}: it must be {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}")
        require(
            not self.watch or self.action == "evaluate", f"watch=true: it belongs to action=evaluate, not {self.action}"
        )
        at_least(self, "evaluate", stop_after=0)
        require(self.wait_s > 0, f"wait_s={self.wait_s}: it must be positive")
        needs = self.action in ("compare", "pareto")
        require(needs or not self.results, f"results: action={self.action} reads none; say action=compare or pareto")
        require(not needs or len(self.results) > 1, f"results: action={self.action} needs at least two: results=[A,B]")


@dataclass
class SampleCommand(SamplerKeys):
    """`cascade sample`: its own keys stand at the top level."""

    prompts: Any = field(default=None, metadata=SENTENCES)
    """One prompt, a text file with one per line, or a list: '["a red circle, on white","a blue square"]'; null: the
    experiment's."""
    negative_prompts: Any = field(default=None, metadata=SENTENCES)
    """One for all prompts, or a list or file with one for each."""
    from_bundle: str | None = None
    """Bundle directory; null: bundle.dir."""
    output: str | None = None
    """Directory of the pictures; null: sampling.output."""
    num_images: int = 1
    """Pictures per prompt."""
    layout: str | None = None
    """Also arrange the pictures as another tool reads them: `flat`, `geneval`, `geneval2`, `dpg`,
    `t2i_compbench`, `parti` or `oneig`."""
    size: Any = None
    """Width and height of the final pictures, [WIDTH,HEIGHT] in pixels; null: what the last stage was trained for."""
    stages: Any = None
    """How many of the first stages to draw, or names of stages; null: all."""
    low_res: Any = None
    """Picture file, or one per prompt, to start from when the first of `stages` is super-resolution."""
    image: Any = None
    """Picture file, or one per prompt, to redraw (by `strength`, or where `mask` is light)."""
    mask: Any = None
    """Picture file, or one per prompt: `image` is redrawn where it is light; null: everywhere."""
    strength: Any = 1.0
    """How much of `image` is redrawn, above 0 to 1: one number for the first stage drawn, or one per stage."""
    batch: int = 16
    """Pictures drawn at once per device."""
    explain: bool = False
    """Heat maps of which words drew which pixels."""


@dataclass
class DistillCommand(Experiment):
    """`cascade distill`: an experiment's stage as the teacher of a student of four steps, unless it says otherwise."""

    distill: DistillConfig = field(default_factory=lambda: DistillConfig(steps=4))


@dataclass
class OrderCommand(Experiment):
    """`cascade order`: what a run would read."""

    world_size: int = 1
    """Processes of the run that is shown."""
    workers: int = 0
    """DataLoader workers of each process."""
    position: int = 0
    """Where to begin: samples consumed since step 0."""
    batches: int = 1
    """Global batches to show."""
    quality: bool = False
    """Also report, as a last line, how well the batches mix the data."""


@dataclass
class IndexCommand(Experiment):
    """`cascade index`: which shards, and whether to do them again."""

    rebuild: bool = False
    """Walk also shards that have an index, and write it anew."""


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
    chain, each job after the success of the one before; `all`: the whole cascade of the experiment, as a graph."""
    embed_tasks: int = 1
    """verb=all: tasks of an array that share the text embedding."""
    evaluate_checkpoints: bool = True
    """verb=all: a job beside each stage evaluates its checkpoints as they come (on one device)."""
    at_once: int = 0
    """Jobs of a launch on this machine, or of a --multirun, that run at the same time; 0: one here, all of a sweep."""
    overrides: list[str] = field(default_factory=list)
    """More key=value words for the submitted command."""
    dry_run: bool = False
    """Print and write the script without submitting it."""
    script: str | None = None
    """Where the script is written; null: RUN_DIR/launch/."""
    separate: str = ""
    """Appended to run.dir; --multirun sets it, so that each job has its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.embed_tasks >= 1, f"embed_tasks={self.embed_tasks}: it must be at least 1")
        require(self.at_once >= 0, f"at_once={self.at_once}: it must not be negative")


@dataclass
class StatusCommand(Experiment):
    """`cascade status`: how the runs of a directory are listed."""

    sort: str = "stage"
    """Column of the JSON answer to sort by: stage, state, step, validation_loss ..."""
    watch: float = 0.0
    """Seconds between two looks; 0: look once."""
    price: float = 2.0
    """Dollars per GPU hour."""
    html: str | None = None
    """File of a page with curves and sample grids, which needs no server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.watch >= 0, f"watch={self.watch}: it must not be negative")
        require(self.price >= 0, f"price={self.price}: it must not be negative")


@dataclass
class CompareCommand(Experiment):
    """`cascade compare`: which runs are set side by side."""

    runs: list[str] = field(default_factory=list)
    """Run directories; also typed without a key."""
    curves: list[str] = field(default_factory=lambda: ["loss", "validation_loss_ema"])
    """Numbers of metrics.jsonl to draw."""
    output: str = "compare.png"
    """Picture of the curves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len({*self.runs}) == len(self.runs), "runs: one is named twice")
        require(self.output.endswith(".png"), f"output={self.output}: it must end in .png")


@dataclass
class ResumeCommand(Experiment):
    """`cascade resume`: which run, or directory of an experiment, goes on."""

    at_once: int = 1
    """Jobs that run at the same time, of a launch on this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.at_once >= 1, f"at_once={self.at_once}: it must be at least 1")


@dataclass
class LogsCommand(Experiment):
    """`cascade logs`: which log of a run, and how much of it."""

    rank: int | None = None
    """The log of this process; null: that of the newest job, which has what was printed."""
    lines: int = 40
    """Last lines shown."""
    follow: bool = False
    """Go on with what is added, until Ctrl-C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lines >= 1, f"lines={self.lines}: it must be at least 1")


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
        super().__post_init__()
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
    """Which of `parts` shares of the shards this command does, from 0."""
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


@dataclass
class VlmConfig:
    """The vision-language model of `cascade caption`."""

    path: str | None = None
    """Its directory on this machine, as transformers stores it with its processor (LLaVA, Qwen-VL, SmolVLM, ...)."""
    prompt: str = field(
        default="Describe this picture in two or three sentences: what it shows, where, the colours and the style.",
        metadata=SENTENCES,
    )
    """What it is asked."""
    max_tokens: int = 128
    """Longest answer, in its tokens."""
    side: int = 448
    """Pictures are decoded to about this shorter side, pixels."""
    dtype: str = "bf16"
    """`bf16` or `fp32`."""

    def __post_init__(self) -> None:
        require(self.dtype in ("bf16", "fp32"), f"vlm.dtype={self.dtype}: it must be bf16 or fp32")
        require(bool(self.prompt), "vlm.prompt: it is empty; say what is asked")
        for name in ("max_tokens", "side"):
            require(getattr(self, name) >= 1, f"vlm.{name}={getattr(self, name)}: it must be at least 1")


@dataclass
class CaptionCommand(Experiment):
    """`cascade caption`: which model describes the pictures, and which share of the shards this process does."""

    vlm: VlmConfig = field(default_factory=VlmConfig)
    output: str | None = None
    """Directory or s3:// prefix of the captions. Training reads them by data.captions.files."""
    part: int = 0
    """Which share of the shards this process does, see `parts`."""
    parts: int = 1
    """This process does the shards whose number is `part` modulo `parts`; tasks of a Slurm array share by
    themselves."""
    batch: int = 16
    """Pictures described together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch >= 1, f"batch={self.batch}: it must be at least 1")
        require(0 <= self.part < self.parts, f"part={self.part}: it must lie between 0 and parts={self.parts} less 1")


@dataclass
class AblateConfig:
    """How `cascade ablate` measures ingredients."""

    seeds: int = 3
    """Trainings of each arm, with the seeds `seed`, `seed` + 1, ...; an interval needs two at least."""
    output: str | None = None
    """Directory of the trainings, ablate.json and ablate.png; null: RUN_DIR-ablation."""
    levels: list[float] = field(default_factory=lambda: [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
    """log-SNRs at which all arms are asked for the picture, from noise (negative) to clean."""
    together: bool = False
    """Also train with all ingredients that the experiment does not name itself at once."""
    dry_run: bool = False
    """Show the arms and the command of each training, and train none."""

    def __post_init__(self) -> None:
        require(self.seeds >= 2, f"ablate.seeds={self.seeds}: it must be at least 2; one training has no interval")
        require(self.output != "", "ablate.output: it is empty; name a directory, or leave it at null")
        distinct = self.levels and self.levels == sorted({*self.levels})
        require(bool(distinct), f"ablate.levels={self.levels}: give rising log-SNRs, one at least")


@dataclass
class AblateCommand(Experiment):
    """`cascade ablate`: an experiment, and how its ingredients are measured."""

    ablate: AblateConfig = field(default_factory=AblateConfig)


@dataclass(frozen=True)
class Verb:
    """One command: everything that the program knows about it."""

    config: type[Experiment]
    """Its settings."""
    module: str
    """Whose `main(config)` does it."""
    line: str
    """What it does, in the list of commands."""
    examples: tuple[str, ...]
    sections: tuple[str, ...]
    """Whose keys its help lists beside its own; all others exist too."""
    outputs: tuple[str, ...] = ()
    """Keys of the paths to which it writes; each job of a --multirun appends the values that differ."""
    local: tuple[str, ...] = ()
    """Keys that must name local directories: what is written file by file, and read by people, lies on a disk."""
    draws: bool = False
    """It draws with the stages and settings of a bundle: `stage.*` would change nothing, and is refused."""
    trains: bool = False
    """It builds a model for training: its stage, batch and processes must fit each other."""
    run_dir: str = ""
    """Where its run lies, in place of conf/base.yaml's run.dir."""
    bare: str = ""
    """Key of the list of words that are typed without a key."""
    distributed: bool = False
    """A Slurm job starts it once per rank, on every node; all others are one process on one node."""

    @property
    def makes_run(self) -> bool:
        """Whether it trains in a run directory, where the same command resumes."""
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
    ),
    "index": Verb(
        IndexCommand,
        "data_pipeline.commands.index",
        "walk shards once and write their index",
        ("cascade index 'data.shards=s3://bucket/laion/{00000..00999}.tar'",),
        ("data",),
    ),
    "verify": Verb(
        VerifyCommand,
        "data_pipeline.commands.verify",
        "read and decode every sample as training would; report what is broken",
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
        "compute the text embeddings of all captions once, beside the shards",
        ("cascade embed data.shards=data/mine text=t5 text.path=google/t5-v1_1-xxl output=data/mine-t5",),
        ("data", "text"),
        outputs=("output",),
    ),
    "caption": Verb(
        CaptionCommand,
        "training.commands.caption",
        "describe the pictures by a local vision-language model, beside the shards",
        ("cascade caption data.shards=data/mine vlm.path=models/vlm output=data/mine-captions",),
        ("vlm", "data"),
        outputs=("output",),
    ),
    "train": Verb(
        Experiment,
        "training.train",
        "train one stage; the same command again resumes",
        (
            "cascade train experiment=demo stage=demo_sr",
            "cascade train stage=base64 text=t5 text.path=google/t5-v1_1-xxl precision=bf16 zero=zero2 \\\n"
            "      'data.shards=s3://bucket/laion/{00000..00999}.tar' data.global_batch=2048 run.name=first",
            "cascade train experiment=demo --multirun optimizer.lr=1e-4,3e-4",
        ),
        EVERYTHING,
        outputs=("run.dir",),
        local=("run.dir",),
        trains=True,
        distributed=True,
    ),
    "ablate": Verb(
        AblateCommand,
        "training.ablation.ablate",
        "what ingredients gain: paired trainings with and without each",
        (
            "cascade ablate experiment=demo ingredient=muon train.steps=200",
            "cascade ablate experiment=demo 'ingredient=[muon,x_pred_v_loss]' ablate.seeds=5 ablate.dry_run=true",
        ),
        ("ablate", *EVERYTHING),
        outputs=("run.dir", "ablate.output"),
        local=("run.dir", "ablate.output"),
        trains=True,
    ),
    "distill": Verb(
        DistillCommand,
        "training.train",
        "teach a trained stage to draw in a few steps, guidance included; the same command again resumes",
        (
            "cascade distill experiment=demo stage=demo_base train.steps=400 optimizer.lr=1e-3",
            "cascade distill experiment=demo stage=demo_sr distill.steps=2 train.steps=200 optimizer.lr=1e-3",
            "cascade distill stage=base64 run.name=first distill.steps=4 distill.guidance=4 train.steps=20000 \\\n"
            "      'data.shards=s3://bucket/laion/{00000..00999}.tar' data.global_batch=2048",
        ),
        ("distill", *EVERYTHING),
        outputs=("run.dir",),
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
    ),
    "evaluate": Verb(
        EvaluateCommand,
        "training.commands.evaluate",
        "measure a bundle on held-out captions, or compare measured ones",
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
        "memory, time and cost before an allocation is spent",
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
        "how the runs of a directory get on: state, speed, restarts, end, cost",
        ("cascade status run=runs/demo", "cascade status run=runs/sweep sort=validation_loss"),
        ("run",),
    ),
    "compare": Verb(
        CompareCommand,
        "slurm.commands.compare",
        "what differs between runs: settings, curves, validation loss sample by sample",
        ("cascade compare runs/a/base64 runs/b/base64 output=compare.png",),
        ("run",),
        local=("output",),
        bare="runs",
    ),
    "logs": Verb(
        LogsCommand,
        "slurm.commands.logs",
        "the end of a run's log, of its job or of one rank",
        ("cascade logs run=runs/demo/demo_base rank=3 follow=true",),
        ("run",),
    ),
    "resume": Verb(
        ResumeCommand,
        "slurm.commands.resume",
        "submit again what a launch has not finished",
        ("cascade resume run=runs/demo", "cascade resume run=runs/demo/demo_base"),
        ("run",),
    ),
    "stop": Verb(
        Experiment,
        "slurm.commands.stop",
        "cancel the jobs of a run or of an experiment; a training saves first",
        ("cascade stop run=runs/demo",),
        ("run",),
    ),
}
"""All commands by name; whatever else lists them is derived from here."""
