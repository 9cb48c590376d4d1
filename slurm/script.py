"""The sbatch script of a job: options, environment, set-up, and the loop that restarts its processes."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm import supervise
from slurm.jobs.job import SHARED_BY_ARRAY, Job
from slurm.jobs.records import EVENTS
from slurm.options import directives, least_time, own_options, time_limit, verbatim, wanted
from training.config.cluster import ClusterConfig, slurm_seconds
from training.config.commands import COMMANDS
from training.plan.checks import training_problems
from training.processes.exit_codes import EXIT_PREEMPTED

TEMPLATE = Path(__file__).parent / "templates" / "job.sbatch"
FIRST_PORT, PORTS = 20000, 10000
"""Rendezvous ports, below those that Linux uses for outgoing connections (from 32768)."""
REAP_S = 60
"""Seconds from the first failed rank until srun is killed: it waits for nodes that have crashed."""
STEP_TRIES = 30
"""How often the script asks Slurm, once a second, to kill what is left of a step before it requeues the job."""
STEP_S = 300
"""Seconds that srun waits for the resources of its step: what is left of an earlier step may hold them forever."""
ANSWER_S = 5
"""Seconds between attempts to requeue the job while Slurm does not answer."""
WRITES = {
    "train": "run.dir",
    "distill": "run.dir",
    "sample": "sampling.output",
    "evaluate": "evaluation.output",
    "bundle": "bundle.dir",
}


def log_file(job: Job, number: int | None = None) -> Path:
    """Return where Slurm appends the output of the job and of all its restarts; without a number of the job, its name
    has %j or %A in that place."""
    known = dict.fromkeys("jA", str(number)) if number else {}
    known |= {"x": job_label(job), "u": getpass.getuser(), "%": "%"}

    def named(pattern: re.Match[str]) -> str:
        width, kind = pattern.groups()
        return known[kind].zfill(int(width or 0)) if kind in known else pattern[0]

    own = own_options(job.config.cluster).get("output")
    folder, name = (Path.cwd(), str(own)) if own else (job.home / "logs", _log_name(job))
    return folder / re.sub(r"%(\d*)(\D)", named, name)


def job_label(job: Job) -> str:
    """Return the name of the job in the queue."""
    given = own_options(job.config.cluster).get("job-name")
    name = f"{job.config.run.name}-{job.config.trained if COMMANDS[job.verb].makes_run else job.name}"
    return str(given or name.replace("/", "-"))


def _log_name(job: Job) -> str:
    return "slurm-%A-%a.log" if own_options(job.config.cluster).get("array") else "slurm-%j.log"


def render_script(job: Job) -> str:
    """Return the text of the script.

    Raises:
        ConfigError: options conflict, or the time limit leaves no time to work.
    """
    cluster = job.config.cluster
    again = cluster.requeue
    options = directives(
        cluster=cluster,
        name=job_label(job),
        nodes=_range(job),
        processes=job.processes,
        cpus=job.cpus,
        gpus=job.gpus,
        log=f"{verbatim(job.home / 'logs')}/{_log_name(job)}",
        array=job.verb in SHARED_BY_ARRAY,
        share=WRITES.get(job.verb, "output"),
        spread=allowed_nodes(job)[0] > allowed_nodes(job)[-1] * job.processes,
    )
    values = {
        "title": job.title,
        "plain": PLAIN,
        "directives": "\n".join(f"#SBATCH {line}" for line in options),
        "directory": shlex.quote(str(Path.cwd())),
        "logs": shlex.quote(str(job.home / "logs")),
        "notes": shlex.quote(str(job.home / "logs" / ".notes")),
        "ended": shlex.quote(str(job.home / "launch" / EVENTS)),
        "name": job.name,
        "signal_s": str(cluster.signal_s),
        "reap_s": str(REAP_S),
        "step_tries": str(STEP_TRIES),
        "step_s": str(STEP_S),
        "environment": "\n".join(environment_lines(job)),
        "setup": "\n".join(setup(cluster)),
        "found": "\n".join(found_here(cluster)),
        "code": shlex.quote(str(job.code)),
        "functions": "\n".join(functions(job)),
        "meeting": _indented("\n".join(meeting(job)), 4),
        "srun": _tasks(job),
        "own_srun": "".join(f" {option}" for option in _container_options(job)),
        "command": _command(job),
        "judge": _judge(job),
        "saved": "requeue" if again else f'"end {EXIT_PREEMPTED}"',
        "elsewhere": "action=requeue" if again else 'finish "$code"',
        "fewer": _indented(_fewer(job), 8),
        "again": _indented(AGAIN.format(preempted=EXIT_PREEMPTED) if again else "", 4),
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text())
    return re.sub(r"\n{3,}", "\n\n", text)


REQUEUE = """
# Requeue the job without the given nodes; return if Slurm refuses.
requeue() {{
    local without said try
    mkdir -p "${{CASCADE_NOTES%-*}}-own"
    without=$(IFS=,; echo "$*")
    for try in $(seq 60); do
        [ -z "$without" ] || exclude "$without" &
        if said=$(scontrol requeue "$own_job" 2>&1); then
            sleep 600    # if this script exited by itself, the job could count as done
            return
        fi
        case "$said" in
            *ontact* | *imed\\ out* | *ommunication*) sleep {answer_s} ;;    # slurmctld may be starting again
            *) break ;;
        esac
    done
    echo "==> Slurm did not requeue this job (${{said:-scontrol failed}}); continue it with: cascade resume run="{home}
}}
# Slurm accepts ExcNodeList only for a pending job, and ends this script as soon as the job is pending: so this process
# ignores the signals and keeps trying.
exclude() {{
    trap '' TERM CONT HUP USR1
    local try
    for try in $(seq 100); do
        scontrol update JobId="$own_job" ExcNodeList="$1" 2>/dev/null && break
        sleep 0.1
    done
}}"""
AGAIN = """\
if [ "$action" = requeue ]; then
    echo "==> requeue, $(date '+%F %T')"
    requeue "$@"
    finish {preempted}
fi"""
PORT = f"""
# A port on which nothing listens here. Jobs on the same node start searching at different ports.
free_port() {{
    local try port
    for try in $(seq 0 99); do
        port=$(({FIRST_PORT} + (SLURM_JOB_ID * 101 + attempt * 17 + try) % {PORTS}))
        cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -qi ":$(printf %04X $port) [0-9A-F]*:0000 0A" || break
    done
    echo "$port"
}}"""
USABLE = """
# The largest number of nodes, up to the given one, whose processes can share the data.
usable() {{
    local count
    for count in {counts}; do
        [ "$count" -gt "$1" ] || {{ echo "$count"; return; }}
    done
    return 1
}}
nodes=$(usable "$SLURM_JOB_NUM_NODES")"""
MEETING = """\
export CASCADE_SRUN=1  # rank, local rank and world size come from Slurm
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "${without//,/$'\\n'}" | head -n 1)
first=${first:-${SLURMD_NODENAME:-}}    # where compute nodes have no scontrol
address=$(scontrol show node -o "$first" 2>/dev/null | grep -o 'NodeAddr=[^ ]*')
export MASTER_ADDR="${address:-NodeAddr=$first}"
MASTER_ADDR=${MASTER_ADDR#NodeAddr=}
export CASCADE_MEET_AT_LAUNCHER=$([ "$first" = "${SLURMD_NODENAME:-}" ] && echo 1 || echo 0)
export MASTER_PORT="$(free_port)\""""


def functions(job: Job) -> list[str]:
    """Return the shell functions that this job's script needs."""
    found = [PORT] if job.is_distributed else []
    found += [REQUEUE.format(home=shlex.quote(str(job.home)), answer_s=ANSWER_S)] if job.config.cluster.requeue else []
    allowed = allowed_nodes(job)
    if len(allowed) > 1:
        found.append(USABLE.format(counts=" ".join(str(n) for n in allowed)))
    return found


def meeting(job: Job) -> list[str]:
    """Return the lines before each start of the ranks: where they meet, and whether a node could be spared."""
    if not job.is_distributed:
        return []
    spare = "spare=; usable $((SLURM_JOB_NUM_NODES - 1)) >/dev/null && spare=--spare"
    return [MEETING, *([spare] if len(allowed_nodes(job)) > 1 else [])]


def environment_lines(job: Job) -> list[str]:
    """Return the lines that come before the user's own, which may override them."""
    cluster = job.config.cluster
    threads = cluster.threads or cluster.cpus_per_task
    lines = ["unset RANK LOCAL_RANK WORLD_SIZE    # of a launcher in the shell of the launch"]
    lines += [f"export OMP_NUM_THREADS={threads}"] if threads else []
    if cluster.interface:
        name = shlex.quote(cluster.interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    return lines


def setup(cluster: ClusterConfig) -> list[str]:
    """Return the lines for modules, the environment and the user's set-up; the first that fails ends the job by name.

    They cannot run under `set -u`: scripts sourced by conda and modules read unset variables.
    """
    lines: list[tuple[str, str]] = []
    if cluster.modules:
        names = [shlex.quote(name) for entry in cluster.modules for name in entry.split()]
        lines += [(f"cluster.modules: 'module load {name}'", f"load_module {name}") for name in names]
    if cluster.conda:
        conda = os.environ.get("CONDA_EXE", "conda")
        hook = f"{shlex.quote(conda)} shell.bash hook"
        lines += [(f"cluster.conda: '{hook}'", line) for line in (f"conda_hook=$({hook})", 'eval "$conda_hook"')]
        activate = f"conda activate {shlex.quote(cluster.conda)}"
        lines.append((f"cluster.conda: '{activate}'", activate))
    if cluster.venv:
        activate = f"source {shlex.quote(str(Path(cluster.venv).absolute() / 'bin' / 'activate'))}"
        lines.append((f"cluster.venv: '{activate}'", activate))
    lines += user_lines(cluster)
    found = [MODULES] if cluster.modules else []
    if lines:
        found += ['environment_before="${VIRTUAL_ENV:-} ${CONDA_PREFIX:-}"', *checked(lines)]
    if cluster.python:
        return [*found, f"python={shlex.quote(cluster.python)}"]
    if cluster.container:
        return [*found, "python=python3"]
    found.append(f"python={shlex.quote(sys.executable)}")
    if lines:
        found.append("# If an environment was activated above, use its Python.")
        found.append('[ "$environment_before" = "${VIRTUAL_ENV:-} ${CONDA_PREFIX:-}" ] || python=$(type -P python)')
    return found


def found_here(cluster: ClusterConfig) -> list[str]:
    """Return the lines that end the job if a program is missing on its node: it would fail again at each restart."""
    lines = [MISSING.format(look="command -v srun", name="srun", why="did a setup line (module purge) remove it?")]
    if not cluster.container:
        why = "install it where all nodes have it, or set cluster.venv, cluster.conda or cluster.python"
        lines.append(MISSING.format(look='type -P "$python"', name="$python", why=why))
    return lines


def user_lines(cluster: ClusterConfig) -> list[tuple[str, str]]:
    """Return the lines of `cluster.setup`, as `checked` takes them."""
    return [(f"cluster.setup: '{line}'", line) for line in cluster.setup]


def checked(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return shell lines such that the first that fails calls `finish 2`, after it has been named. What they `set`, and
    their directory and aliases, end with them: the lines that follow may expect failures, and settings contain relative
    paths. An EXIT trap of theirs stays.

    Args:
        lines: (how to name it, the line) of each.
    """
    if not lines:
        return []
    named = [part for name, line in lines for part in (f"setup_line={shlex.quote(name)}", line)]
    return [CHECK, *named, CHECKED]


MISSING = '{look} >/dev/null || {{ echo "==> {name}: not on PATH of $(hostname); {why}"; finish 2; }}'
PLAIN = """\
set +euf +o pipefail
unset IFS
\\unalias -a
unset -f cat cd date echo grep head hostname kill ls mkdir printf rm
unset -f scancel scontrol seq set sleep squeue srun tail type wait"""
"""Lines after which the shell does what a script expects: bash's defaults, and programs by their names."""
CHECK = """\
setup_directory=$PWD
setup_failed() {
    trap - ERR EXIT
    echo "==> $setup_line failed with code $1"
    finish 2
}
trap 'failed=$?; [ "${#BASH_SOURCE[@]}" -gt 1 ] || setup_failed "$failed"' ERR
trap 'setup_failed "$?"' EXIT    # bash ends at a variable that is not set, after `set -u`"""
CHECKED = f"""\
trap - ERR
case $(trap -p EXIT) in *setup_failed*) trap - EXIT ;; esac
{PLAIN}
cd "$setup_directory\""""
MODULES = """\
load_module() {    # detects failure even where `module load` returns 0
    local init
    for init in /etc/profile.d/{lmod,z00_lmod,modules}.sh "${MODULESHOME:-/usr/share/modules}/init/bash"; do
        type module >/dev/null 2>&1 || [ ! -r "$init" ] || . "$init"
    done
    module load "$1" || return
    [ -z "${LOADEDMODULES+x}" ] || case ":$LOADEDMODULES:" in *":$1:"* | *":$1/"*) ;; *) return 1 ;; esac
}"""


# ------------------------------------------------------------------------------------------- nodes and tasks


def allowed_nodes(job: Job) -> list[int]:
    """Return the numbers of nodes that a training may run on, largest first: those whose processes can share its
    data."""
    cluster = job.config.cluster
    if not COMMANDS[job.verb].makes_run or not cluster.min_nodes:
        return [cluster.nodes if job.is_distributed else 1]
    counts = range(cluster.nodes, cluster.min_nodes - 1, -1)
    return [n for n in counts if not training_problems(job.config, n * job.processes)]


def _range(job: Job) -> str:
    allowed = allowed_nodes(job)
    return str(allowed[0]) if len(allowed) == 1 else f"{allowed[-1]}-{allowed[0]}"


def _tasks(job: Job) -> str:
    """Return the options of srun, which does not inherit the cores per task from sbatch."""
    allowed = allowed_nodes(job)
    cpus = f" --cpus-per-task={job.cpus}" if job.cpus else ""
    if not job.is_distributed:
        return f"--nodes=1 --ntasks=1{cpus}"
    if len(allowed) == 1:
        return f"--nodes={allowed[0]} --ntasks-per-node={job.processes}{cpus}"
    tasks = f'--nodes="$nodes" --ntasks-per-node={job.processes} --ntasks=$((nodes * {job.processes}))'
    return tasks + cpus + ' ${without:+--exclude="$without"}'


def _fewer(job: Job) -> str:
    """Return the lines that exclude nodes from a restart."""
    if len(allowed_nodes(job)) == 1:
        return ""
    give_up = "requeue" if job.config.cluster.requeue else "finish"
    arguments = '"$@"' if job.config.cluster.requeue else '"$code"'
    return f"""without=$(IFS=,; echo "$*")
nodes=$(usable $((SLURM_JOB_NUM_NODES - $#))) || {give_up} {arguments}"""


def _judge(job: Job) -> str:
    cluster = job.config.cluster
    key, limit = time_limit(cluster)
    words = [sys.executable, "-P", "-m", "slurm.supervise", str(job.home), "--verb", job.verb]
    words += ["--most", str(cluster.max_restarts_without_progress)]
    words += ["--requeue"] if cluster.requeue else []
    said = str(slurm_seconds(key, str(limit))) if wanted(limit) else '"$(squeue -h -j "$own_job" -o %l)"'
    words += ["--pause", str(supervise.PAUSE_S), "--least", str(least_time(cluster))]
    spare = " $spare" if len(allowed_nodes(job)) > 1 else ""
    return f"{shlex.join(words)} --limit {said}{spare}"


# ------------------------------------------------------------------------------------------------- containers


def mounts(job: Job) -> list[str]:
    """Return HOST:CONTAINER for everything that the program needs, and the user's own mounts."""
    needed = [Path.cwd(), job.run_dir, job.home, job.code]
    kept = [path for path in needed if not any(other in path.parents for other in needed)]
    return [*dict.fromkeys(f"{path}:{path}" for path in kept), *job.config.cluster.container_mounts]


def _container_options(job: Job) -> list[str]:
    cluster = job.config.cluster
    if not cluster.container or cluster.container_runtime != "pyxis":
        return []
    return [
        shlex.quote(f"--container-image={cluster.container}"),
        shlex.quote(f"--container-mounts={','.join(mounts(job))}"),
        shlex.quote(f"--container-workdir={Path.cwd()}"),
    ]


def _command(job: Job) -> str:
    """Return what every task runs: a helper (`slurm.task`) that runs the program."""
    cluster, prefix = job.config.cluster, ""
    if cluster.container and cluster.container_runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if job.gpus else []), "--bind", ",".join(mounts(job))]
        prefix = shlex.join([*words, "--pwd", str(Path.cwd()), cluster.container]) + " "
    return f'{prefix}"$python" -P -m slurm.task "$python" {shlex.join(job.arguments)}'


def _indented(text: str, blanks: int) -> str:
    return "\n".join(" " * blanks + line if line else line for line in text.splitlines())
