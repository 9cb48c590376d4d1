"""`cascade launch`: writes the Slurm script of a command, and submits it.

The settings are composed now and frozen beside the script: a job that waits in the queue, or is requeued a month later,
runs with what was submitted, whatever has happened to conf/ since. Neither torch nor a GPU is needed where this runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipeline.common import python
from data_pipeline.common.errors import ConfigError, UserError
from training.cli.compose import composed, validate
from training.config.commands import COMMANDS, LaunchCommand
from training.config.experiment import Experiment
from training.plan.checks import check_named
from training.processes.endings import EXIT_PREEMPTED

TEMPLATE = Path(__file__).parent / "templates" / "job.sbatch"
OWN_KEYS = {f.name for f in fields(LaunchCommand)} - {f.name for f in fields(Experiment)} | {"json"}
TIME_LIMIT = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")
FOLLOWED = {
    **dict.fromkeys(("nodes", "N"), "cluster.nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "cluster.processes"),
    **dict.fromkeys(("cpus-per-task", "c"), "cluster.cpus_per_task"),
}
"""Options of sbatch that the script's srun needs as well -> the key that sets both."""
FROZEN = """\
# {title}
defaults:
  - schema_{verb}
  - quiet
  - _self_

{settings}"""


@dataclass
class Job:
    """One script: what it runs, where it lies, and what Slurm calls it."""

    verb: str
    words: list[str]
    config: Experiment
    script: Path
    settings: Path
    job_id: int | None = None

    def answer(self) -> dict[str, Any]:
        """For json=true."""
        return {
            "verb": self.verb,
            "script": str(self.script),
            "config": str(self.settings),
            "log": str(log_file(self.config)),
            "job_id": self.job_id,
        }


def main(config: LaunchCommand) -> dict[str, Any]:
    """Writes one script per command (`verb` may be a list), and submits each after the one before unless dry_run=true.

    Returns:
        script, config, log, verb and job_id of the first job, dry_run, and the same of all under `jobs`.

    Raises:
        UserError: no Slurm here, or it refused; ConfigError: settings that the submitted command would refuse.
    """
    if config.cluster.kind != "slurm":
        raise ConfigError(f"cluster.kind={config.cluster.kind}: `cascade launch` submits to Slurm, add cluster=slurm")
    if not TIME_LIMIT.fullmatch(config.cluster.time):
        raise ConfigError(
            f"cluster.time={config.cluster.time}: it must be a time limit as Slurm has it, 24:00:00 or 2-12:00:00"
        )
    chain = config.verb if isinstance(config.verb, list) else [config.verb]
    if not chain:
        raise ConfigError("verb=[]: name at least one command")
    if config.script and len(chain) > 1:
        raise ConfigError(
            f"script={config.script}: it names one file, but verb lists {len(chain)} commands; leave it out"
        )
    words = [*given_overrides(), *config.overrides]
    jobs = [write(str(entry), words, config.script, config.separate) for entry in chain]
    for before, job in zip([None, *jobs], jobs, strict=False):
        if config.dry_run:
            print(job.script.read_text())
        else:
            job.job_id = submit(job.script, after=before.job_id if before else None)
            print(
                f"submitted job {job.job_id}: cascade {job.verb} {shlex.join(word.lstrip('+') for word in job.words)}",
                flush=True,
            )
        print(f"script: {job.script}\nlog:    {log_file(job.config)}", flush=True)
    return {**jobs[0].answer(), "dry_run": config.dry_run, "jobs": [job.answer() for job in jobs]}


def given_overrides() -> list[str]:
    """What the user typed after `cascade launch`, without the keys that are the launcher's own."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    typed = [str(word) for word in HydraConfig.get().overrides.task]
    return [word for word in typed if word.partition("=")[0].lstrip("+~") not in OWN_KEYS]


def write(entry: str, words: list[str], script: str | None, separate: str = "") -> Job:
    """Composes and checks one command of the chain ("train stage=demo_sr"), and writes its script and settings."""
    try:
        verb, *own = shlex.split(entry) or [""]
    except ValueError as error:
        raise ConfigError(f"verb={entry}: a quotation mark is open ({error})") from error
    if verb not in COMMANDS or verb == "launch":
        others = ", ".join(v for v in COMMANDS if v != "launch")
        raise ConfigError(f"verb={entry}: it must be one of {others}")
    words = [*words, *own]
    cfg = composed(verb, words)
    if separate:
        words.append(f"run.dir={cfg.run.dir}/{separate}")
        cfg = composed(verb, words)
    config = validate(verb, cfg)
    check_named(verb, config)
    if config.cluster.processes < 1:
        raise ConfigError("cluster.processes=0: a Slurm job needs the number of processes per node (usually its GPUs)")
    if script and Path(script).suffix == ".yaml":
        raise ConfigError(
            f"script={script}: the settings are written beside it under this name; give it another ending"
        )
    path = Path(script) if script else next_script(Path(config.run.dir) / "launch", verb)
    job = Job(verb, words, config, path.absolute(), path.absolute().with_suffix(".yaml"))
    title = f"cascade {verb} {shlex.join(word.lstrip('+') for word in words)}".strip()
    title = " ".join(title.split())  # it stands in comments
    text = render(job, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    job.settings.write_text(FROZEN.format(title=title, verb=verb, settings=OmegaConf.to_yaml(cfg)))
    job.script.write_text(text)
    log_file(config).parent.mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    return job


def next_script(folder: Path, verb: str) -> Path:
    """A file name that no earlier launch has taken: a queued job still reads the settings beside its own."""
    taken = [int(p.stem.rpartition("-")[2]) for p in folder.glob(f"{verb}-[0-9]*.sbatch")]
    return folder / f"{verb}-{max(taken, default=0) + 1:03d}.sbatch"


def log_file(config: Experiment) -> Path:
    """Where Slurm appends the output of the job and of all its restarts (%j: the job's number)."""
    return Path(config.run.dir).absolute() / "logs" / "slurm-%j.log"


# --------------------------------------------------------------------------------------------------- the script


def render(job: Job, title: str) -> str:
    """The text of the sbatch script."""
    cluster = job.config.cluster
    tasks = (
        f"--nodes={cluster.nodes} --ntasks-per-node={cluster.processes}"
        if is_distributed(job)
        else "--nodes=1 --ntasks=1"
    )
    cpus = f" --cpus-per-task={cpus_per_task(job)}" if cluster.cpus_per_task else ""
    command = [*python.module("training.cli"), job.verb]
    command += ["--config-dir", str(job.settings.parent), "--config-name", job.settings.stem]
    values = {
        "title": title,
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(job)),
        "directory": shlex.quote(str(Path.cwd())),
        "logs": shlex.quote(str(log_file(job.config).parent)),
        "environment": "\n".join(environment(job)),
        "setup": "\n".join(cluster.setup) + ("\n" if cluster.setup else ""),
        "signal_s": str(cluster.signal_s),
        "preempted": str(EXIT_PREEMPTED),
        "srun": tasks + cpus,
        "command": shlex.join(command),
        "requeue": REQUEUE if cluster.requeue else 'echo "==> stopped before its end; submit it again to go on"',
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text())


REQUEUE = """\
echo "==> not finished: requeue, $(date '+%F %T')"
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 600    # Slurm ends this script; if it left by itself, the job could count as done
    fi"""


def is_distributed(job: Job) -> bool:
    """Whether srun starts one process per rank, on every node."""
    return COMMANDS[job.verb].distributed


def cpus_per_task(job: Job) -> int:
    """CPU cores per task; a command of one task gets those of a whole node's processes."""
    cluster = job.config.cluster
    return cluster.cpus_per_task if is_distributed(job) else cluster.cpus_per_task * cluster.processes


def directives(job: Job) -> list[str]:
    """The #SBATCH options; `cluster.sbatch` comes last and so overrides the others."""
    cluster, config = job.config.cluster, job.config
    options: dict[str, Any] = {
        "job-name": f"{config.run.name}-{config.stage.name if job.verb == 'train' else job.verb}".replace("/", "-"),
        "nodes": cluster.nodes if is_distributed(job) else 1,
        "ntasks-per-node": cluster.processes if is_distributed(job) else 1,
        "cpus-per-task": cpus_per_task(job) or None,
        "gpus-per-node": cluster.processes if cluster.gpus else None,
        "mem": cluster.mem,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "output": log_file(config),
        "open-mode": "append",
        "requeue" if cluster.requeue else "no-requeue": True,
        "signal": f"B:USR1@{cluster.signal_s}",
    }
    for name in cluster.sbatch:
        if key := FOLLOWED.get(str(name).lstrip("-")):
            raise ConfigError(f"cluster.sbatch.{name}: srun would not follow it; set {key}")
    options |= {str(name).lstrip("-"): value for name, value in cluster.sbatch.items()}
    return [
        f"--{name}" if value is True else f"--{name}={quoted(name, value)}"
        for name, value in options.items()
        if wanted(value)
    ]


def quoted(name: str, value: Any) -> str:
    """A value as a directive has it: sbatch cuts at blanks, unless there are quotation marks."""
    text = str(value)
    if re.search(r"[\"\n\r]", text):
        raise ConfigError(f"#SBATCH --{name}={text!r}: Slurm reads neither quotation marks nor line ends there")
    return f'"{text}"' if re.search(r"[\s#'\\]", text) else text


def wanted(value: Any) -> bool:
    """Options that are null or false are left out."""
    return value is not None and value is not False


def environment(job: Job) -> list[str]:
    """Lines that tell the processes where they are."""
    cluster = job.config.cluster
    threads = cluster.threads or cluster.cpus_per_task
    lines = [f"export OMP_NUM_THREADS={threads}"] if threads else []
    if path := python.environment().get("PYTHONPATH"):  # a checkout that is not installed
        lines.append(f"export PYTHONPATH={shlex.quote(path)}")
    if is_distributed(job):
        lines += [
            "export CASCADE_SRUN=1  # rank, local rank and world size are Slurm's",
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            "export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))",
        ]
    return lines


# ------------------------------------------------------------------------------------------------- submission


def submit(script: Path, after: int | None = None) -> int:
    """Gives the script to Slurm; returns the job's number.

    Args:
        after: the job starts when this one has succeeded, and is cancelled when it has failed.

    Raises:
        UserError: no sbatch on this machine, or Slurm refused, with its reason.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            f"sbatch is not on this machine's PATH: run this on a login node of the cluster, or with dry_run=true to "
            f"write the script only (it is in {script})"
        )
    chain = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{after}"] if after else []
    done = subprocess.run([sbatch, "--parsable", *chain, str(script)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"Slurm refused {script}: {reason}")
    return int(done.stdout.strip().partition(";")[0])
