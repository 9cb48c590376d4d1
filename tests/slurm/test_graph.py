"""`cascade launch verb=all`: the whole cascade as jobs that wait for each other."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data_pipeline.commands import order
from data_pipeline.common.errors import ConfigError, DataError
from slurm.commands.status import main
from slurm.supervise import history
from tests.slurm.conftest import Slurm, until
from tests.slurm.launching import TWO_NODES, cascade, install, launch
from training.cli.compose import load_config, searching

DEMO = ("cluster=slurm", "experiment=demo")


def test_the_whole_cascade_waits_for_what_it_needs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 'echo "$*" >> calls; wc -l < calls'
    site = install(here / "site", sbatch=count, squeue="exit 1")
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    answer = launch(*DEMO, own=["verb=all", "embed_tasks=3"])
    after = {job["name"]: job["after"] for job in answer["jobs"]}
    trainings = ["train-demo_base", "train-demo_sr"]
    watching = ["watch-demo_base", "watch-demo_sr"]
    assert list(after) == ["prepare", "index", "embed", *trainings, "bundle", "evaluate", *watching]
    assert [after[name] for name in trainings] == [["embed"], ["embed"]], "at the same time"
    assert after["bundle"] == trainings and after["evaluate"] == ["bundle"]
    calls = (here / "calls").read_text().splitlines()
    assert "--dependency=afterok:3 " in calls[3] and "--dependency=afterok:4:5 " in calls[5]
    assert "--dependency=after:4,afterok:3 " in calls[7], "it begins when its stage has begun, not if that cannot"
    assert "train-demo_base | train-demo_sr" in capsys.readouterr().out

    scripts = {job["name"]: Path(job["script"]) for job in answer["jobs"]}
    assert "#SBATCH --array=0-2\n" in scripts["embed"].read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in scripts["watch-demo_sr"].read_text()
    assert len({path.parent for name, path in scripts.items() if name not in trainings}) == 1, "beside the runs"
    settings = {name: OmegaConf.load(path.with_suffix(".yaml")) for name, path in scripts.items()}
    assert {settings[name].stage.name for name in trainings} == {"demo_base", "demo_sr"}
    assert settings["watch-demo_sr"].watch and settings["watch-demo_sr"].run.dir == "runs/demo/demo_sr"
    assert settings["embed"].output == settings["train-demo_sr"].data.embeddings == "runs/demo/embeddings"
    assert len(list((here / "runs").rglob("frozen.json"))) == 1, "one copy of the code for all"


def test_existing_data_is_not_prepared(here: Path) -> None:
    own = ["verb=all", "dry_run=true", "evaluate_checkpoints=false"]
    answer = launch(*DEMO, "data.shards=mine/*.tar", "stage.model.overrides.patch=2", own=own)
    assert answer["jobs"][0]["name"] == "index"
    settings = {job["name"]: OmegaConf.load(job["config"]) for job in answer["jobs"]}
    assert settings["train-demo_sr"].stage.model.overrides == {"patch": 2}
    assert settings["evaluate"].stage.model.overrides == {}, "it draws with what the bundle holds"
    assert not [name for name in settings if name.startswith("watch")]


def test_the_launch_of_the_readme_passes_every_check(here: Path) -> None:
    lines = Path(__file__).parents[2].joinpath("README.md").read_text().splitlines()
    (command,) = [shlex.split(line) for line in lines if line.strip().startswith("cascade launch ")]
    meant = {"data.shards": "mine/*.tar", "evaluation.reference": "held/*.tar", "text.path": "t5"}
    words = [
        word.replace("...", meant.get(word.partition("=")[0], "...")) for word in command[2:] if word != "verb=all"
    ]
    answer = launch(*words, own=["verb=all", "dry_run=true"])
    assert len(answer["jobs"]) == 10, "index, embed, three trainings that are watched, bundle, evaluation"


def test_a_cascade_that_could_not_be_evaluated_is_refused(here: Path) -> None:
    words, own = ["cluster=kubernetes", "cluster.container=x", "experiment=photos"], ["verb=all"]
    (here / "set").mkdir()
    with pytest.raises(ConfigError, match=r"verb=all: evaluation\.reference is not set.*evaluation\.prompts=FILE"):
        launch(*words, "data.shards=set", "evaluation.reference=null", own=own)
    with pytest.raises(DataError, match=r"data\.shards=data/photos/train: no \.tar shards found"):
        launch(*words, "data.shards=data/photos/train", own=own)
    (here / "set/0.tar").touch()
    with pytest.raises(DataError, match=r"evaluation\.reference=data/photos/heldout: no \.tar shards found"):
        launch(*words, "data.shards=set", own=own)
    assert not (here / "runs").exists(), "nothing was written"
    for reference in ("set", "s3://bucket/heldout", "features.safetensors", "/only/on/nodes"):
        assert launch(*words, "data.shards=set", f"evaluation.reference={reference}", own=own)["jobs"]


def test_students_follow_their_teachers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    students = 'bundle.students=["demo_base distill.steps=2 train.steps=5",demo_sr]'
    answer = launch(*DEMO, "distill.guidance=2", own=["verb=all", "dry_run=true", students])
    after = {job["name"]: job["after"] for job in answer["jobs"]}
    taught = ["distill-demo_base", "distill-demo_sr"]
    assert [after[name] for name in taught] == [["train-demo_base"], ["train-demo_sr"]]
    assert after["bundle"] == taught and after["evaluate"] == ["bundle"]
    assert list(after)[-2:] == ["watch-demo_base_2steps", "watch-demo_sr_4steps"]
    assert "distill-demo_base | distill-demo_sr" in capsys.readouterr().out
    settings = {job["name"]: OmegaConf.load(job["config"]) for job in answer["jobs"]}
    base, runs = settings["distill-demo_base"], ["runs/demo/demo_base_2steps", "runs/demo/demo_sr_4steps"]
    assert (base.run.dir, base.distill.teacher, base.train.steps) == (runs[0], "runs/demo/demo_base", 5)
    assert (base.distill.steps, base.distill.guidance, settings["distill-demo_sr"].distill.steps) == (2, 2, 4)
    assert base.data.embeddings == settings["train-demo_base"].data.embeddings
    assert settings["train-demo_base"].distill.steps == 0 and settings["train-demo_base"].train.steps == 1600
    assert settings["bundle"].bundle.runs == runs and settings["watch-demo_base"].bundle.runs[1] == "runs/demo/demo_sr"
    assert settings["watch-demo_sr_4steps"].bundle.runs == ["runs/demo/demo_base", runs[1]], "its base has begun"
    script = next(job["script"] for job in answer["jobs"] if job["name"] == taught[0])
    assert "--job-name=demo-demo_base-distilled-2\n" in Path(script).read_text()


def test_a_stage_without_a_student_is_bundled_itself(here: Path) -> None:
    answer = launch(*DEMO, "run.name=a b", own=["verb=all", "dry_run=true", "bundle.students=[demo_base]"])
    after = {job["name"]: job["after"] for job in answer["jobs"]}
    assert after["bundle"] == ["distill-demo_base", "train-demo_sr"]
    settings = OmegaConf.load(next(job["config"] for job in answer["jobs"] if job["name"] == "bundle"))
    assert settings.bundle.runs == ["runs/a b/demo_base_4steps", "runs/a b/demo_sr"]


def test_an_experiment_lists_its_students(here: Path) -> None:
    (here / "experiment").mkdir()
    own = {"defaults": ["demo"], "bundle": {"students": ["demo_base distill.steps=2 distill.guidance=1"]}}
    (here / "experiment" / "quick.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(own)}")

    def graph(*words: str, verb: str = "all") -> dict[str, Path]:
        with searching(str(here)):
            answer = launch("cluster=slurm", "experiment=quick", *words, own=[f"verb={verb}", "dry_run=true"])
        return {job["name"]: Path(job["config"]) for job in answer["jobs"]}

    settings = graph()
    assert [name for name in settings if name.startswith("distill")] == ["distill-demo_base"]
    student = OmegaConf.load(settings["distill-demo_base"])
    assert (student.distill.steps, student.distill.guidance) == (2, 1)
    assert OmegaConf.load(settings["bundle"]).bundle.runs == ["runs/demo/demo_base_2steps", "runs/demo/demo_sr"]
    assert "distill-demo_sr" in graph("bundle.students=[demo_sr]"), "the command line replaces the list"
    assert list(graph(verb="train")) == ["train"], "one stage has no students"


@pytest.mark.parametrize(
    ("students", "part"),
    [
        ("[base64]", r"bundle\.students=base64: begin with one of demo_base, demo_sr \(bundle\.runs\)"),
        ('[demo_sr,"demo_sr distill.steps=2"]', r"bundle\.students=demo_sr distill\.steps=2: it is listed twice"),
        ('["demo_sr run.dir=x"]', "verb=all decides run.dir for each student"),
        ('["demo_sr guidance=2"]', "guidance"),
        ('["demo_sr bundle.dir=x"]', "bundle.dir: cascade distill would not use it"),
        (
            '["demo_base checkpoint.dir=s3://b/x","demo_sr checkpoint.dir=s3://b/x/"]',
            "s3://b/x: distill-demo_base and distill-demo_sr would both write there",
        ),
        (
            "[demo_sr] verb=train",
            r"bundle\.students: cascade train would not use it; it is a setting of launch verb=all",
        ),
    ],
)
def test_impossible_students_are_refused(here: Path, students: str, part: str) -> None:
    listed, _, verb = students.partition("] ")
    given = f"bundle.students={listed}]" if verb else f"bundle.students={listed}"
    with pytest.raises(ConfigError, match=part):
        launch(*DEMO, given, own=[verb or "verb=all", "dry_run=true"])


SPY = """
import os, sys
program = sys.orig_argv[1:4] == ["-P", "-m", "training.cli"]  # not what starts it, nor what judges its end
if program and "train" in sys.orig_argv and "SLURM_PROCID" in os.environ:
    from data_pipeline.reading import loader
    real = loader.Loader.__next__
    def spy(self):
        batches = real(self)
        rank, home = os.environ["SLURM_PROCID"], os.path.dirname(__file__)
        with open(f"{home}/{os.environ['SLURM_JOB_NAME']}.{rank}", "a") as file:
            for batch in batches:
                file.writelines(f"{p} {k}\\n" for p, k in zip(batch.positions.tolist(), batch.keys))
        if rank == "1" and self.position > 40 and "base" in os.environ["SLURM_JOB_NAME"]:
            try:
                os.close(os.open(f"{home}/killed", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), 9)
            except FileExistsError:
                pass
        return batches
    loader.Loader.__next__ = spy
elif program and os.environ.get("SLURM_JOB_NAME") == "demo-evaluate":
    import subprocess, time
    from training.commands import measuring
    measuring.PART, write = 4, measuring.Parts.write
    def drawn(self, number, arrays):
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        if restart == "0" and number == 1:  # drawn by the other rank, which the signal ends before it writes
            time.sleep(60)
        write(self, number, arrays)
        with open(os.path.dirname(__file__) + "/drawn", "a") as file:
            file.write(f"{restart} {number}\\n")
        if restart == "0":
            subprocess.run(["scancel", "--signal=USR1", "--batch", os.environ["SLURM_JOB_ID"]])
            time.sleep(60)
    measuring.Parts.write = drawn
"""
"""In every rank: records which samples it consumes, and kills rank 1 of the base stage once, in its sixth step. In the
evaluation: records what is drawn in which start, and lets its time run out after the first of two parts."""


@pytest.mark.slurm
def test_a_cascade_from_one_command_with_a_rank_killed(
    on_cluster: Slurm, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "spy").mkdir()
    (here / "spy/sitecustomize.py").write_text(SPY)
    drawn = ["prepare.draw.count=60", "prepare.draw.heldout=8", "prepare.draw.samples_per_shard=20"]
    words = ["experiment=demo", "train.steps=8", "train.sample_every=0", "train.log_every=1", "checkpoint.every=4"]
    words += ["data.global_batch=8", "optimizer.warmup_steps=2"]
    setup = f"cluster.setup=['export PYTHONPATH={here}/spy']"
    answer = launch(*TWO_NODES, *drawn, *words, "evaluation.samples=8", setup, own=["verb=all", "embed_tasks=2"])
    jobs = {job["name"]: job["job_id"] for job in answer["jobs"]}
    logs = here / "runs/demo/jobs/logs"
    going = ("PENDING", "RUNNING", "COMPLETING")
    for name, job in jobs.items():
        log = next(iter(sorted(here.rglob(f"slurm-{job}*.log"))), logs / f"slurm-{job}.log")
        until(lambda job=job: on_cluster.field(job, "JobState") not in going, 180, pause_s=0.5)
        assert on_cluster.field(job, "JobState") == "COMPLETED", (name, log.read_text() if log.exists() else log)
    result = json.loads((here / "runs/demo/evaluation/result.json").read_text())
    assert result["samples"]["background"]["n"] == 8
    assert (here / "spy/drawn").read_text() == "0 0\n1 1\n", "it goes on where the time limit stopped it"
    (end,) = [one for one in history(here / "runs/demo/jobs") if one.job == str(jobs["evaluate"])]
    assert (end.code, end.action) == (75, "requeue")
    assert (here / "runs/demo/demo_sr/evaluations/series.json").exists()
    rows = main(load_config("status", ["run.dir=runs/demo"]))
    assert {row["state"] for row in [*rows["runs"], *rows["jobs"]]} == {"complete"}

    run = here / "runs/demo/demo_base"
    (end,) = history(run)
    assert (end.rank, end.code, end.action) == (1, 137, "restart")
    assert on_cluster.field(jobs["train-demo_base"], "Restarts") == "0", "in the allocation"
    cascade("train", *words, "run.dir=uninterrupted", "data.embeddings=runs/demo/embeddings",
            env=on_cluster.env, cwd=here)  # fmt: skip
    assert losses(run) == losses(here / "uninterrupted")
    capsys.readouterr()
    order.main(load_config("order", ["experiment=demo", "data.global_batch=8", "batches=8", "world_size=2"]))
    batches = [json.loads(line)["ranks"] for line in capsys.readouterr().out.splitlines()]
    positions: list[int] = []
    for rank in (0, 1):
        lines = [line.split() for line in (here / f"spy/demo-demo_base.{rank}").open()]
        consumed = {int(position): key for position, key in lines}
        positions += consumed
        assert len(lines) > len(consumed), "the steps after the checkpoint were taken twice"
        assert [consumed[position] for position in sorted(consumed)] == [
            key for batch in batches for key in batch[rank]
        ]
    assert sorted(positions) == list(range(64)), "none lost, none by both"


def losses(run: Path) -> dict[int, float]:
    """Maps each step to its loss; each step occurs once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    return {line["step"]: line["loss"] for line in lines}


def test_a_cascade_without_stages_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"bundle\.runs lists no stages"):
        launch("cluster=slurm", own=["verb=all", "dry_run=true"])


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("run.dir=runs/x", "run.dir=runs/x: verb=all has a run for each of bundle.runs"),
        ("stage=demo_sr", "stage=demo_sr: verb=all has a run for each of bundle.runs"),
        ("checkpoint.dir=s3://b/x", "checkpoint.dir=s3://b/x: train-demo_base and train-demo_sr would both write"),
        ("separate=seed_1", "--multirun with verb=all"),
        ("at_once=2", "at_once=2: the scheduler decides"),
    ],
)
def test_settings_that_a_cascade_cannot_share_are_refused(here: Path, word: str, part: str) -> None:
    own = [word] if word.startswith(("separate", "at_once")) else []
    with pytest.raises(ConfigError, match=part):
        launch(*DEMO, *([] if own else [word]), own=["verb=all", "dry_run=true", *own])


def test_evaluations_of_a_sweep_write_to_separate_directories(here: Path) -> None:
    settings = []
    for guidance, more in (("1", ""), ("2", ""), ("3", " evaluation.output=mine")):
        verb = f"verb='evaluate guidance={guidance}{more}'"
        answer = launch(*DEMO, own=[verb, "dry_run=true", f"separate=guidance={guidance}"])
        settings.append(yaml.safe_load(Path(answer["config"]).read_text()))
    places = [one["evaluation"]["output"] for one in settings]
    assert places[0].endswith("/guidance=1") and places[1].endswith("/guidance=2") and places[2] == "mine"
    assert [one["guidance"] for one in settings] == [1, 2, 3]
