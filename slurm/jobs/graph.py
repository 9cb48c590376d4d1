"""The jobs of a whole cascade, and what each waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.common.errors import ConfigError
from training.config.commands import COMMANDS, LaunchCommand
from training.config.experiment import Experiment

SUCCEEDED, BEGUN = "succeeded", "begun"
"""What a job waits for: that those before it have succeeded, or that they have begun."""
ALONE = ("cluster.nodes=1", "cluster.min_nodes=0", "cluster.processes=1")
"""Words of a job that needs one device."""
JOBS = "jobs"
"""Directory, beside the runs, of the scripts and logs of what is no training."""


@dataclass
class GraphNode:
    """A command of the graph before it is composed.

    Attributes:
        words: of its own, beside those of the whole launch.
        after: names of the entries that it waits for.
        when: what it waits for, SUCCEEDED or BEGUN.
        array: tasks that share its work, as --array has it.
        home: directory of its script, log and records; null: its run directory.
    """

    name: str
    verb: str
    words: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    when: str = SUCCEEDED
    array: str | None = None
    home: str | None = None


def cascade_graph(config: LaunchCommand, words: Sequence[str] = ()) -> list[GraphNode]:
    """prepare (where the experiment draws its data) -> index -> embed -> every stage at once -> bundle -> evaluate; and
    beside each stage an evaluation of its checkpoints as they come.

    The stages do not need each other to train: super-resolution starts from pictures that are scaled down.

    Args:
        words: what the user typed.

    Raises:
        ConfigError: no stages or no data are named, or a word that cannot be meant for all.
    """
    if not config.bundle.runs:
        raise ConfigError("verb=all: bundle.runs lists no stages; choose an experiment, for example experiment=demo")
    if not config.data.shards:
        raise ConfigError("verb=all: data.shards is not set; for example, data.shards='s3://bucket/{0000..0999}.tar'")
    for word in words:
        key = word.partition("=")[0].lstrip("+")
        if key in ("run", "run.dir", "stage"):
            raise ConfigError(f"{word}: verb=all has a run for each of bundle.runs; set run.name, or bundle.runs")
    if config.separate:
        raise ConfigError(
            "--multirun with verb=all: sweep the training of one stage (verb=train), then launch the best"
        )
    runs = [Path(run) for run in config.bundle.runs]
    home = str(runs[0].parent / JOBS)
    embeddings = str(config.data.embeddings or runs[0].parent / "embeddings")
    parts = config.embed_tasks
    array = f"0-{parts - 1}" if parts > 1 else None
    entries = [GraphNode("prepare", "prepare", home=home)] if _drawn(config) else []
    entries.append(GraphNode("index", "index", after=[entry.name for entry in entries], home=home))
    entries.append(GraphNode("embed", "embed", [f"output={embeddings}"], ["index"], array=array, home=home))
    stages = []
    for run in runs:
        own = [f"stage={run.name}", f"run.dir={run}", f"data.embeddings={embeddings}"]
        stages.append(GraphNode(f"train-{run.name}", "train", own, ["embed"]))
    entries += stages
    entries.append(GraphNode("bundle", "bundle", after=[entry.name for entry in stages], home=home))
    entries.append(GraphNode("evaluate", "evaluate", after=["bundle"], home=home))
    for run, training in zip(runs, stages, strict=True) if config.evaluate_checkpoints else ():
        own = ["watch=true", f"run.dir={run}", *ALONE]
        entries.append(GraphNode(f"watch-{run.name}", "evaluate", own, [training.name], BEGUN, home=home))
    return entries


def words_for(verb: str, words: Sequence[str]) -> list[str]:
    """Those of a whole cascade's words that concern this command: one that draws takes the stages from the bundle."""
    if not COMMANDS[verb].draws:
        return list(words)
    return [word for word in words if not word.lstrip("+~").startswith("stage.")]


def _drawn(config: Experiment) -> bool:
    """Whether `cascade prepare` makes the data of this experiment from nothing."""
    below = [str(shards).startswith(config.prepare.output) for shards in _listed(config.data.shards)]
    return config.prepare.kind == "draw" and all(below)


def _listed(shards: object) -> list[object]:
    listed = list(shards) if isinstance(shards, (list, tuple)) else [shards]
    return [pattern for one in listed for pattern in (_listed(one["shards"]) if isinstance(one, dict) else [one])]


def levels(entries: Sequence[GraphNode]) -> list[list[GraphNode]]:
    """The entries by how many others they wait for in a row: those of one level may run at the same time."""
    depth: dict[str, int] = {}
    for entry in entries:  # what one waits for stands before it
        depth[entry.name] = 1 + max((depth[name] for name in entry.after), default=-1)
    return [[entry for entry in entries if depth[entry.name] == level] for level in range(max(depth.values()) + 1)]


def drawing(entries: Sequence[GraphNode]) -> str:
    """The graph in one line per level: `index -> embed -> train-a | train-b -> ...`, an arrow at each new level."""
    lines = []
    for number, level in enumerate(levels(entries)):
        arrow = "   └─► " if number else ""
        lines.append("   " * max(0, number - 1) + arrow + " | ".join(entry.name for entry in level))
    return "\n".join(lines)
