"""The jobs of a whole cascade, and what each waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.common.errors import ConfigError
from training.config.experiment import Experiment

JOBS = "jobs"
"""Directory, beside the runs, of the scripts and logs of what is no training."""


@dataclass
class GraphNode:
    """A command of the graph before it is composed.

    Attributes:
        words: of its own, beside those of the whole launch.
        after: names of the entries that it waits for.
        array: tasks that share its work, as --array has it.
    """

    name: str
    verb: str
    words: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    array: str | None = None


def cascade_graph(config: Experiment, parts: int) -> list[GraphNode]:
    """prepare (where the experiment draws its data) -> index -> embed -> every stage at once -> bundle -> evaluate.

    The stages do not need each other to train: super-resolution starts from pictures that are scaled down.

    Args:
        parts: tasks that share the embedding.

    Raises:
        ConfigError: no stages or no data are named.
    """
    if not config.bundle.runs:
        raise ConfigError("verb=all: bundle.runs names no stage; choose an experiment, experiment=demo")
    if not config.data.shards:
        raise ConfigError("verb=all: data.shards names no data; data.shards='s3://bucket/{0000..0999}.tar'")
    runs = [Path(run) for run in config.bundle.runs]
    home = f"run.dir={runs[0].parent / JOBS}"
    embeddings = str(config.data.embeddings or runs[0].parent / "embeddings")
    entries = [GraphNode("prepare", "prepare", [home])] if _drawn(config) else []
    entries.append(GraphNode("index", "index", [home], [entry.name for entry in entries]))
    array = f"0-{parts - 1}" if parts > 1 else None
    entries.append(GraphNode("embed", "embed", [home, f"output={embeddings}"], ["index"], array))
    stages = [
        GraphNode(f"train-{run.name}", "train", [f"stage={run.name}", f"data.embeddings={embeddings}"], ["embed"])
        for run in runs
    ]
    entries += stages
    entries.append(GraphNode("bundle", "bundle", [home], [entry.name for entry in stages]))
    entries.append(GraphNode("evaluate", "evaluate", [home], ["bundle"]))
    return entries


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
