"""The #SBATCH options of a job: ours, overridden by those of `cluster.sbatch`, without conflicts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from training.config.cluster import EARLY_S, ClusterConfig, slurm_seconds

FOLLOWED = {
    **dict.fromkeys(("nodes", "N"), "cluster.nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "cluster.processes"),
    **dict.fromkeys(("cpus-per-task", "c"), "cluster.cpus_per_task"),
    "tres-per-task": "cluster.cpus_per_task, and for GPUs cluster.gpus_per=task",
    **dict.fromkeys(("requeue", "no-requeue"), "cluster.requeue"),
    "signal": "cluster.signal_s",
}
"""Options that the script also depends on -> the key that sets both."""
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
    "b": "begin",
    "H": "hold",
    "i": "input",
    "k": "no-kill",
    "L": "licenses",
    "m": "distribution",
    "O": "overcommit",
    "s": "oversubscribe",
    "S": "core-spec",
}
EXCLUSIVE = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("gpus-per-node", "gpus-per-task", "gpus", "gres", "gpus-per-socket"),
)
"""Groups of options of which Slurm accepts only one."""
REFUSED = {
    "clusters": "status, stop and resume would not find the job there; set SLURM_CLUSTERS in your environment",
    "wait": "a launch ends when the job is submitted; watch it with `cascade status`",
    "het-group": "a job with several components cannot train one model; submit each command as a separate job",
    "wrap": "the script already runs the command",
    "chdir": "settings contain paths in this directory; run `cascade launch` in the directory where the job should run",
    "test-only": "use dry_run=true",
}
WORK_S = 60
"""Least time that a job must have between its start and the signal, seconds."""


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
    spread: bool = False,
) -> list[str]:
    """Return the options in order, as `--option=value`.

    Args:
        cluster: the `cluster` section.
        name: name of the job.
        nodes: value of --nodes, such as 4 or 2-4.
        processes: tasks per node.
        cpus: cores per task; 0: Slurm's default.
        gpus: GPUs per node.
        log: pattern of the log file, the value of --output.
        array: whether the tasks of an array may share the work of this command.
        share: otherwise, the setting that names the place to which all tasks would write.
        spread: request cores per node instead of tasks: sbatch counts the tasks of the smallest number of nodes, and
            never allocates more nodes than tasks.

    Raises:
        ConfigError: options conflict, or the script could not follow one of them.
    """
    per_task = cluster.gpus_per == "task"
    if spread and gpus and per_task:
        raise ConfigError(
            f"cluster.gpus_per=task: Slurm would allocate at most {cluster.min_nodes * processes} of "
            f"cluster.nodes={cluster.nodes} nodes, one per task of the smallest job; raise cluster.min_nodes, or leave "
            f"cluster.gpus_per out"
        )
    ours: dict[str, Any] = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": None if spread else processes,
        "cpus-per-task": (cpus * processes if spread else cpus) or None,
        "mincpus": processes if spread and not cpus else None,
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
    given = own_options(cluster)
    for option, value in given.items():
        if option in FOLLOWED:
            raise ConfigError(f"cluster.sbatch.{option}: the script would ignore it; set {FOLLOWED[option]}")
        if option in REFUSED and wanted(value):
            raise ConfigError(f"cluster.sbatch.{option}: {REFUSED[option]}")
    if wanted(given.get("array")) and not array:
        raise ConfigError(
            f"cluster.sbatch.array={given['array']}: all its tasks would write to the same {share}; for a sweep use "
            "--multirun key=a,b; only the commands embed and caption share their work among the tasks of an array"
        )
    if "\\" in log and not wanted(given.get("output")):
        raise ConfigError(f"run.dir: Slurm cannot write a log to {log}: a backslash disables its patterns")
    for group in EXCLUSIVE:
        chosen = [option for option in group if wanted(given.get(option))]
        if len(chosen) > 1:
            raise ConfigError(f"cluster.sbatch: {' and '.join(chosen)} exclude each other; keep one")
        if chosen:
            ours = {option: value for option, value in ours.items() if option not in group}
    for option in ("output", "error"):
        if wanted(given.get(option)):
            given[option] = absolute(option, str(given[option]))
    options = ours | given
    check_time(cluster)
    return [
        f"--{option}" if value is True else f"--{option}={quoted(option, value)}"
        for option, value in options.items()
        if wanted(value)
    ]


def absolute(option: str, pattern: str) -> str:
    """Return the pattern of a log as an absolute one: Slurm also replaces patterns in the current directory.

    Raises:
        ConfigError: its directory contains what is only known later, so it cannot be created.
    """
    folder = pattern.rpartition("/")[0]
    if re.search(r"%\d*[^%xu]", folder.replace("%%", "")):
        raise ConfigError(
            f"cluster.sbatch.{option}={pattern}: Slurm does not create directories, and this one gets its name only "
            f"when the job starts; use %x, %u or fixed names for it, and the others in the name of the file"
        )
    return pattern if pattern.startswith("/") else f"{verbatim(Path.cwd())}/{pattern}"


def verbatim(path: Path) -> str:
    """Return a path as part of a pattern in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")


def own_options(cluster: ClusterConfig) -> dict[str, Any]:
    """Return the options of `cluster.sbatch` by their long names without hyphens at the front; mem_per_cpu is taken for
    mem-per-cpu, and a list is joined by commas.

    Raises:
        ConfigError: a value is a mapping.
    """
    found = {}
    for option, value in cluster.sbatch.items():
        bare = str(option).lstrip("-").replace("_", "-")
        name = SHORT.get(bare, bare)
        if isinstance(value, dict):
            raise ConfigError(
                f"cluster.sbatch.{name}={value}: write the value as for sbatch, for example "
                "'cluster.sbatch={gres: \"gpu:a100:4\"}'"
            )
        found[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    return found


def time_limit(cluster: ClusterConfig) -> tuple[str, Any]:
    """Return the key that sets the time limit of an allocation, and the limit in Slurm's format; None: the site's
    default."""
    given = own_options(cluster)
    return ("cluster.sbatch.time", given["time"]) if "time" in given else ("cluster.time", cluster.time)


def least_time(cluster: ClusterConfig) -> int:
    """Return the shortest time limit that leaves time to work between the start and the signal, seconds."""
    return cluster.signal_s + EARLY_S + WORK_S


def check_time(cluster: ClusterConfig) -> None:
    """Check that the time limit leaves time to work between the start and the signal.

    Raises:
        ConfigError: it does not; the job would be requeued forever without progress.
    """
    key, limit = time_limit(cluster)
    if not wanted(limit):
        return
    seconds = slurm_seconds(key, str(limit))
    if seconds < least_time(cluster):
        raise ConfigError(
            f"{key}={limit}: these {seconds:.0f} s leave no time to work: the signal to save comes "
            f"cluster.signal_s={cluster.signal_s} s before the end, and Slurm may send it {EARLY_S} s early; set a "
            f"longer time, or a smaller cluster.signal_s"
        )


def quoted(name: str, value: Any) -> str:
    """Quote a value for a directive if needed: sbatch splits unquoted values at spaces, and takes a backslash as an
    escape.

    Raises:
        ConfigError: it contains line breaks.
    """
    text = str(value)
    if re.search(r"[\n\r]", text):
        raise ConfigError(f"#SBATCH --{name}={text!r}: it must not contain line breaks")
    if not re.search(r"[\s#'\"\\]", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def wanted(value: Any) -> bool:
    """Return whether to write an option: those that are null or false are omitted."""
    return value is not None and value is not False
