"""What a node runs under a scheduler that starts one command per node: the set-up, then the processes of the job."""

from __future__ import annotations

import shlex

from slurm.jobs.job import Job
from slurm.script import checked, environment_lines

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
    lines = [*before, *environment_lines(job), 'finish() { exit "$1"; }', *checked(cluster.setup)]
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
