"""The graph of a whole cascade: its jobs, and what each waits for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.common.errors import ConfigError
from training.config.commands import COMMANDS, DistillCommand, LaunchCommand
from training.config.experiment import Experiment

SUCCEEDED, BEGUN = "succeeded", "begun"
"""When a job may start: after the jobs that it waits for have succeeded, or as soon as they have begun."""
ALONE = ("cluster.nodes=1", "cluster.min_nodes=0", "cluster.processes=1", "cluster.preflight_exclude=false")
"""Overrides for a job that needs only one device."""
STUDENTS = "bundle.students"
"""The key of `students_of`."""
JOBS = "jobs"
"""Directory, next to the runs, for the scripts and logs of jobs that are not trainings."""


@dataclass
class GraphNode:
    """A command of the graph, before its settings are composed.

    Attributes:
        name: unique in the graph.
        verb: the command.
        words: its own overrides, in addition to those of the whole launch.
        after: names of the entries that it waits for.
        when: SUCCEEDED or BEGUN.
        array: tasks that share its work, in the form of --array.
        home: directory of its script, log and records; None: its run directory.
    """

    name: str
    verb: str
    words: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    when: str = SUCCEEDED
    array: str | None = None
    home: str | None = None


def cascade_graph(config: LaunchCommand, words: Sequence[str] = ()) -> list[GraphNode]:
    """Return prepare (if the experiment draws its data) -> index -> embed -> all stages at once -> bundle -> evaluate.

    Alongside each stage, its checkpoints are evaluated as they appear (evaluate_checkpoints). The stages do not depend
    on each other: super-resolution is trained on downscaled pictures. A student waits for its teacher, and takes its
    place in the bundle.

    Args:
        config: settings of the launch.
        words: overrides typed by the user.

    Raises:
        ConfigError: there are no stages, no data or nothing to evaluate on, an override cannot apply to all jobs, or a
            student has no stage.
    """
    if not config.bundle.runs:
        raise ConfigError("verb=all: bundle.runs lists no stages; choose an experiment, for example experiment=demo")
    if not config.data.shards:
        raise ConfigError("verb=all: data.shards is not set; for example, data.shards='s3://bucket/{0000..0999}.tar'")
    evaluation = config.evaluation
    if evaluation.kind == "pictures" and not (evaluation.reference or evaluation.prompts):
        raise ConfigError(
            "verb=all: evaluation.reference is not set, but the cascade is evaluated at the end; give held-out shards "
            "that data.shards leaves out, for example evaluation.reference='s3://bucket/{0990..0999}.tar', or a list "
            "of prompts, evaluation.prompts=FILE"
        )
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
    students = {student.teacher: student for student in students_of(config)}
    taught = {}
    for teacher, student in students.items():
        own = [f"stage={teacher.name}", f"run.dir={student.run}", f"distill.teacher={teacher}"]
        own = [*student.words, *own, f"data.embeddings={embeddings}"]
        taught[teacher] = GraphNode(f"distill-{teacher.name}", "distill", own, [f"train-{teacher.name}"])
    entries += [*stages, *taught.values()]
    last = [taught.get(run, training).name for run, training in zip(runs, stages, strict=True)]
    drawn = [_bundle_of(students[run].run if run in students else run for run in runs)] if students else []
    entries.append(GraphNode("bundle", "bundle", drawn, last, home=home))
    entries.append(GraphNode("evaluate", "evaluate", after=["bundle"], home=home))
    watched: list[tuple[Path, GraphNode, list[str]]] = []
    if config.evaluate_checkpoints:
        watched += [(run, training, []) for run, training in zip(runs, stages, strict=True)]
    for teacher, student in students.items() if config.evaluate_checkpoints else ():
        # with the teachers of the other stages, which have begun: their own students may begin days later
        others = _bundle_of(student.run if run == teacher else run for run in runs)
        watched.append((student.run, taught[teacher], [others]))
    for run, training, more in watched:
        own = ["watch=true", f"run.dir={run}", *more, *ALONE]
        entries.append(GraphNode(f"watch-{run.name}", "evaluate", own, [training.name], BEGUN, home=home))
    return entries


@dataclass(frozen=True)
class Student:
    """A stage that is to be distilled.

    Attributes:
        teacher, run: run directories of the stage and of its student.
        words: overrides for `cascade distill`.
    """

    teacher: Path
    run: Path
    words: list[str]


def students_of(config: LaunchCommand) -> list[Student]:
    """Return the students of `bundle.students`: each entry is a stage of bundle.runs, followed by overrides of its own.

    Raises:
        ConfigError: an entry is not valid.
    """
    teachers = {Path(run).name: Path(run) for run in config.bundle.runs}
    found: dict[str, Student] = {}
    for entry in config.bundle.students:
        try:
            name, *words = shlex.split(entry) or [""]
        except ValueError as error:
            raise ConfigError(f"bundle.students={entry}: unbalanced quotation marks ({error})") from error
        if name not in teachers or name in found:
            why = "it is listed twice" if name in found else f"begin with one of {', '.join(teachers)} (bundle.runs)"
            raise ConfigError(f"bundle.students={entry}: {why}; for example, bundle.students=[{next(iter(teachers))}]")
        given = {key: value for key, _, value in (word.lstrip("+").partition("=") for word in words)}
        for key in ("run", "run.dir", "run.name", "stage", "experiment", "distill.teacher"):
            if key in given:
                raise ConfigError(f"bundle.students={entry}: verb=all decides {key} for each student; leave it out")
        steps = given.get("distill.steps") or config.distill.steps or DistillCommand().distill.steps
        teacher = teachers[name]
        found[name] = Student(teacher, teacher.with_name(f"{name}_{steps}steps"), words)
    return list(found.values())


def _bundle_of(runs: Iterable[Path]) -> str:
    """Return the override that makes these the stages of a bundle."""
    return f"bundle.runs={json.dumps([str(run) for run in runs])}"


def words_for(verb: str, words: Sequence[str]) -> list[str]:
    """Return the overrides of a whole cascade that apply to this command: one that draws reads its stages from the
    bundle, so those of `stage` do not; those of `distill` only apply to students, which the graph alone reads."""
    own = [STUDENTS, *(["stage."] if COMMANDS[verb].draws else []), *(["distill."] if verb != "distill" else [])]
    return [word for word in words if not word.lstrip("+~").startswith(tuple(own))]


def _drawn(config: Experiment) -> bool:
    """Return whether `cascade prepare` draws the data of this experiment."""
    below = [str(shards).startswith(config.prepare.output) for shards in patterns_of(config.data.shards)]
    return config.prepare.kind == "draw" and all(below)


def patterns_of(shards: object) -> list[object]:
    """Return the patterns of `data.shards`, those of a mixture too."""
    listed = list(shards) if isinstance(shards, (list, tuple)) else [shards]
    return [pattern for one in listed for pattern in (patterns_of(one["shards"]) if isinstance(one, dict) else [one])]


def levels(entries: Sequence[GraphNode]) -> list[list[GraphNode]]:
    """Group the entries by the length of the chain they wait for; those of one level may run at the same time."""
    depth: dict[str, int] = {}
    for entry in entries:  # entries come after those that they wait for
        depth[entry.name] = 1 + max((depth[name] for name in entry.after), default=-1)
    return [[entry for entry in entries if depth[entry.name] == level] for level in range(max(depth.values()) + 1)]


def drawing(entries: Sequence[GraphNode]) -> str:
    """Draw the graph, one line per level: `index -> embed -> train-a | train-b -> ...`, with an arrow at each level."""
    lines = []
    for number, level in enumerate(levels(entries)):
        arrow = "   └─► " if number else ""
        lines.append("   " * max(0, number - 1) + arrow + " | ".join(entry.name for entry in level))
    return "\n".join(lines)
