"""The #SBATCH options of a job: ours, then those of `cluster.sbatch`, without two that contradict each other."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.common.errors import ConfigError
from training.config.cluster import EARLY_S, ClusterConfig, slurm_seconds

FOLLOWED = {
    **dict.fromkeys(("nodes", "N"), "cluster.nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "cluster.processes"),
    **dict.fromkeys(("cpus-per-task", "c"), "cluster.cpus_per_task"),
    **dict.fromkeys(("requeue", "no-requeue"), "cluster.requeue"),
    "signal": "cluster.signal_s",
}
"""Options that the script follows as well -> the key that sets both."""
SHORT = {"A": "account", "p": "partition", "t": "time", "o": "output", "e": "error", "J": "job-name", "a": "array"}
SHORT |= {
    "G": "gpus",
    "w": "nodelist",
    "x": "exclude",
    "q": "qos",
    "C": "constraint",
    "d": "dependency",
    "D": "chdir",
    "M": "clusters",
    "W": "wait",
}
EXCLUSIVE = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("gpus-per-node", "gpus-per-task", "gpus", "gres", "gpus-per-socket"),
)
"""Options of which Slurm takes one."""
REFUSED = {
    "clusters": "status, stop and resume would not find the job there; set SLURM_CLUSTERS in your environment",
    "wait": "a launch ends when the job is submitted; look at it with `cascade status`",
    "het-group": "a job with several components cannot train one model; submit each command as a separate job",
    "wrap": "the script runs the command already",
    "chdir": "settings contain paths in this directory; run `cascade launch` in the directory where the job should run",
    "test-only": "use dry_run=true",
}
WORK_S = 60
"""Least time that a job must have between its start and the signal."""


def directives(
    *,
    cluster: ClusterConfig,
    name: str,
    nodes: str,
    processes: int,
    cpus: int,
    gpus: int,
    log: str,
    array: bool,
    share: str = "",
) -> list[str]:
    """The options in order, as `--option=value`.

    Args:
        nodes: as --nodes has it, 4 or 2-4.
        gpus: GPUs per node.
        log: pattern of the file, as --output has it.
        array: whether the tasks of an array may share the work of this command.
        share: what they would write to the same place, otherwise.

    Raises:
        ConfigError: options that contradict each other, or that the script could not follow.
    """
    per_task = cluster.gpus_per == "task"
    ours: dict[str, Any] = {
        "job-name": name.replace("/", "-"),
        "nodes": nodes,
        "ntasks-per-node": processes,
        "cpus-per-task": cpus or None,
        "gpus-per-node": gpus if gpus and not per_task else None,
        "gpus-per-task": 1 if gpus and per_task else None,
        "mem": cluster.mem,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "output": log,
        "open-mode": "append",
        "requeue" if cluster.requeue else "no-requeue": True,
        "signal": f"B:USR1@{cluster.signal_s}",
    }
    given = {_long(str(option)): value for option, value in cluster.sbatch.items()}
    for option, value in given.items():
        if option in FOLLOWED:
            raise ConfigError(f"cluster.sbatch.{option}: the script would ignore it; set {FOLLOWED[option]}")
        if option in REFUSED and wanted(value):
            raise ConfigError(f"cluster.sbatch.{option}: {REFUSED[option]}")
    if wanted(given.get("array")) and not array:
        raise ConfigError(
            f"cluster.sbatch.array={given['array']}: all its tasks would write to the same {share}; a sweep is "
            "--multirun key=a,b, and of the commands only embed and caption share their work among the tasks of an "
            "array"
        )
    if "\\" in log and not wanted(given.get("output")):
        raise ConfigError(f"run.dir: Slurm cannot write a log to {log}: a backslash switches its patterns off")
    for group in EXCLUSIVE:
        chosen = [option for option in group if wanted(given.get(option))]
        if len(chosen) > 1:
            raise ConfigError(f"cluster.sbatch: {' and '.join(chosen)} exclude each other; keep one")
        if chosen:
            ours = {option: value for option, value in ours.items() if option not in group}
    options = ours | given
    check_time("cluster.sbatch.time" if "time" in given else "cluster.time", options["time"], cluster)
    return [
        f"--{option}" if value is True else f"--{option}={quoted(option, value)}"
        for option, value in options.items()
        if wanted(value)
    ]


def _long(option: str) -> str:
    bare = option.lstrip("-")
    return SHORT.get(bare, bare)


def check_time(key: str, limit: Any, cluster: ClusterConfig) -> None:
    """Between start and signal there must be time to do something.

    Raises:
        ConfigError: there is none, so that the job would be requeued for ever without progress.
    """
    if limit is None:
        return
    seconds = slurm_seconds(key, str(limit))
    if seconds < cluster.signal_s + EARLY_S + WORK_S:
        raise ConfigError(
            f"{key}={limit}: these {seconds:.0f} s leave no time to work: the signal to save comes "
            f"cluster.signal_s={cluster.signal_s} s before the end, and Slurm may send it {EARLY_S} s early; set a "
            f"longer time, or a smaller cluster.signal_s"
        )


def quoted(name: str, value: Any) -> str:
    """A value as a directive has it: sbatch cuts at blanks, unless there are quotation marks."""
    text = str(value)
    if re.search(r"[\"\n\r]", text):
        raise ConfigError(f"#SBATCH --{name}={text!r}: it must not contain quotation marks or line breaks")
    return f'"{text}"' if re.search(r"[\s#'\\]", text) else text


def wanted(value: Any) -> bool:
    """Options that are null or false are left out."""
    return value is not None and value is not False
