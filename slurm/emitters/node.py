"""What a node runs under a scheduler that starts one command per node: the set-up, then the processes of the job."""

from __future__ import annotations

import hashlib
import re
import shlex

from slurm.jobs.job import Job
from slurm.script import checked, environment_lines, user_lines

PORT = 29400
"""Where the ranks meet, on the first node."""
RANKS = """\
export MASTER_ADDR={first} MASTER_PORT={port} WORLD_SIZE={world}
children=() asked=0
trap 'asked=$((asked + 1)); kill -TERM "${{children[@]}}" 2>/dev/null' TERM
for local in $(seq 0 {last}); do
    RANK=$(({node} * {processes} + local)) LOCAL_RANK=$local {command} &
    children+=($!)
done
code=0
for child in "${{children[@]}}"; do
    while :; do    # the trap ends a wait early; 127 means that the child had already been waited for
        before=$asked
        wait "$child"
        now=$?
        [ "$now" = 127 ] || ended=$now
        [ "$asked" != "$before" ] || break
    done
    if [ "$code" = 0 ]; then code=$ended; fi
done
exit "$code\""""
"""Starts the processes of a node, forwards TERM, and exits with the code of the first failure once all have ended."""


LONGEST = 50
"""Characters of the name of a job; those of its pods and nodes are longer, and may have 63."""
PLAIN = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*/[a-z]+(-[a-z0-9]+(_[a-z0-9]+)*)?")
"""EXPERIMENT/JOB, for which another experiment and job cannot have the same name once each _ is a hyphen."""


def job_name(job: Job) -> str:
    """Return a valid name for a scheduler's objects: at most LONGEST lower-case letters, digits and hyphens, beginning
    with a letter. Different jobs have different names: one that loses more than its _ ends with a checksum. The name of
    a long experiment is cut rather than that of the job."""
    exact = f"{job.config.run.name}/{job.name}"
    experiment, own = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (job.config.run.name, job.name))
    if not experiment[:1].isalpha():
        experiment = f"r-{experiment}".rstrip("-")
    name = f"{experiment}-{own}"
    if PLAIN.fullmatch(exact) and len(name) <= LONGEST:
        return name
    checksum = hashlib.sha256(exact.encode()).hexdigest()[:6]
    room = LONGEST - len(f"--{checksum}")
    own = own[: room - 4].rstrip("-")
    return f"{experiment[: room - len(own)].rstrip('-')}-{own}-{checksum}"


def node_script(job: Job, *, nodes: int, node: str, first: str, before: list[str]) -> str:
    """Return the shell script that each node of a job runs.

    Args:
        job: the job.
        nodes: how many nodes run it.
        node: shell expression for the number of this node, from 0.
        first: shell expression for the address of the first node.
        before: lines that come first.
    """
    cluster = job.config.cluster
    lines = [*before, *environment_lines(job), 'finish() { exit "$1"; }', *checked(user_lines(cluster))]
    lines.append(f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    command = shlex.join([cluster.python or "python3", *job.arguments])
    if not job.is_distributed:
        return "\n".join([*lines, f"exec {command}"])
    ranks = RANKS.format(
        first=first,
        port=PORT,
        world=nodes * job.processes,
        last=job.processes - 1,
        node=node,
        processes=job.processes,
        command=command,
    )
    return "\n".join([*lines, ranks])
