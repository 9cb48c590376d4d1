"""Kubernetes: an indexed Job per job of the graph, and a script that applies each after those that it depends on.

The pods of a training find each other through a headless Service; each starts the processes of its node. A pod that
fails with a code that a retry would only repeat fails the Job; after any other failure the pods are restarted, and the
run resumes from its newest checkpoint. Run directory, code and data must be on a volume that all pods mount.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.errors import ConfigError
from slurm.emitters.node import job_name, node_script
from slurm.jobs.graph import BEGUN
from slurm.jobs.job import SHARED_BY_ARRAY, Job
from training.config.cluster import ClusterConfig, slurm_mebibytes, slurm_seconds
from training.config.commands import LaunchCommand
from training.processes.exit_codes import EXIT_PREEMPTED, FINAL_CODES

ENDING, WHOLE = "k8s.yaml", ("apply", "k8s.sh")
ARRAY = re.compile(r"0-(\d+)(?:%([1-9]\d*))?")
APPLY = """\
#!/bin/bash
# Applies each job after those that it depends on: bash {name}
cd {folder} || exit 1
scratch=$(mktemp -d) || exit 1
# One of the waits may just be writing there.
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$scratch" 2>/dev/null || {{ sleep 1; rm -rf "$scratch"; }}' EXIT
mkdir "$scratch/applied" "$scratch/failed"
nap() {{ kill -0 $$ 2>/dev/null || exit 1; sleep "${{POLL_S:-10}}"; }}    # with this script, its waits end
apply() {{ kubectl apply -f "$2" && touch "$scratch/applied/$1"; }}
# Prints the conditions and pods of a job once it has been applied, "gone" if it was deleted, and nothing if kubectl
# does not know: its error is shown when it is new, and the wait goes on, since a login may have expired.
query='job {{.status.conditions[?(@.status=="True")].type}} pods'
query+='{{.status.active}}{{.status.succeeded}}{{.status.failed}}'
state() {{
    local found
    [ -e "$scratch/applied/$1" ] || return 0
    if found=$(kubectl get job "$1" --ignore-not-found -o "jsonpath=$query" 2>"$scratch/error-$1"); then
        echo "${{found:-gone}}"
    elif ! cmp -s "$scratch/error-$1" "$scratch/shown-$1"; then
        tee "$scratch/shown-$1" <"$scratch/error-$1" >&2
    fi
}}
# Waits until the state of job $1 matches pattern $2; fails if the job has failed, was deleted or could not be applied.
until_it() {{
    while [ ! -e "$scratch/failed/$1" ]; do
        case " $(state "$1") " in
            $2) return 0 ;;
            *" Failed "*) echo "$1 has failed" >&2; return 1 ;;
            *" gone "*) echo "$1 is gone: it was deleted, or kubectl's context has changed" >&2; return 1 ;;
        esac
        nap
    done
    echo "$1 was not run" >&2
    return 1
}}
succeeded() {{ until_it "$1" '* Complete *'; }}
begun() {{ until_it "$1" '* pods[0-9]*'; }}
{lines}
wait
[ -z "$(ls "$scratch/failed")" ]
"""


def manifest(job: Job) -> str:
    """Return the Job as YAML, preceded, for a training on several nodes, by the Service for its pods.

    Raises:
        ConfigError: there is no image, or a mount is invalid.
    """
    cluster = job.config.cluster
    if not cluster.container:
        raise ConfigError("cluster.container: Kubernetes needs an image with this project's dependencies")
    nodes = cluster.nodes if job.is_distributed else 1
    tasks, at_once = _tasks(job)
    name = job_name(job)
    resources = {"cpu": str(job.cpus * job.processes or 1)}
    resources |= {"memory": f"{slurm_mebibytes('cluster.mem', cluster.mem)}Mi"} if cluster.mem else {}
    resources |= {"nvidia.com/gpu": str(job.gpus)} if job.gpus else {}
    volumes, mounts = _volumes(cluster.container_mounts)
    container = {
        "name": "cascade",
        "image": cluster.container,
        "workingDir": str(Path.cwd()),
        "command": ["bash", "-c", _shell(job, nodes, name)],
        "resources": {"limits": resources},
        "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.signal_s,
        "containers": [container],
        "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    final = {"containerName": "cascade", "operator": "In", "values": sorted(FINAL_CODES)}
    saved = {"containerName": "cascade", "operator": "In", "values": [EXIT_PREEMPTED]}
    again = "Ignore" if cluster.requeue else "FailJob"  # ignored as failures: the pod starts again
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": tasks or nodes,
        "parallelism": at_once or nodes,
        "backoffLimit": nodes * (cluster.max_restarts_without_progress + 1),
        **_deadline(cluster),
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": final},
                {"action": again, "onExitCodes": saved},
                {"action": again, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    documents = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}]
    if job.is_distributed and nodes > 1:
        pod["subdomain"] = name
        service = {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True}
        documents.insert(0, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service})
    return f"# {job.title}\n" + yaml.safe_dump_all(documents, sort_keys=False, width=1000)


def _deadline(cluster: ClusterConfig) -> dict[str, int]:
    """Return the time limit of the whole Job: at its end, the pods are asked to stop, save, and are not restarted."""
    seconds = slurm_seconds("cluster.time", cluster.time) if cluster.time is not None else math.inf
    if seconds < 1:
        raise ConfigError(f"cluster.time={cluster.time}: it leaves no time to work; UNLIMITED or null is no limit")
    return {} if seconds == math.inf else {"activeDeadlineSeconds": int(seconds)}


def _tasks(job: Job) -> tuple[int, int]:
    """Return the number of array tasks that share the job's work, and how many run at once; (0, 0) if it is not an
    array."""
    array = str(job.config.cluster.sbatch.get("array") or "")
    if not array:
        return 0, 0
    match = ARRAY.fullmatch(array)
    if not match or job.verb not in SHARED_BY_ARRAY:
        raise ConfigError(
            f"cluster.sbatch.array={array}: on Kubernetes it must be 0-N or 0-N%AT_ONCE, and only embed and caption "
            f"share their work among the tasks of an array"
        )
    tasks = int(match[1]) + 1
    return tasks, min(tasks, int(match[2] or tasks))


def _shell(job: Job, nodes: int, name: str) -> str:
    """Return the script that the container runs."""
    tasks, _ = _tasks(job)
    # embed and caption read these variables under any scheduler
    array = [f"export SLURM_ARRAY_TASK_ID=$JOB_COMPLETION_INDEX SLURM_ARRAY_TASK_COUNT={tasks}"] if tasks else []
    first = f"{name}-0.{name}" if nodes > 1 else "127.0.0.1"
    return node_script(job, nodes=nodes, node="JOB_COMPLETION_INDEX", first=first, before=array)


def _volumes(wanted: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Convert CLAIM:PATH to volumes and mounts; a source with a slash is a directory on every node."""
    volumes, mounts = [], []
    for number, entry in enumerate(wanted):
        source, _, path = entry.partition(":")
        if not source or not path.startswith("/"):
            raise ConfigError(
                f"cluster.container_mounts: {entry}: for Kubernetes it must be CLAIM:/PATH, or /DIRECTORY:/PATH for a "
                f"directory on every node"
            )
        found = {"hostPath": {"path": source}} if "/" in source else {"persistentVolumeClaim": {"claimName": source}}
        volumes.append({"name": f"volume-{number}", **found})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    return volumes, mounts


def check_launch(config: LaunchCommand) -> None:
    """Accept any launch."""


def how(jobs: Sequence[Job], path: Path) -> str:
    """Return the command that runs the script."""
    return f"bash {shlex.quote(str(path))}"


def whole(name: str, jobs: Sequence[Job], path: Path) -> str:
    """Return the shell script that applies the jobs in the order of the graph, independent ones at the same time."""
    names = {job.name: job_name(job) for job in jobs}
    lines = []
    for job in jobs:
        test = "begun" if job.when == BEGUN else "succeeded"
        own = names[job.name]
        steps = [*(f"{test} {names[other]}" for other in job.after), f"apply {own} {shlex.quote(str(job.script))}"]
        lines.append(f'( {" && ".join(steps)} || touch "$scratch/failed/{own}" ) &')
    return APPLY.format(name=path.name, folder=shlex.quote(str(Path.cwd())), lines="\n".join(lines))
