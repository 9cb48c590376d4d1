"""The same runs with checkpoints on disk and in an object store: what ranks exchange and fetch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.storage.store import write_bytes
from tests.faultproxy import FaultProxy
from tests.s3 import S3Server
from tests.training import forks
from tests.training.runs import ONE_LEVEL, chaos, curve, experiment, metrics
from training.cascade import bundle
from training.checkpoint.store import CheckpointStore
from training.commands.checkpoints import main as checkpoints
from training.commands.embed import main as embed
from training.config.commands import CheckpointsCommand, EmbedCommand
from training.config.experiment import Experiment
from training.processes.ranks import Ranks


def exported(config: Experiment, directory: Path) -> dict[str, torch.Tensor]:
    command = CheckpointsCommand(action="export", output=str(directory / "weights.safetensors"))
    command.run.dir = config.run.dir
    checkpoints(command)
    return load_file(directory / "weights.safetensors")


@pytest.mark.parametrize(("stage", "places"), [(1, ["bucket"]), (3, ["disk", "bucket"])])
def test_every_exchange_between_ranks_works_on_disk_and_in_a_bucket(
    tmp_path: Path, shards: str, bucket: str, s3_server: S3Server, stage: int, places: list[str]
) -> None:
    """Skip, roll back, validate, draw, prune, stop, resume, prune again, export, bundle, start from the weights."""
    outcomes: list[Any] = []
    for place in places:
        home = tmp_path / place
        home.mkdir()
        where = f"s3://{bucket}/ck" if place == "bucket" else str(home / "with a blank")
        config = experiment(
            home, shards, checkpoint__dir=where, zero__stage=stage, checkpoint__keep_last=1, train__max_skipped=2,
            validation__every=4, validation__samples=8, train__sample_every=4, train__steps=9,
            stage__sampler__steps=1, train__sample_prompts=["a circle", "a square"],
            evaluation__reference=shards.replace("train", "heldout"), stage__model__overrides=ONE_LEVEL,
        )  # fmt: skip
        events = [{"what": "nan", "rank": rank, "step": step} for rank in (0, 1) for step in (5, 6)]
        first = chaos(config, 2, *events, {"what": "sigterm", "rank": 1, "step": 7}, **s3_server.env)
        assert first.codes() == [75, 75], first.text
        assert "rolled back to the weights of step 3; training continues with step 7" in first.text
        assert (home / "run/samples/step-00000004.png").exists() and "validation_loss" in metrics(config)[3]
        second = forks.start(config, 2, **s3_server.env)
        assert second.codes() == [0, 0], second.text
        assert "resuming from step 8" in second.text
        store = CheckpointStore(where)
        assert store.steps() == [9], "the newest, which is also the best"
        weights = exported(config, home)
        stages = bundle.collect([config.run.dir]).stages[0].tensors()
        assert all(torch.equal(weights[name], tensor) for name, tensor in stages.items())
        outcomes.append((curve(config), weights))

        other = experiment(home, shards, run__dir=str(home / "other"), zero__stage=stage, train__init_from=where)
        other.train.steps, other.stage.model.overrides = 1, dict(ONE_LEVEL)
        begun = forks.start(other, 2, **s3_server.env)
        assert begun.codes() == [0, 0] and f"starting from the weights of {where}" in begun.text, begun.text
    for line, weights in outcomes:
        assert line == outcomes[0][0], "the place makes no difference"
        assert all(torch.equal(weights[name], tensor) for name, tensor in outcomes[0][1].items())


def test_eight_ranks_ask_the_store_of_checkpoints_as_often_as_one(
    tmp_path: Path, shards: str, bucket: str, s3_server: S3Server
) -> None:
    """One rank decides and the others follow; on one machine, every file of a checkpoint is read once."""
    config = experiment(tmp_path, shards, checkpoint__dir=f"s3://{bucket}/ck", train__steps=1, train__sample_every=0)
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        environment = {**s3_server.env, "AWS_ENDPOINT_URL": proxy.endpoint}
        begun = forks.start(config, 8, **environment)
        assert begun.codes() == [0] * 8, begun.text
        config.train.steps = 2
        proxy.log.clear()
        again = forks.start(config, 8, **environment)
        assert again.codes() == [0] * 8 and "resuming from step 1" in again.text, again.text
    asked = Counter((method, path.partition("/ck")[2].rpartition("/")[2]) for method, path, _, _ in proxy.log)
    tensors = {name: count for (method, name), count in asked.items() if method == "GET" and ".safetensors" in name}
    assert len(tensors) == 8 and set(tensors.values()) == {1}
    assert asked["GET", "manifest.json"] <= 3 and asked["PUT", "attempt-0002.json"] == 1
    others = sum(asked.values()) - sum(count for (_, name), count in asked.items() if ".safetensors" in name)
    assert others < 60, (asked, "nothing is asked once per rank")


def test_a_run_never_starts_over_by_itself(tmp_path: Path, shards: str) -> None:
    config = experiment(tmp_path, shards, train__steps=4, zero__stage=0)
    assert forks.start(config).codes() == [0]
    config.train.steps, place = 6, Path(config.run.dir) / "checkpoints"
    place.rename(tmp_path / "away")
    lost = forks.start(config)
    assert lost.codes() == [2], lost.text
    assert "it has no checkpoint, but this run has saved some, the last at step 4" in lost.text
    assert "choose another run.dir, or move" in lost.text and len(metrics(config)) == 4
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(tmp_path / "away", place)
    for manifest in place.glob("*/manifest.json"):
        manifest.unlink()
    lost = forks.start(config)
    assert lost.codes() == [2] and "this run has saved some" in lost.text and len(metrics(config)) == 4
    shutil.rmtree(place)
    (tmp_path / "away").rename(place)
    assert forks.start(config).codes() == [0]
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path: Path, shards: str) -> None:
    """What it has measured is moved aside."""
    config = experiment(tmp_path, shards, train__steps=3, zero__stage=0, checkpoint__every=100)
    assert chaos(config, 1, {"what": "kill", "rank": 0, "step": 2}).codes() == [-9]
    again = forks.start(config)
    assert again.codes() == [0] and "metrics.jsonl of an earlier start is now metrics-1.jsonl" in again.text
    assert len((tmp_path / "run/metrics-1.jsonl").read_text().splitlines()) == 2 and len(metrics(config)) == 3


def test_a_signal_is_obeyed_while_the_store_fails(
    tmp_path: Path, shards: str, bucket: str, s3_server: S3Server
) -> None:
    """It does not wait for the ten minutes for which an outage is tolerated."""
    config = experiment(tmp_path, shards, checkpoint__dir=f"s3://{bucket}/ck", zero__stage=0)
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        proxy.choose = lambda method, path, _: "status:503" if "step-00000005" in path and method == "PUT" else "ok"
        events = [{"what": "sigterm", "rank": 0, "step": 4}, {"what": "hurry", "rank": 0, "step": 0, "seconds": 1}]
        running = chaos(config, 1, *events, **{**s3_server.env, "AWS_ENDPOINT_URL": proxy.endpoint})
        assert running.codes() == [75], running.text
    assert "stopped by SIGTERM after step 5, which could not be saved" in running.text
    assert "the same command resumes from step 3" in running.text


def test_each_byte_is_fetched_once_however_many_ranks_resume(
    tmp_path: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processes of one machine together; the number of requests does not depend on their number."""
    monkeypatch.setattr("training.checkpoint.store.PART_BYTES", 4000)
    store = CheckpointStore(f"s3://{bucket}/ck")
    store.claim(Ranks())
    tensors = {f"param/{i}": torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    store.save(5, tensors, {}, Ranks())
    counts, scratch = [], tmp_path / "temporary"
    scratch.mkdir()
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        for ranks in (2, 4, 8):
            proxy.log.clear()
            config = Experiment()
            config.run.dir, config.checkpoint.dir = str(tmp_path / "run"), f"s3://{bucket}/ck"
            variables = {**s3_server.env, "TMPDIR": str(scratch), "AWS_ENDPOINT_URL": proxy.endpoint}
            running = forks.start(config, ranks, "tests.training.reading", **variables)
            assert running.codes() == [0] * ranks, running.text
            total = sum(float(tensor.sum()) for tensor in tensors.values())
            assert json.loads(running.result.read_text()) == {"step": 5, "sum": pytest.approx(total)}
            fetched = [path for method, path, _, _ in proxy.log if method == "GET" and "safetensors" in path]
            assert len(fetched) == len(set(fetched)) == 6
            counts.append(len(proxy.log))
    assert counts[0] == counts[1] == counts[2] < 20, counts
    assert not list(scratch.iterdir()), "no copy is left"


def test_eight_ranks_ask_the_store_for_their_data_as_often_as_one(
    tmp_path: Path, shards: str, bucket: str, s3_server: S3Server
) -> None:
    """One rank lists the shards and reads what is known of them; what several ranks of a node read (shards, indexes,
    embeddings) goes through its disk once where `data.cache_dir` is set."""
    home, counts, keys = f"s3://{bucket}/data", {}, set()
    for file in Path(shards).glob("*.*"):
        if file.is_file():
            write_bytes(f"{home}/{file.name}", file.read_bytes())
    small = {"data__global_batch": 16, "data__prefetch_mb": 1, "data__threads": 1}
    config = experiment(tmp_path, home, checkpoint__dir=f"s3://{bucket}/ck", **small)
    embed(EmbedCommand(data=config.data, text=config.text, output=f"s3://{bucket}/text"))
    config.data.embeddings = f"s3://{bucket}/text"
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        for ranks, cache in ((1, "one"), (8, None), (8, "eight")):
            proxy.log.clear()
            config.data.cache_dir = cache and str(tmp_path / cache)
            variables = {**s3_server.env, "AWS_ENDPOINT_URL": proxy.endpoint}
            running = forks.start(config, ranks, "tests.training.opening", **variables)
            assert running.codes() == [0] * ranks, running.text
            keys.add(tuple(json.loads(running.result.read_text())["keys"]))
            found: list[Counter[str]] = [Counter() for _ in range(4)]
            part = 0
            for method, address, _, _ in proxy.log:
                part += "mark-" in address
                if "mark-" not in address:
                    found[part][f"{method} {address.partition('?')[0].rpartition('/')[2]}"] += 1
            counts[ranks, cache] = found
    assert len(keys) == 1, "all have the same samples"
    (alone, *_), (bare, *_), (start, *steps) = counts[1, "one"], counts[8, None], counts[8, "eight"]
    assert start == alone and sum(alone.values()) <= 12, "a listing, and each index once"
    assert {name: n for name, n in bare.items() if "embeddings" not in name} == {
        name: n for name, n in alone.items() if "embeddings" not in name
    }
    fetched = sum(steps, Counter({name: n for name, n in start.items() if "embeddings" in name}))
    assert {n for name, n in fetched.items() if name.startswith("GET")} == {1}, "each byte once for all ranks of a node"
    assert max(fetched.values()) <= 8, "and a question per file and rank"
