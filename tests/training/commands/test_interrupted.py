"""`cascade embed` and `cascade caption`, stopped in the middle of the second shard and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_pipeline.photos import copy_shards
from tests.data_pipeline.storage.failing_files import build
from tests.training import forks
from tests.training.text.tiny_vlm import tiny_vlm

VERBS = ("embed", "caption")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose indexes are elsewhere, a captioning model, and what each command writes when undisturbed."""
    place = tmp_path_factory.mktemp("interrupted")
    copy_shards(place / "shards")
    tiny_vlm(place / "model")
    for verb in VERBS:
        done = forks.command(*words(verb, place, "whole"))
        assert done.returncode == 0, done.stderr
    return place


def words(verb: str, place: Path, output: str) -> list[str]:
    given = [verb, f"data.shards={place}/shards", f"data.index_dir={place}/indexes", f"output={place}/{output}-{verb}"]
    own = [f"vlm.path={place}/model", "vlm.max_tokens=4", "vlm.side=24"] if verb == "caption" else ["text.dim=32"]
    return [*given, *own, "batch=3", "json=true"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", VERBS)
def test_no_work_is_lost_and_none_done_twice(place: Path, tmp_path: Path, verb: str, number: signal.Signals) -> None:
    """Reads of the second shard fail, as if the file server were gone, until the command is stopped."""
    name = f"stopped-{number.name}"
    fault = {"CASE": "x", "CALL": "read", "ERRNO": "116", "COUNT": "1000000", "AFTER": "0", "PATH": "shards/00001"}
    environ = {f"FAULT_{key}": value for key, value in fault.items()} | {"LD_PRELOAD": str(build(tmp_path))}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "training.cli", *words(verb, place, name)], cwd=forks.ROOT,
            env={**os.environ, **environ}, stdout=said, stderr=said,
        )  # fmt: skip
    output = place / f"{name}-{verb}"
    while not (output.is_dir() and any(not file.name.startswith(".") for file in output.iterdir())):
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == 128 + number, (tmp_path / "said").read_text()
    last = (tmp_path / "said").read_text().splitlines()[-1]
    kept = "what is finished is kept, and the same command continues"
    assert last == f"cascade {verb}: stopped by {number.name}; {kept}"
    first = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}
    assert len(first) == 1 and not any(name.startswith(".") for name in first)
    again = forks.command(*words(verb, place, name))
    assert again.returncode == 0, again.stderr
    counts = json.loads(again.stdout.splitlines()[-1])
    assert (counts["shards"], counts["kept"]) == (2, 1)
    assert {file: (output / file).stat().st_mtime_ns for file in first} == first
    whole = {file.name: file.read_bytes() for file in (place / f"whole-{verb}").iterdir()}
    assert {file.name: file.read_bytes() for file in output.iterdir()} == whole
    shutil.rmtree(output)
