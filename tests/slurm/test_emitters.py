"""The graph for other schedulers: valid by their own rules, in order, with the same commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from data_pipeline.common.errors import ConfigError
from slurm.commands.launch import compose_all, job_record, plan_entries, script_text
from slurm.emitters.node import job_name
from slurm.jobs.job import Job
from tests.children import gone
from tests.slurm.conftest import until
from tests.slurm.launching import install, launch
from training.cli.compose import load_config
from training.config.cluster import FOLLOWED_BY, KINDS, ClusterConfig, slurm_mebibytes

K8S = [
    "cluster=kubernetes",
    "experiment=demo",
    "cluster.container=me/cascade:1",
    "cluster.container_mounts=[claim:/work]",
]
K8S += ["cluster.cpus_per_task=4", "cluster.gpus=true", "cluster.processes=2"]
SKY = ["cluster=skypilot", "experiment=demo", "cluster.accelerator=H100", "cluster.gpus=true", "cluster.processes=2"]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    here = tmp_path_factory.mktemp("k8s")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        own = ["verb=all", "embed_tasks=3"]
        return launch(*K8S, "cluster.nodes=2", own=own), here


def documents(job: dict) -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all(Path(job["script"]).read_text())}


def test_kubernetes_takes_every_document(cascade: tuple[dict, Path]) -> None:
    answer, _ = cascade
    for job in answer["jobs"]:
        for document in documents(job).values():
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    jobs = {job["name"]: documents(job) for job in answer["jobs"]}
    train = jobs["train-demo_sr"]["Job"]
    assert train["spec"]["completions"] == 2 and train["spec"]["completionMode"] == "Indexed"
    pod = train["spec"]["template"]["spec"]
    assert pod["subdomain"] == jobs["train-demo_sr"]["Service"]["metadata"]["name"] == "demo-train-demo-sr"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "nvidia.com/gpu": "2"}
    assert "MASTER_ADDR=demo-train-demo-sr-0.demo-train-demo-sr" in container["command"][2]
    assert "WORLD_SIZE=4" in container["command"][2]
    rules = train["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "FailJob", "onExitCodes": {"containerName": "cascade", "operator": "In",
                                                             "values": [2, 76, 77, 130]}}  # fmt: skip
    assert jobs["embed"]["Job"]["spec"]["completions"] == 3
    assert "Service" not in jobs["bundle"]


def test_a_pod_starts_its_processes_and_ends_with_the_code_of_the_first_failure(
    cascade: tuple[dict, Path], tmp_path: Path
) -> None:
    answer, _ = cascade
    (job,) = (job for job in answer["jobs"] if job["name"] == "train-demo_base")
    shell = documents(job)["Job"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
    python = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $3" >> ranks\n[ "$RANK" != 3 ] || exit 78'
    site = install(tmp_path / "site", python3=python)
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env={"PATH": f"{site}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "1"}
    )
    assert done.returncode == 78
    assert sorted((tmp_path / "ranks").read_text().splitlines()) == ["2 0 4 training.cli", "3 1 4 training.cli"]


def test_a_line_of_the_set_up_that_fails_ends_the_pod(here: Path) -> None:
    (job,) = launch(*K8S, "cluster.setup=['export A=1','false']", own=["dry_run=true"])["jobs"]
    shell = documents(job)["Job"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
    site = install(here / "site", python3="echo ran")
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={"PATH": f"{site}:/usr/bin:/bin"})
    assert (done.returncode, done.stdout) == (2, "==> cluster.setup: 'false' failed with code 1\n")


SAVES = """
trap 'sleep 0.3; echo $RANK >> saved; exit 75' TERM
echo >> began
for i in $(seq 300); do sleep 0.1; done"""
"""A program that saves when it is asked to stop."""


@pytest.mark.parametrize("kind", ["kubernetes", "skypilot"])
def test_the_processes_of_a_node_save_before_it_ends(here: Path, kind: str) -> None:
    """It neither ends with the code of the signal before its processes have ended, nor loses the first code among
    theirs."""
    words = K8S if kind == "kubernetes" else SKY
    answer = launch(*words, "stage=demo_base", own=["dry_run=true"])
    (text,) = (one for one in yaml.safe_load_all(Path(answer["script"]).read_text()) if one.get("kind") != "Service")
    pod = text["spec"]["template"]["spec"]["containers"][0]["command"][2] if kind == "kubernetes" else text["run"]
    site = install(here / "site", python3=SAVES)
    env = {"PATH": f"{site}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "0", "SKYPILOT_NODE_RANK": "0"}
    with subprocess.Popen(["bash", "-c", pod], cwd=here, env=env) as node:
        until(lambda: (here / "began").exists() and (here / "began").read_text() == "\n\n", 30)
        node.terminate()
        assert node.wait(30) == 75
    assert sorted((here / "saved").read_text().split()) == ["0", "1"]


def apply_script(cascade: tuple[dict, Path], folder: Path, kubectl: str) -> tuple[Path, dict[str, str]]:
    """The script that applies the cascade, and its environment, in which `kubectl` is a shell script of this body."""
    (script,) = cascade[1].rglob("apply-001.k8s.sh")
    site, home = install(folder / "site", kubectl=kubectl), str(folder)
    return script, {"PATH": f"{site}:/usr/bin:/bin", "HOME": home, "TMPDIR": home, "POLL_S": "0.05"}


def test_the_script_applies_in_order_and_stops_after_a_failure(cascade: tuple[dict, Path], tmp_path: Path) -> None:
    kubectl = (
        'state="$HOME/state"; mkdir -p "$state"\n'
        'if [ $1 = apply ]; then name=$(basename "$3"); echo "$name" >> $HOME/applied\n'
        "  n=$(grep -m1 -A9 'kind: Job' \"$3\" | grep -m1 ' name:' | cut -d: -f2 | tr -d ' ')\n"
        '  touch "$state/$n"; exit; fi\n'
        '[ -e "$state/$3" ] || exit 1\n'
        '[ $3 = demo-bundle ] && echo "job Failed pods1" || echo "job Complete pods1"'
    )
    script, env = apply_script(cascade, tmp_path, kubectl)
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "demo-bundle has failed" in done.stderr
    applied = (tmp_path / "applied").read_text().split()
    assert applied[:3] == ["prepare-001.k8s.yaml", "index-001.k8s.yaml", "embed-001.k8s.yaml"]
    assert applied.index("bundle-001.k8s.yaml") > max(i for i, name in enumerate(applied) if name.startswith("train"))
    assert "evaluate-001.k8s.yaml" not in applied, "it waits for the bundle"


@pytest.mark.parametrize(
    ("deleted", "applied"), [("demo-embed", 3), ("demo-train-demo-base", 6), ("demo-train-demo-sr", 6)]
)
def test_the_script_does_not_wait_for_a_deleted_job(
    cascade: tuple[dict, Path], tmp_path: Path, deleted: str, applied: int
) -> None:
    """Neither for its success nor for its begin; that kubectl cannot answer for a while is no reason to give up."""
    kubectl = (
        'if [ $1 = apply ]; then echo "$3" >> "$HOME/applied"; exit; fi\n'
        'if mkdir "$HOME/asked-$3" 2>/dev/null; then echo "$3: Unauthorized" >&2; exit 1; fi\n'
        f'[ $3 = {deleted} ] || echo "job Complete pods1"'
    )
    script, env = apply_script(cascade, tmp_path, kubectl)
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{deleted} is gone: it was deleted, or kubectl's context" in done.stderr
    assert done.stderr.count("demo-prepare: Unauthorized") == 1
    assert len((tmp_path / "applied").read_text().splitlines()) == applied


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_script_applies_nothing_more(
    cascade: tuple[dict, Path], tmp_path: Path, number: signal.Signals
) -> None:
    script, env = apply_script(
        cascade, tmp_path, 'if [ $1 = get ]; then echo "job pods1"; else echo "$3" >> "$HOME/applied"; fi'
    )
    output = tmp_path / "output"
    with output.open("w") as out:
        process = subprocess.Popen(["bash", script], env=env, stdout=out, stderr=out, start_new_session=True)
    applied = tmp_path / "applied"
    until(applied.exists, 30)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    assert process.wait(30) == -number
    until(lambda: not _in_session(process.pid), 30, lambda: f"still there: {_in_session(process.pid)}")
    assert len(applied.read_text().splitlines()) == 1, "prepare, which nothing comes before"
    assert number == signal.SIGKILL or not list(tmp_path.glob("tmp.*"))


def _in_session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with suppress(ProcessLookupError):
            found += [pid] if os.getsid(pid) == leader and not gone(pid) else []
    return found


def test_a_training_that_fails_at_once_counts_as_begun(cascade: tuple[dict, Path], tmp_path: Path) -> None:
    """It was never seen active: it failed between two polls."""
    kubectl = (
        'if [ $1 = apply ]; then basename "$3" >> $HOME/applied; exit; fi\n'
        'case "$3" in demo-train*) echo "job Failed pods1" ;; *) echo "job Complete pods1" ;; esac'
    )
    script, env = apply_script(cascade, tmp_path, kubectl)
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60)
    applied = (tmp_path / "applied").read_text()
    assert done.returncode == 1 and applied.count("bundle") == 0 and "evaluate-003.k8s.yaml" in applied


def test_names_are_valid_on_kubernetes_and_distinct(here: Path) -> None:
    """A Service begins with a letter; a long experiment name leaves room for the names of its jobs."""
    for name in ("2026-photos", "the-experiment-with-a-very-long-name-about-which-" + "x" * 20, "Ünïcode"):
        jobs = launch(*K8S, f"run.name={name}", "cluster.nodes=2", own=["verb=all", "dry_run=true"])["jobs"]
        names = [documents(job)["Job"]["metadata"]["name"] for job in jobs]
        assert len({*names}) == len(jobs)
        assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", one) for one in names), names


def test_different_jobs_have_different_names(here: Path) -> None:
    """Also where names differ only in what Kubernetes and SkyPilot do not take."""
    config, path = load_config("train", ["experiment=demo"]), here / "x"
    names = []
    for experiment in ("demo", "a_b", "a-b", "A_b", "a__b", "ü", "ö", "x" * 60 + "y", "x" * 60 + "z", "a" * 41 + "_b"):
        for job in (
            "train-base_64",
            "train-base-64",
            "train-" + "s" * 70,
            "train-" + "s" * 70 + "_",
            "bundle",
            "bundle+",
        ):
            config.run.name = experiment
            names.append(job_name(Job(job, job.partition("-")[0], [], config, path, path, path, "", "", path)))
    assert names[:2] == ["demo-train-base-64", names[1]] and names[4] == "demo-bundle"
    assert len({*names}) == len(names)
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", one) for one in names), names


def test_skypilot_has_a_task_per_job_and_a_pipeline(here: Path) -> None:
    own = ["verb=all", "evaluate_checkpoints=false"]
    answer = launch(*SKY, "cluster.container_mounts=['s3://bucket/x:/work']", "cluster.nodes=2", own=own)
    (path,) = here.rglob("pipeline-001.sky.yaml")
    first, *tasks = yaml.safe_load_all(path.read_text())
    assert first == {"name": "demo"}
    assert [task["name"] for task in tasks] == [f"demo-{job['name'].replace('_', '-')}" for job in answer["jobs"]]
    train = next(task for task in tasks if "train" in task["name"])
    assert train["num_nodes"] == 2 and train["resources"]["accelerators"] == "H100:2"
    assert train["file_mounts"] == {"/work": "s3://bucket/x"}
    assert subprocess.run(["bash", "-n"], input=train["run"], text=True).returncode == 0
    assert "RANK=$((SKYPILOT_NODE_RANK * 2 + local))" in train["run"] and "WORLD_SIZE=4" in train["run"]
    single = yaml.safe_load(Path(answer["jobs"][3]["script"]).read_text())
    assert single == train


ACCEPTED = """
import os, sys, yaml
from pathlib import Path
from sky.catalog import common
catalog = Path(common.get_catalog_path("common/accelerators.csv"))  # which it would download
catalog.parent.mkdir(parents=True, exist_ok=True)
catalog.write_text("AcceleratorName,Clouds\\nH100,\\"['AWS','GCP']\\"\\n")
import sky
from sky.utils import dag_utils
for path in sys.argv[1:]:
    if "pipeline" in path:
        dag = dag_utils.load_chain_dag_from_yaml(path)
        print(dag.name, [task.name for task in dag.tasks])
        continue
    task = sky.Task.from_yaml(path)
    task.validate(skip_file_mounts=True)  # there is no such bucket
    (resources,) = task.resources
    print(task.name, task.num_nodes, resources.accelerators, resources.cpus, resources.memory, resources.job_recovery)
"""
"""Where SkyPilot's own classes read the files."""


@pytest.mark.skipif(
    not shutil.which("sky"), reason="SkyPilot is not installed: pip install skypilot, and `sky` on PATH"
)
def test_skypilot_takes_every_file(here: Path) -> None:
    asked = ["cluster.nodes=2", "cluster.cpus_per_task=4", "cluster.mem=64000M", "cluster.container=me/cascade:1"]
    answer = launch(*SKY, *asked, "cluster.container_mounts=['s3://bucket/x:/work']", own=["verb=all"])
    files = [job["script"] for job in answer["jobs"]] + [str(next(here.rglob("pipeline-001.sky.yaml")))]
    python = Path(str(shutil.which("sky"))).resolve().parent / "python"
    done = subprocess.run(
        [python, "-c", ACCEPTED, *files], env={**os.environ, "HOME": str(here)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("<")]
    names = [f"demo-{job['name'].replace('_', '-')}" for job in answer["jobs"]]
    assert said[-1] == f"demo {names}"
    (train,) = (line for line in said if line.startswith("demo-train-demo-base "))
    assert train.startswith("demo-train-demo-base 2 {'H100': 2} 8+ 63+ ") and "[75]" in train


OTHER = {
    "processes": 4, "threads": 3, "nodes": 4, "min_nodes": 1, "partition": "p", "account": "a", "time": "2:00:00",
    "cpus_per_task": 5, "mem": "9G", "gpus": False, "gpus_per": "task", "requeue": False, "signal_s": 77,
    "max_restarts_without_progress": 7, "sbatch": {"qos": "q"}, "modules": ["m"], "conda": "c", "venv": "v",
    "setup": ["export S=1"], "python": "/p", "container": "image:2", "container_runtime": "apptainer",
    "container_mounts": ["/a:/b"], "accelerator": "A100", "preflight": True, "preflight_exclude": True,
    "interface": "ib0",
}  # fmt: skip
"""Key -> a value that is no default."""
IN_SETTINGS = ("preflight", "preflight_exclude")
ON_THIS_MACHINE = ("processes", "gpus")
"""Read by the training itself, from its frozen settings; those in ON_THIS_MACHINE only where it starts its own
processes."""
BASES = {
    "slurm": ["cluster.nodes=2", "cluster.processes=2", "cluster.container=image:1"],
    "kubernetes": ["cluster.container=image:1"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_used_or_refused(here: Path, kind: str) -> None:
    """If another value of a key leaves the files of a launch unchanged, the launch ignores the key."""
    assert {*OTHER, "kind"} == {*FOLLOWED_BY} == {one.name for one in fields(ClusterConfig)}
    words = ["data.shards=x", f"cluster={kind}", "cluster.processes=1", *BASES.get(kind, [])]
    words += ["cluster.accelerator=H100"] if kind == "skypilot" else []
    config = load_config("launch", [*words, "dry_run=true"])
    (job,) = compose_all(plan_entries(config, words), words, config)
    cluster = job.config.cluster
    needs = {"preflight_exclude": {"preflight": True}, "min_nodes": {"nodes": 3}} if kind == "slurm" else {}
    needs |= {"preflight_exclude": {"preflight": True}, "container_mounts": {"container": "image:1"}}
    needs |= {"container_runtime": {"container": "image:1"}, "gpus": {"accelerator": None}}
    if kind == "skypilot":
        needs["container_mounts"] = {}
    for key, value in OTHER.items():
        job.config.cluster = base = replace(cluster, **needs.get(key, {}))
        if kind in FOLLOWED_BY[key]:
            untyped = kind == "skypilot" and key == "gpus"  # GPUs without a type are refused
            before = "" if untyped else body(script_text(job))
            job.config.cluster = replace(base, **{key: value})
            record = job_record(job, "", "")  # where a restart on this machine reads it
            settings = (*IN_SETTINGS, *(ON_THIS_MACHINE if kind == "local" else ()))
            assert before != body(script_text(job)) or key in settings or record["most"] == value, key
        else:
            named = "container" if key.startswith("container") else key  # which the other container keys need
            followers = " or ".join(f"cluster={one}" for one in FOLLOWED_BY[named if kind == "local" else key])
            refusal = rf"cluster\.{named}\w*=.*: a launch with cluster={kind} would not use it, only {followers};"
            with pytest.raises(ConfigError, match=refusal):
                job.config.cluster = replace(base, **{key: value})
                script_text(job)


def body(script: str) -> str:
    """Returns the script without the command line in its title."""
    return "\n".join(line for line in script.splitlines() if not line.startswith("# "))


def test_the_page_says_which_keys_a_target_follows() -> None:
    page = (Path(__file__).parents[2] / "docs/cluster.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `") and "yes" in line]
    said = {
        key: tuple(kind for kind, cell in zip(KINDS, cells, strict=True) if cell.strip() != "refused")
        for names, *cells in rows
        for key in re.findall(r"`(\w+)`", names)
    }
    assert said == {key: kinds for key, kinds in FOLLOWED_BY.items() if key != "kind"}


def test_a_pod_has_a_time_limit_and_need_not_be_restarted(here: Path) -> None:
    words = ["cluster.time=2-12", "cluster.requeue=false"]
    (answer,) = launch(*K8S, *words, own=["dry_run=true"])["jobs"]
    spec = documents(answer)["Job"]["spec"]
    assert spec["activeDeadlineSeconds"] == 216000
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob"] * 3
    kubernetes_validate.validate(documents(answer)["Job"], kubernetes_validate.latest_version(), strict=True)
    (answer,) = launch(*K8S, "cluster.time=UNLIMITED", own=["dry_run=true"])["jobs"]
    assert "activeDeadlineSeconds" not in documents(answer)["Job"]["spec"]


def test_an_array_on_kubernetes(here: Path) -> None:
    (answer,) = launch(*K8S, "cluster.sbatch.array=0-7%3", own=["verb='embed output=e'", "dry_run=true"])["jobs"]
    spec = documents(answer)["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (8, 3)


@pytest.mark.parametrize(
    ("given", "mebibytes"), [("200G", 204800), ("64000M", 64000), ("64000", 64000), ("1t", 1 << 20), ("1K", 1)]
)
def test_memory_as_slurm_has_it(given: str, mebibytes: int) -> None:
    assert slurm_mebibytes("cluster.mem", given) == mebibytes
    with pytest.raises(ConfigError, match=r"cluster\.mem=much"):
        slurm_mebibytes("cluster.mem", "much")


@pytest.mark.parametrize(
    ("words", "own", "part"),
    [
        (
            ["cluster=kubernetes", "experiment=demo", "cluster.processes=1"],
            [],
            "cluster.container: Kubernetes needs an image",
        ),
        ([*K8S, "cluster.container_mounts=['a:b']"], [], "for Kubernetes it must be CLAIM:/PATH"),
        ([*K8S, "cluster.time=0"], [], "cluster.time=0: it leaves no time to work"),
        ([*K8S, "cluster.sbatch.array=0-3"], [], "cluster.sbatch.array=0-3: on Kubernetes"),
        ([*K8S, "cluster.sbatch.array=1-3"], ["verb='embed output=e'"], "it must be 0-N or 0-N%AT_ONCE"),
        ([*SKY, "cluster.sbatch.array=0-3"], ["verb='embed output=e'"], "cluster=skypilot would not use it"),
        ([*K8S, "cluster.accelerator=H100"], [], "cluster=kubernetes would not use it, only cluster=skypilot"),
        ([*SKY, "cluster.gpus=false"], [], "cluster.accelerator=H100: cluster.gpus=false requests no GPU"),
        ([*SKY, "cluster.accelerator=null"], [], "cluster.accelerator: SkyPilot needs a GPU type"),
        (SKY, ["embed_tasks=2", "verb=all"], "embed_tasks=2: SkyPilot has no job arrays"),
        (SKY, ["script=x.yml"], "script= and --multirun are for Slurm"),
    ],
)
def test_refused(here: Path, words: list[str], own: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        launch(*words, own=[*own, "dry_run=true"])
