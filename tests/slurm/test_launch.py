"""`cascade launch`: what it writes, and what a real Slurm does with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_pipeline.common.errors import ConfigError, UserError
from slurm.queue import job_states
from tests.slurm.conftest import Slurm, until
from tests.slurm.launching import TWO_NODES, cascade, launch
from tests.training import forks
from training.cli import main as cli
from training.cli.compose import load_config

TINY = [
    "experiment=demo",
    "run=runs/tiny",
    "stage.model.preset=tiny_base",
    "data.global_batch=8",
    "train.sample_every=0",
    "train.log_every=1",
    "train.timeout_first_s=120",
]


# ------------------------------------------------------------------------------------------------ what it writes


def test_dry_run_writes_a_script_and_frozen_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = launch("cluster=slurm", "cluster.nodes=4", "experiment=demo", "train.steps=7", own=["dry_run=true"])
    script = Path(answer["script"])
    text = script.read_text()
    assert answer["job_id"] is None and answer["dry_run"] is True
    assert script == here / "runs/demo/demo_base/launch/train-001.sbatch"
    assert text in capsys.readouterr().out
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --time=24:00:00",
        f"#SBATCH --output={here}/runs/demo/demo_base/logs/slurm-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        "# cascade train cluster=slurm cluster.nodes=4 experiment=demo train.steps=7",
        "export MASTER_ADDR=",
        "export MASTER_PORT=",
        "export CASCADE_SRUN=1",
        "srun --kill-on-bad-exit=1 --nodes=4 --ntasks-per-node=2",
        "--mpi=none",
    ):
        assert line in text
    assert "{{" not in text
    assert "--gpus" not in text, "the demo is for CPUs"
    settings = OmegaConf.load(answer["config"])
    assert settings.train.steps == 7 and settings.cluster.nodes == 4


def test_the_frozen_settings_are_a_command_line(here: Path) -> None:
    answer = launch("cluster=slurm", "experiment=demo", "train.steps=7", own=["dry_run=true"])
    words = re.search(r"--config-dir (\S+) --config-name (\S+)", Path(answer["script"]).read_text())
    assert words
    command = ["train", "--config-dir", words[1], "--config-name", words[2]]
    done = forks.command(*command, "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    shown = OmegaConf.create(done.stdout)
    assert (shown.train.steps, shown.run.dir, shown.stage.name) == (7, "runs/demo/demo_base", "demo_base")


def test_cluster_settings_reach_the_script(here: Path) -> None:
    words = [
        "cluster=slurm",
        "cluster.processes=8",
        "cluster.cpus_per_task=6",
        "cluster.partition=a100",
        "cluster.mem=0",
    ]
    words += [
        "cluster.account=me",
        "cluster.sbatch={qos: high, exclusive: true, time: '1:00:00'}",
        "cluster.signal_s=300",
    ]
    words += ["cluster.setup=[module load cuda,export NCCL_DEBUG=WARN]", "cluster.threads=3"]
    text = Path(launch(*words, own=["dry_run=true"])["script"]).read_text()
    for option in (
        "gpus-per-node=8",
        "cpus-per-task=6",
        "partition=a100",
        "mem=0",
        "account=me",
        "qos=high",
        "exclusive",
    ):
        assert f"#SBATCH --{option}\n" in text
    assert "#SBATCH --time=1:00:00\n" in text and "24:00:00" not in text
    assert "#SBATCH --signal=B:USR1@300" in text
    assert "\nmodule load cuda\n" in text and "\nexport NCCL_DEBUG=WARN\n" in text
    assert "export OMP_NUM_THREADS=3" in text
    assert "--ntasks-per-node=8 --cpus-per-task=6 " in text, "srun does not take it over from sbatch"


def test_without_requeue_nothing_is_requeued(here: Path) -> None:
    text = Path(launch("cluster=slurm", "cluster.requeue=false", own=["dry_run=true"])["script"]).read_text()
    assert "#SBATCH --no-requeue" in text
    assert "scontrol requeue" not in text


def test_other_commands_are_one_task_on_one_node(here: Path) -> None:
    answer = launch("cluster=slurm", own=["verb=verify", "dry_run=true"])
    text = Path(answer["script"]).read_text()
    assert "#SBATCH --nodes=1" in text and "#SBATCH --ntasks-per-node=1" in text
    assert "#SBATCH --cpus-per-task=64" in text
    assert "CASCADE_SRUN" not in text


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_drawing_is_shared_by_all_tasks(here: Path, verb: str) -> None:
    answer = launch("cluster=slurm", "cluster.nodes=4", own=[f"verb={verb}", "dry_run=true"])
    text = Path(answer["script"]).read_text()
    assert "#SBATCH --nodes=4" in text and "CASCADE_SRUN=1" in text


def test_a_later_launch_leaves_the_files_of_a_queued_job_alone(here: Path) -> None:
    first, second = (launch("cluster=slurm", f"seed={n}", own=["dry_run=true"]) for n in (1, 2))
    assert first["script"] != second["script"]
    assert [OmegaConf.load(a["config"]).seed for a in (first, second)] == [1, 2]


def test_the_command_line_passes_its_words_on(here: Path) -> None:
    words = ["launch", "cluster=slurm", "experiment=demo", "stage=demo_sr", "cluster.sbatch.qos=high", "dry_run=true"]
    answer = cascade(*words, "script=mine.sbatch", "data.shards=s3://b/{0..3}.tar", env=dict(os.environ), cwd=here)
    assert answer["script"] == str(here / "mine.sbatch")
    settings = OmegaConf.load(answer["config"])
    assert settings.stage.name == "demo_sr" and settings.data.shards == "s3://b/{0..3}.tar"
    assert (
        "# cascade train cluster=slurm experiment=demo stage=demo_sr cluster.sbatch.qos=high"
        in (here / "mine.sbatch").read_text()
    )


def test_blanks_and_line_ends(here: Path) -> None:
    words = ["cluster=slurm", "run.dir=my runs/x", "cluster.sbatch={comment: two words}", "experiment=demo"]
    answer = launch(*words, "cluster.setup=['module load\ncuda']", own=["dry_run=true"])
    lines = Path(answer["script"]).read_text().splitlines()
    assert '#SBATCH --comment="two words"' in lines
    assert any(line.startswith('#SBATCH --output="') and "my runs/x/logs" in line for line in lines)
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") or not line for line in lines[:last]), "no command stands before a directive"
    assert OmegaConf.load(answer["config"]).run.dir == "my runs/x"


def test_a_sweep_is_a_run_for_each_value(here: Path) -> None:
    words = ["launch", "cluster=slurm", "experiment=demo", "dry_run=true", "json=true", "--multirun"]
    done = forks.command(*words, "optimizer.lr=1e-4,3e-4", cwd=here)
    assert done.returncode == 0, done.stderr
    scripts = [json.loads(line)["script"] for line in done.stdout.splitlines() if line.startswith('{"')]
    runs = [Path(script).parent.parent for script in scripts]
    assert [run.name for run in runs] == ["optimizer.lr=0.0001", "optimizer.lr=0.0003"]
    array = (here / "runs/demo/demo_base/launch/array-001.sbatch").read_text()
    assert "#SBATCH --array=0-1\n" in array and all(str(script) in array for script in scripts)
    assert (
        array.count("#SBATCH --output=") == 1 and subprocess.run(["bash", "-n"], input=array, text=True).returncode == 0
    )
    for run in runs:
        settings = OmegaConf.load(run / "launch/train-001.yaml")
        assert (here / settings.run.dir).samefile(run) and str(settings.optimizer.lr) == run.name.partition("=")[2]
    assert len(list((here / "runs").rglob("frozen.json"))) == 1, "one copy of the code for all"


def test_a_sweep_has_no_output_of_its_own(here: Path) -> None:
    words = ["launch", "cluster=slurm", "experiment=demo", "dry_run=true", "--multirun", "seed=1,2"]
    done = forks.command(*words, "cluster.sbatch.o=x.log", cwd=here)
    assert done.returncode == 2 and "cluster.sbatch.output: a sweep appends the output of each run" in done.stderr


@pytest.mark.parametrize(
    ("words", "own", "part"),
    [
        (["cluster=local"], [], "cluster=slurm"),
        (
            ["cluster=slurm", "cluster.nodes=4"],
            ["verb=verify"],
            "cluster.nodes: none of the commands verify would use it",
        ),
        (
            ["cluster=slurm", "cluster.preflight=true"],
            ["verb=[index,evaluate]"],
            "cluster.preflight: none of the commands",
        ),
        (["cluster=slurm"], ["verb=trian"], "verb=trian: it must be one of prepare, "),
        (["cluster=slurm"], ["verb=launch"], "verb=launch: it must be one of"),
        (["cluster=slurm", "cluster.processes=0"], [], "cluster.processes=0"),
        (["cluster=slurm", "cluster.nodes=3"], [], "24 processes"),
        (["cluster=slurm"], ["verb=[train,bundle]", "script=x"], "script=x"),
        (["cluster=slurm"], ["verb=[]"], "verb=[]: give at least one command"),
        (["cluster=slurm"], ["verb='open"], "verb='open: unbalanced quotation marks"),
        (["cluster=slurm"], ["script=job.yaml"], "script=job.yaml: choose another extension"),
        (
            ["cluster=slurm", "cluster.sbatch.nodes=4"],
            [],
            "cluster.sbatch.nodes: the script would ignore it; set cluster.",
        ),
        (["cluster=slurm", "cluster.time=soon"], [], "cluster.time=soon: it must be a time limit"),
    ],
)
def test_refused_before_anything_is_written(here: Path, words: list[str], own: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        launch(*words, own=[*own, "dry_run=true"])
    assert list(here.iterdir()) == []


def test_a_key_of_another_command_is_written_next_to_its_name(here: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"output: only a key of verify, embed, .*sample, checkpoints.*; write it after the command.s name",
    ):
        load_config("launch", ["verb=embed", "output=there"])


def test_without_slurm_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(UserError, match=r"sbatch is not on this machine's PATH.*dry_run=true"):
        launch("cluster=slurm")


# ------------------------------------------------------------------------------------------ on a real Slurm


@pytest.mark.slurm
def test_two_nodes_train_and_survive_a_preemption(slurm: Slurm, here: Path) -> None:
    drawn = ["prepare.draw.count=64", "prepare.draw.heldout=8", "prepare.draw.size=16"]
    cascade("prepare", "experiment=demo", *drawn, env=slurm.env, cwd=here)
    words = [*TWO_NODES, *TINY, "train.steps=120", "checkpoint.every=1000"]
    answer = cascade("launch", *words, env=slurm.env, cwd=here)
    job, run = answer["job_id"], here / "runs/tiny"
    log = Path(answer["log"].replace("%j", str(job)))
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 120, lambda: log.read_text())

    more_important = ["--partition=high", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null", "--wrap=true"]
    other = int(slurm.run("sbatch", "--parsable", *more_important))
    assert slurm.wait(other) == "COMPLETED"
    assert slurm.wait(job, log=log) == "COMPLETED"

    text = log.read_text()
    assert slurm.field(job, "Restarts") == "1"
    assert "restart 0" in text and "restart 1" in text, "one log, appended to"
    assert re.search(r"resuming from step \d+", text)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 121))
    starts = json.loads((run / "code.json").read_text())["starts"]
    assert [s["world_size"] for s in starts] == [2, 2]
    assert (run / "checkpoints/step-00000120").is_dir()


@pytest.mark.slurm
def test_an_array_shares_out_the_shards_to_embed(slurm: Slurm, here: Path) -> None:
    drawn = ["prepare.draw.count=30", "prepare.draw.heldout=8", "prepare.draw.samples_per_shard=10"]
    cascade("prepare", "experiment=demo", *drawn, env=slurm.env, cwd=here)
    words = ["experiment=demo", "cluster=slurm", "cluster.gpus=false", "cluster.cpus_per_task=1", "cluster.processes=1",
             "cluster.sbatch.array=0-1", "data.shards=data/demo/train"]  # fmt: skip
    answer = cascade("launch", "verb='embed output=embeddings'", *words, env=slurm.env, cwd=here)
    until(lambda: slurm.run("squeue", "-h") == "", 120)
    logs = [path.read_text() for path in sorted(here.glob("**/*.log")) + sorted(here.glob("**/*.out"))]
    states = slurm.run("scontrol", "show", "job", str(answer["job_id"]))
    assert states.count("JobState=COMPLETED") == 2, (states, logs)
    written = sorted(path.name for path in (here / "embeddings").iterdir())
    assert written == [f"train-{number:05d}.embeddings.safetensors" for number in range(3)]
    again = cascade("embed", "experiment=demo", "data.shards=data/demo/train", "output=embeddings",
                    env=slurm.env, cwd=here)  # fmt: skip
    assert again["kept"] == 3 and again["captions"] == 0


@pytest.mark.slurm
def test_the_signal_before_the_time_limit_saves_and_requeues(on_cluster: Slurm, here: Path, program) -> None:
    program(
        'if [ "$SLURM_RESTART_COUNT" = 1 ]; then echo "went on"; exit 0; fi\n'
        'trap "sleep 0.$SLURM_PROCID; echo saved $SLURM_PROCID; exit 75" USR1\n'
        'echo "rank $SLURM_PROCID of $SLURM_NTASKS at $MASTER_ADDR:$MASTER_PORT on $(hostname), $CASCADE_SRUN"\n'
        "while :; do sleep 0.1; done"
    )
    answer = launch(*TWO_NODES, "run=runs/a", "data.shards=x")
    job, log = answer["job_id"], Path(answer["log"].replace("%j", str(answer["job_id"])))
    until(lambda: log.exists() and log.read_text().count(" of 2 at ") == 2, 30)
    on_cluster.run("scancel", "--signal=USR1", "--batch", str(job))  # what Slurm sends signal_s before the limit
    assert on_cluster.wait(job) == "COMPLETED"
    text = log.read_text()
    assert sorted(re.findall(r"rank (\d) of 2 at 10\.[\d.]+\.11:2\d{4} on (n\d), 1", text)) == [
        ("0", "n1"),
        ("1", "n2"),
    ]
    assert sorted(re.findall(r"saved (\d)", text)) == ["0", "1"], "neither was killed before it had saved"
    assert text.count("went on") == 2
    assert on_cluster.field(job, "Restarts") == "1"


@pytest.mark.slurm
def test_a_cancelled_job_stays_cancelled(on_cluster: Slurm, here: Path, program) -> None:
    program('trap "exit 75" TERM\necho up\nwhile :; do sleep 0.1; done')
    answer = launch(*TWO_NODES, "run=runs/a", "data.shards=x")
    log = Path(answer["log"].replace("%j", str(answer["job_id"])))
    until(lambda: log.exists() and log.read_text().count("up\n") == 2, 30)
    on_cluster.run("scancel", str(answer["job_id"]))
    assert on_cluster.wait(answer["job_id"]) == "CANCELLED"
    until(lambda: on_cluster.run("squeue", "-h") == "", 30)
    assert on_cluster.field(answer["job_id"], "JobState") == "CANCELLED"
    assert on_cluster.field(answer["job_id"], "Restarts") == "0"


@pytest.mark.slurm
def test_a_sweep_is_one_array(on_cluster: Slurm, here: Path, program) -> None:
    program('[ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" != 0 ] || exit 75\necho "ran $SLURM_ARRAY_TASK_ID"')
    words = [*TWO_NODES, "cluster.nodes=1", "data.shards=x", "run.dir=my sweep/x", "seed=1,2", "at_once=1"]
    cli.main(["launch", "--multirun", *words])
    runs = [here / "my sweep/x" / f"seed={seed}" for seed in (1, 2)]
    jobs = [json.loads((run / "launch/jobs.jsonl").read_text())["job"] for run in runs]
    assert [job.split("_")[1] for job in jobs] == ["0", "1"] and jobs[0].split("_")[0] == jobs[1].split("_")[0]
    until(lambda: [job_states(run)[0]["state"] for run in runs] == ["complete", "complete"], 60)
    for number, (run, job) in enumerate(zip(runs, jobs, strict=True)):
        text = (run / f"logs/slurm-{job}.log").read_text()
        assert f"ran {number}" in text and ("restart 1" in text) == (number == 0), "requeued by itself"


@pytest.mark.slurm
def test_a_failure_ends_the_job_and_the_chain(on_cluster: Slurm, here: Path, program) -> None:
    program('echo "$3" >> ran\n[ "$3" != train ] || exit 2')
    answer = launch("cluster=slurm", "cluster.gpus=false", "cluster.cpus_per_task=1", "cluster.processes=1",
                    "data.shards=x", own=["verb=[prepare,'train stage=demo_sr',bundle]"])  # fmt: skip
    jobs = [job["job_id"] for job in answer["jobs"]]
    assert [on_cluster.wait(job) for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert on_cluster.field(jobs[1], "ExitCode") == "2:0"
    assert (here / "ran").read_text().split() == ["prepare", "train"]


@pytest.mark.slurm
def test_what_slurm_refuses_is_reported(on_cluster: Slurm, here: Path) -> None:
    with pytest.raises(UserError, match=r"Slurm refused .*train-001\.sbatch: .*invalid partition"):
        launch(*TWO_NODES, "data.shards=x", "cluster.partition=nowhere")
