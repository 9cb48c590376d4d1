"""`cascade launch`: writes what a scheduler needs for a command, a chain or a whole cascade, and submits it.

The settings are composed now and frozen next to the script, and so is the code: a job that waits in the queue, or is
requeued a month later, runs what was submitted, whatever has happened to the checkout since. Neither torch nor a GPU is
needed where this runs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import slurm.script
from data_pipeline.common.errors import ConfigError, UserError, about
from data_pipeline.storage import store
from slurm.array import render_array, sweep_folder
from slurm.emitters import emitter
from slurm.jobs.frozen import freeze
from slurm.jobs.graph import STUDENTS, GraphNode, cascade_graph, drawing, patterns_of, words_for
from slurm.jobs.job import Job
from slurm.jobs.records import SUBMITTED, append
from slurm.local import LocalRunner, local_record, render_local
from slurm.options import own_options
from slurm.queue import UNKNOWN, dependency, living, submit, withdraw
from training.cli.compose import composed, validate
from training.cli.overrides import keys_given, typed_words
from training.config.cluster import EMITTED
from training.config.commands import COMMANDS, LaunchCommand, Verb
from training.config.experiment import Experiment
from training.config.reads import refuse_unread_by_all
from training.plan.checks import check_named
from training.processes.ranks import is_search, is_sweep

SWEPT: list[tuple[Job, LaunchCommand]] = []
"""Jobs of a --multirun so far; Hydra composes them one after the other."""
OWN_KEYS = {f.name for f in fields(LaunchCommand)} - {f.name for f in fields(Experiment)} | {"json"}
ENDINGS = {"local": "sh", "slurm": "sbatch"}
"""Extensions of the scripts; emitters have their own."""
OF_SOME: dict[str, Callable[[Verb], bool]] = {
    "cluster.nodes": lambda verb: verb.distributed,
    **dict.fromkeys(
        ("cluster.min_nodes", "cluster.preflight", "cluster.preflight_exclude"), lambda verb: verb.makes_run
    ),
}
"""Keys of `cluster` that some commands follow."""
FROZEN = """\
# {title}
defaults:
  - schema_{verb}
  - quiet
  - _self_

{settings}"""


def main(config: LaunchCommand) -> dict[str, Any]:
    """Write one script per command (`verb` may be a list, or `all`) and, unless dry_run=true, submit each to run after
    those that it depends on. With cluster=local the jobs run here, immediately.

    Returns:
        name, verb, after, script, config, log and job_id of the first job, dry_run, and the same for all under `jobs`.

    Raises:
        UserError: Slurm is not installed here, or it refused.
        ConfigError: a setting that the launcher or the submitted command would refuse.
        SystemExit: a job on this machine failed.
    """
    local, in_sweep = config.cluster.kind == "local", is_sweep()
    words = [*given_overrides(), *config.overrides]
    entries = plan_entries(config, words)
    check_request(config, entries)
    jobs = compose_all(entries, words, config)
    if not config.dry_run:
        check_before_submission(jobs, config.cluster.kind)
        if config.verb == "all":
            check_data_exists(jobs)
    frozen = {folder: freeze(folder) for folder in {job.code for job in jobs}}
    for job in jobs:
        job.code = frozen[job.code]
        write_job(job)
    if local and len(jobs) > 1 and not config.dry_run:
        print(drawing(entries), flush=True)
    if in_sweep:
        SWEPT.extend((job, config) for job in jobs)
        codes = {}
    elif config.cluster.kind in EMITTED:
        codes = emit(jobs, config)
    else:
        codes = run_here(jobs, config) if local else submit_all(jobs, config.dry_run)
    if (not local or config.dry_run) and len(jobs) > 1:  # after the scripts, where it is not overlooked
        print(drawing(entries), flush=True)
    answers = [job.answer(str(log_of(job))) for job in jobs]
    if any(codes.values()):
        raise SystemExit(next(code for code in codes.values() if code))
    return {**answers[0], "dry_run": config.dry_run, "jobs": answers}


def check_request(config: LaunchCommand, entries: list[GraphNode]) -> None:
    """Check that the target, a sweep and a script of one's own can do what is asked.

    Raises:
        ConfigError: they cannot; it names the key and what to do instead.
    """
    kind, in_sweep, several = config.cluster.kind, is_sweep(), len(entries) > 1
    refusals = [
        (
            kind == "local" and not several,
            f"cluster=local: a single command needs no launch: `cascade {entries[0].verb} ...` is the same; verb=all "
            f"or a list of commands runs here in order, and cluster=slurm submits",
        ),
        (
            config.at_once and kind != "local" and not in_sweep,
            f"at_once={config.at_once}: the scheduler decides this; use it only with cluster=local or --multirun",
        ),
        (
            kind in EMITTED and (in_sweep or config.script),
            f"cluster.kind={kind}: script= and --multirun are for Slurm; launch each value separately",
        ),
        (
            is_search(),
            "hydra/sweeper: it chooses values by the results of earlier runs, but a launch only submits; use it with "
            "`cascade train` inside an allocation",
        ),
        (
            in_sweep and several,
            "--multirun: a sweep is one job array of one command; sweep verb=train, for example",
        ),
        (
            in_sweep and "output" in own_options(config.cluster),
            "cluster.sbatch.output: a sweep appends the output of each run to a log in its own run directory; leave it "
            "out",
        ),
        (
            config.script and several,
            f"script={config.script}: it names one file, but verb lists {len(entries)} commands; leave it out",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise ConfigError(sentence)
    if kind in EMITTED:
        emitter(kind).check_launch(config)


def given_overrides() -> list[str]:
    """Return what the user typed after `cascade launch`, without the launcher's own keys."""
    return [word for word in typed_words() if word.partition("=")[0].lstrip("+~") not in OWN_KEYS]


# -------------------------------------------------------------------------------------------------- which jobs


def plan_entries(config: LaunchCommand, words: list[str]) -> list[GraphNode]:
    """Return the commands that `verb` stands for: the graph of a cascade, or a chain.

    Raises:
        ConfigError: a command that does not exist or cannot be submitted, or see `cascade_graph`.
    """
    if config.verb == "all":
        return cascade_graph(config, words)
    chain = config.verb if isinstance(config.verb, list) else [config.verb]
    if not chain:
        raise ConfigError("verb=[]: give at least one command")
    entries: list[GraphNode] = []
    for text in chain:
        verb, *own = _split(str(text))
        stage = next((word.partition("=")[2] for word in [*own, *words] if word.startswith("stage=")), "")
        name = f"{verb}-{stage}" if stage and COMMANDS[verb].makes_run else verb
        taken = [entry.name for entry in entries]
        while name in taken:
            name += "+"
        entries.append(GraphNode(name, verb, own, taken[-1:]))
    return entries


def _split(entry: str) -> list[str]:
    """Split an entry such as "train stage=demo_sr" into words, and check that its verb can be submitted."""
    try:
        words = shlex.split(entry) or [""]
    except ValueError as error:
        raise ConfigError(f"verb={entry}: unbalanced quotation marks ({error})") from error
    others = [verb for verb in COMMANDS if verb not in NOT_SUBMITTED]
    if words[0] not in others:
        raise ConfigError(f"verb={entry}: it must be one of {', '.join(others)}, or all")
    return words


NOT_SUBMITTED = ("ablate", "launch", "status", "compare", "logs", "resume", "stop")
"""Commands that run where they are typed (`ablate` prints the trainings that it needs, to be launched)."""


def compose_all(entries: list[GraphNode], words: list[str], config: LaunchCommand) -> list[Job]:
    """Return the jobs with their composed and checked settings. Their scripts have names, but are not written yet.

    Raises:
        ConfigError: a setting that a command refuses or would not use.
    """
    jobs: list[Job] = []
    for entry in entries:
        own = [*(words_for(entry.verb, words) if config.verb == "all" else words), *entry.words]
        cfg = composed(entry.verb, own)
        if config.separate:
            given = keys_given(entry.verb, entry.words)
            places = dict.fromkeys(["run.dir", *COMMANDS[entry.verb].outputs])
            values = {key: OmegaConf.select(cfg, key) for key in places if key not in given}
            own += [f"{key}={value}/{config.separate}" for key, value in values.items() if value is not None]
            cfg = composed(entry.verb, own)
        if entry.array:
            OmegaConf.update(cfg, "cluster.sbatch.array", entry.array, force_add=True)
        jobs.append(_job(entry, own, validate(entry.verb, cfg), cfg, config.script, jobs))
        if config.verb != "all" or entry.verb == "distill":
            refuse_unread_by_all([(entry.verb, jobs[-1].config)], keys_given(entry.verb, entry.words))
    shared = dict.fromkeys(key for job in jobs for key in keys_given(job.verb, words))
    if config.verb == "all":
        shared.pop(STUDENTS, None)  # the graph has read it
    refuse_unread_by_all([(job.verb, job.config) for job in jobs], shared)
    for key in shared:
        if key in OF_SOME and not any(OF_SOME[key](COMMANDS[job.verb]) for job in jobs):
            raise ConfigError(f"{key}: none of the commands {', '.join(job.verb for job in jobs)} would use it")
    check_apart(jobs)
    return jobs


def check_apart(jobs: list[Job]) -> None:
    """Each training has its own place for checkpoints.

    Raises:
        ConfigError: two would write to the same.
    """
    places: dict[str, Job] = {}
    for job in jobs:
        place = str(job.config.checkpoint.dir or "").rstrip("/")
        if not (place and COMMANDS[job.verb].makes_run):
            continue
        other = places.setdefault(place, job)
        if other.run_dir != job.run_dir:
            raise ConfigError(
                f"checkpoint.dir={place}: {other.name} and {job.name} would both write there; give each its own, for "
                "example checkpoint.dir='s3://bucket/${run.name}/${stage.name}', and to a student another by its own "
                "words"
            )


def _job(
    entry: GraphNode, words: list[str], config: Experiment, cfg: Any, script: str | None, others: list[Job]
) -> Job:
    check_named(entry.verb, config)
    if config.cluster.processes < 1:
        raise ConfigError("cluster.processes=0: a job needs the number of processes per node (usually its GPUs)")
    if script and Path(script).suffix == ".yaml":
        raise ConfigError(f"script={script}: choose another extension: the settings file next to it uses this name")
    taken = [job.script for job in others]
    home = Path(entry.home or config.run.dir).absolute()
    kind = config.cluster.kind
    ending = emitter(kind).ENDING if kind in EMITTED else ENDINGS[kind]
    path = (Path(script) if script else next_script(home / "launch", entry.verb, taken, ending)).absolute()
    shared = [*(job.code.parent for job, _ in SWEPT), *(job.code for job in others)]  # those of a sweep are frozen
    title = " ".join(f"cascade {entry.verb} {shlex.join(word.lstrip('+') for word in words)}".split())
    text = FROZEN.format(title=title, verb=entry.verb, settings=OmegaConf.to_yaml(cfg))
    job = Job(
        name=entry.name,
        verb=entry.verb,
        words=words,
        config=config,
        script=path,
        settings=path.with_suffix(".yaml") if script else path.parent / f"{path.name.partition('.')[0]}.yaml",
        code=next(iter(shared), home / "launch" / "code"),
        title=title,
        frozen=text,
        home=home,
        after=entry.after,
        when=entry.when,
    )
    script_text(job)  # raises for impossible settings
    return job


def script_text(job: Job) -> str:
    """Return the text of the job's script. Raises `ConfigError` for settings that the scheduler cannot use."""
    kind = job.config.cluster.kind
    if kind in EMITTED:
        return emitter(kind).manifest(job)
    return render_local(job) if kind == "local" else slurm.script.render_script(job)


def log_of(job: Job) -> Path:
    """Return where the output of the job goes; %j stands for the number that it does not have yet."""
    if job.config.cluster.kind == "local":
        return job.home / "logs" / f"launch-{job.script.stem}.log"
    return slurm.script.log_file(job, job.job_id)


def next_script(folder: Path, verb: str, taken: list[Path], ending: str = "sbatch") -> Path:
    """Return a file name that no earlier launch has used: a queued job still reads the settings next to its script."""
    known = [path for kind in ("yaml", ending) for path in folder.glob(f"{verb}-[0-9]*.{kind}")]
    known += [path for path in taken if path.name.startswith(f"{verb}-")]
    numbers = [
        int(path.name.partition(".")[0].rpartition("-")[2])
        for path in known
        if path.parent.absolute() == folder.absolute()
    ]
    return folder / f"{verb}-{max(numbers, default=0) + 1:03d}.{ending}"


def check_before_submission(jobs: list[Job], kind: str) -> None:
    """Check for what would otherwise fail in the queue.

    Raises:
        UserError: Slurm is not installed here, or a job of the same run is alive.
    """
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not on this machine's PATH: run this on a login node of the cluster, or with dry_run=true to "
            f"write the script only (to {jobs[0].script.parent})"
        )
    for job in jobs:
        for other in living(job.run_dir) if COMMANDS[job.verb].makes_run else []:
            if not COMMANDS[other["verb"]].makes_run:
                continue
            is_there = f"is in the queue ({other['state']})"
            if other["state"] == UNKNOWN:
                is_there = f"may be in the queue: {other['reason']}"
            raise UserError(
                f"run.dir={job.config.run.dir}: job {other['job']} of this run {is_there}; two starts of one run would "
                f"displace each other: run `cascade stop run={job.config.run.dir}` first, or use another run.dir"
            )


def check_data_exists(jobs: list[Job]) -> None:
    """Check that the shards of a whole cascade are there, if they lie below the working directory, which all jobs share
    with this machine, and no job of the graph writes them. Others may be visible, or readable, only to the jobs.

    Raises:
        DataError: they are not.
    """
    if any(job.verb == "prepare" for job in jobs):
        return
    config = jobs[0].config
    for key, shards in (("data.shards", config.data.shards), ("evaluation.reference", config.evaluation.reference)):
        below = [str(one) for one in patterns_of(shards) if one and not os.path.isabs(str(one))]
        with about(key):
            for one in below:
                if not re.search("[:@]|[.]safetensors$", one):  # a store, another tool's notation, a file of features
                    store.expand(one)


# ------------------------------------------------------------------------------------------- files, submission


def write_job(job: Job) -> None:
    """Write the script and the settings."""
    job.script.parent.mkdir(parents=True, exist_ok=True)
    job.settings.write_text(job.frozen)
    job.script.write_text(script_text(job))
    log_of(job).parent.mkdir(parents=True, exist_ok=True)  # Slurm does not create it


def submit_all(jobs: list[Job], dry_run: bool) -> dict[str, int]:
    """Submit the jobs, or print their scripts. Returns no exit codes: nothing has run yet.

    Raises:
        UserError: Slurm refused a job; those submitted before it are cancelled.
    """
    began, waits = launch_id(), {job.name: job.after for job in jobs}
    for job in jobs:
        if dry_run:
            print(job.script.read_text())
        else:
            numbers = {other.name: other.job_id for other in jobs if other.job_id}
            try:
                job.job_id = submit(job.script, dependency(job.after, job.when, waits, numbers))
            except UserError as error:
                said = withdraw([other.job_id for other in jobs if other.job_id])
                raise UserError(f"{error}{said}") from error
            append(job.home / "launch" / SUBMITTED, {"job": job.job_id, **job_record(job, str(log_of(job)), began)})
            print(f"submitted job {job.job_id}: {job.title if len(jobs) == 1 else job.name}", flush=True)
        if dry_run or len(jobs) == 1:
            print(f"script: {job.script}\nlog:    {log_of(job)}", flush=True)
    if not dry_run:
        place = os.path.relpath(os.path.commonpath([str(job.home) for job in jobs]))
        print(f"follow: cascade status run={shlex.quote(place)} watch=30", flush=True)
    return {}


def emit(jobs: list[Job], config: LaunchCommand) -> dict[str, int]:
    """Write the file of the whole launch for another scheduler, and print how to submit it with the scheduler's tools.

    Returns no exit codes: nothing has run yet.
    """
    target = emitter(config.cluster.kind)
    if config.dry_run:
        print("\n".join(job.script.read_text() for job in jobs))
    name, ending = target.WHOLE
    path = next_script(jobs[0].script.parent, name, [], ending)
    path.write_text(target.whole(config.run.name, jobs, path))
    print(f"files: {', '.join(str(job.script) for job in jobs)}\nsubmit: {target.how(jobs, path)}", flush=True)
    return {}


def run_here(jobs: list[Job], config: LaunchCommand) -> dict[str, int]:
    """Run the jobs on this machine, or print their scripts; return their exit codes by name."""
    if config.dry_run:
        for job in jobs:
            print(job.script.read_text())
        return {}
    began = launch_id()
    records = [{**local_record(), **job_record(job, str(log_of(job)), began)} for job in jobs]
    for record in records:
        append(Path(record["home"]) / "launch" / SUBMITTED, record)
    return LocalRunner(records, config.at_once or 1).run()


def after_sweep() -> None:
    """Submit the jobs of a --multirun as one array; called by the command line after all have been composed.

    Raises:
        ConfigError: they request different resources.
        UserError: Slurm refused.
    """
    jobs, config = [job for job, _ in SWEPT], SWEPT[0][1]
    SWEPT.clear()
    folder = sweep_folder(jobs)
    script = next_script(folder / "launch", "array", [])
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(render_array(jobs, [job.script.read_text() for job in jobs], config.at_once))
    print(f"script: {script}", flush=True)
    if config.dry_run:
        print(script.read_text())
        return
    number = submit(script)
    began = launch_id()
    for task, job in enumerate(jobs):
        log = str(job.home / "logs" / f"slurm-{number}_{task}.log")
        append(job.home / "launch" / SUBMITTED, {"job": f"{number}_{task}", **job_record(job, log, began)})
    print(
        f"submitted job array {number}: {len(jobs)} runs\n"
        f"results: cascade status run={shlex.quote(os.path.relpath(folder))} sort=validation_loss",
        flush=True,
    )


def launch_id() -> str:
    """Return a random id shared by the records of one launch."""
    return uuid.uuid4().hex[:8]


def job_record(job: Job, log: str, launch: str) -> dict[str, Any]:
    """Return a line of jobs.jsonl, without the job number."""
    array = str(own_options(job.config.cluster).get("array") or "")
    return {
        "name": job.name,
        "verb": job.verb,
        "script": str(job.script),
        "log": log,
        "time": time.time(),
        "home": str(job.home),
        "run": str(job.run_dir),
        "after": job.after,
        "when": job.when,
        "launch": launch,
        "most": job.config.cluster.max_restarts_without_progress,
        **({"array": array} if array else {}),
    }
