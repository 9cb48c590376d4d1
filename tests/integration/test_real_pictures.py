"""The command line on real img2dataset shards, from a directory and from S3 over HTTP, and on wrong input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.s3 import S3Server
from tests.training import forks

PHOTOS = Path(__file__).parents[1] / "fixtures" / "photos"
SMALL = (
    "stage.model.preset=tiny_base",
    "stage.model.overrides={}",
    "stage.image_size=32",
    "data.global_batch=4",
    "train.log_every=1",
    "checkpoint.every=2",
    "text.max_tokens=16",
)


def cascade(*words: str, env: dict[str, str] | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = forks.command(*words, env={**os.environ, **(env or {})})
    assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Only the shards, without indexes that another test may have left next to the fixture."""
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder, ignore=shutil.ignore_patterns("*.index.parquet"))
    return folder


@pytest.fixture
def bucket_of_photos(bucket: str, s3_server: S3Server) -> str:
    for path in sorted(PHOTOS.glob("*.tar")):
        s3_server.client().upload_file(str(path), bucket, f"photos/{path.name}")
    return bucket


def test_two_processes_train_resume_and_leave_a_run_that_explains_itself(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train", *SMALL, f"data.shards={photos}", f"run.dir={run}", "cluster.processes=2", "json=true")
    first = last_json(cascade(*words, "train.steps=2", "train.sample_every=2", "train.sample_prompts=[a dog]"))
    assert first["step"] == 2
    assert first["position"] == 8
    again = cascade(*words, "train.steps=4")
    assert "resuming from step 2" in again.stdout + again.stderr
    assert last_json(again)["position"] == 16

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert {"step", "position", "loss", "grad_norm", "lr", "images_per_second"} <= logged[0].keys()
    assert (run / "config.yaml").exists()
    assert json.loads((run / "code.json").read_text())
    assert (run / "samples" / "step-00000002.png").exists()
    assert (run / "checkpoints" / "step-00000004" / "manifest.json").exists()
    assert {path.name for path in (run / "logs").glob("rank-*.log")} >= {"rank-0.log", "rank-1.log"}
    assert list((run / "wandb").glob("offline-run-*"))


def test_the_same_batches_come_from_a_bucket(
    photos: Path, bucket_of_photos: str, s3_server: S3Server, tmp_path: Path
) -> None:
    def losses(shards: str, name: str) -> list[float]:
        run = tmp_path / name
        words = ("train.steps=3", "train.sample_every=0", "wandb.mode=disabled")
        cascade("train", *SMALL, f"data.shards={shards}", f"run.dir={run}", *words)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    remote = losses(f"s3://{bucket_of_photos}/photos/{{00000..00001}}.tar", "remote")
    assert len(remote) == 3
    assert remote == pytest.approx(losses(str(photos), "local"), rel=1e-5)


@pytest.mark.parametrize("verb", ["train", "verify"])
def test_wrong_places_are_one_sentence_before_anything_starts(
    verb: str, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "junk.tar").write_text("<html>AccessDenied</html>")
    (tmp_path / "empty").mkdir()
    for shards, env, said in (
        (f"{tmp_path}/nothing/*.tar", {}, "nothing"),
        (f"{tmp_path}/empty", {}, "empty"),
        (f"s3://{bucket}/photos/*.tar", {}, bucket),
        ("s3://no-such-bucket-here/{00000..00001}.tar", {}, "no-such-bucket-here"),
        (f"s3://{bucket}/{{00000..00001}}.tar", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "403"),
        *([(f"{tmp_path}/junk.tar", {}, "junk.tar")] if verb == "train" else []),
    ):
        extra = (f"run.dir={tmp_path}/run",) if verb == "train" else (f"output={tmp_path}/verify",)
        done = cascade(verb, f"data.shards={shards}", *extra, env=env, code=2)
        assert said in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()[-1]) < 500


def test_tracebacks_are_for_debugging(tmp_path: Path) -> None:
    done = cascade("train", f"data.shards={tmp_path}/no.tar", f"run.dir={tmp_path}/run", "debug=true", code=2)
    assert "Traceback" in done.stderr
