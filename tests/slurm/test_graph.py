"""`cascade launch verb=all`: the whole cascade as jobs that wait for each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_pipeline.common.errors import ConfigError
from tests.slurm.launching import install, launch

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
    assert list(after) == ["prepare", "index", "embed", *trainings, "bundle", "evaluate"]
    assert [after[name] for name in trainings] == [["embed"], ["embed"]], "at the same time"
    assert after["bundle"] == trainings and after["evaluate"] == ["bundle"]
    calls = (here / "calls").read_text().splitlines()
    assert "--dependency=afterok:3 " in calls[3] and "--dependency=afterok:4:5 " in calls[5]
    assert "train-demo_base | train-demo_sr" in capsys.readouterr().out

    scripts = {job["name"]: Path(job["script"]) for job in answer["jobs"]}
    assert "#SBATCH --array=0-2\n" in scripts["embed"].read_text()
    settings = {name: OmegaConf.load(path.with_suffix(".yaml")) for name, path in scripts.items()}
    assert {settings[name].stage.name for name in trainings} == {"demo_base", "demo_sr"}
    assert settings["embed"].output == settings["train-demo_sr"].data.embeddings == "runs/demo/embeddings"
    assert len(list((here / "runs").rglob("frozen.json"))) == 1, "one copy of the code for all"


def test_data_that_is_there_is_not_prepared(here: Path) -> None:
    answer = launch(*DEMO, "data.shards=mine/*.tar", own=["verb=all", "dry_run=true"])
    assert answer["jobs"][0]["name"] == "index"


def test_a_cascade_without_stages_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"bundle\.runs names no stage"):
        launch("cluster=slurm", own=["verb=all", "dry_run=true"])
