from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import BadSample, ConfigError, DataError
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.reading.loader import Batch, Decoded, Loader
from data_pipeline.shards.index import index_shard
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.photos import samples
from tests.data_pipeline.small_shards import PHOTOS, write_shards

BASE = DataConfig(global_batch=8, lanes=4, window=3, threads=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for path in PHOTOS.glob("*.tar"):
        shutil.copy(path, folder)
    return str(folder)


def steps(loader: Loader, count: int) -> list[list[Batch]]:
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def pictures(config: DataConfig, count: int = 3, **options: Any) -> list[list[Batch]]:
    return steps(Loader(config, **{"image_size": 32, "low_res_size": 8, "seed": 1, **options}), count)


def test_batches_of_photographs(photos: str) -> None:
    (batch,) = pictures(replace(BASE, shards=photos), 1)[0]
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 32, 32)
    assert batch.low_res is not None and batch.low_res.shape == (8, 3, 8, 8)
    assert batch.images.is_contiguous()
    assert batch.positions.dtype == torch.int64 and sorted(batch.positions.tolist()) == list(range(8))
    assert len(set(batch.keys)) == 8 and all(batch.captions)
    assert batch.images.float().std() > 20


@pytest.mark.parametrize("world_size, micro_batch", [(2, 0), (4, 1), (1, 2)])
def test_ranks_and_micro_batches_change_nothing(photos: str, world_size: int, micro_batch: int) -> None:
    config = replace(BASE, shards=photos)
    whole = [batch for step in pictures(config) for batch in step]
    split = replace(config, micro_batch=micro_batch)
    ranks = [pictures(split, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number, expected in enumerate(whole):
        parts = [batch for rank in ranks for batch in rank[number]]
        assert len(parts) == world_size * (8 // world_size // (micro_batch or 8 // world_size))
        assert torch.equal(torch.cat([part.positions for part in parts]), expected.positions)
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert [caption for part in parts for caption in part.captions] == expected.captions
        assert [key for part in parts for key in part.keys] == expected.keys


def test_resuming_gives_what_would_have_followed(photos: str) -> None:
    config = replace(BASE, shards=photos)
    loader = Loader(config, image_size=32, seed=1)
    assert loader.position == 0
    for _ in range(2):
        next(loader)
    state = loader.state()
    assert (loader.position, state["position"]) == (16, 16)  # what was consumed, not what was prefetched
    (expected,) = next(loader)
    loader.close()
    resumed = Loader(config, image_size=32, seed=1, position=state["position"])
    resumed.check_state(state)
    (batch,) = next(resumed)
    resumed.close()
    assert torch.equal(batch.images, expected.images) and batch.keys == expected.keys
    assert json.loads(json.dumps(state)) == state


def test_a_changed_run_is_refused_and_the_change_named(photos: str, tmp_path: Path) -> None:
    state = Loader(replace(BASE, shards=photos), image_size=32, seed=1).state()
    shutil.copytree(photos, tmp_path / "copy")
    moved = replace(BASE, shards=str(tmp_path / "copy"))
    Loader(moved, image_size=32, seed=1, rank=1, world_size=2).check_state(state)
    cases = {
        r"data\.global_batch from 8 to 16": replace(moved, global_batch=16),
        r"data\.lanes from 4 to 2": replace(moved, lanes=2),
        r"data\.window from 3 to 5": replace(moved, window=5),
        r"data\.filter from {} to {'min_caption': 1}": replace(moved, filter=FilterConfig(min_caption=1)),
        "number of shards from 2 to 1; the number of samples": replace(moved, shards=f"{tmp_path}/copy/00000.tar"),
    }
    for message, config in cases.items():
        with pytest.raises(ConfigError, match=message):
            Loader(config, image_size=32, seed=1).check_state(state)
    with pytest.raises(ConfigError, match="seed from 1 to 2"):
        Loader(moved, image_size=32, seed=2).check_state(state)


def fake(bad: set[str], reason: str = "decode_error") -> Any:
    def decode(sample: dict[str, Any], position: int) -> Decoded:
        if sample["__key__"] in bad:
            raise BadSample(reason, "for the test")
        return Decoded(sample["__key__"], np.full((2, 2, 3), position % 256, np.uint8), None, sample["txt"].decode())

    return decode


def test_bad_samples_are_replaced_in_place_and_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, [20, 15])
    config = replace(BASE, shards=str(tmp_path))
    good = [batch for step in steps(Loader(config, image_size=2, decode=fake(set())), 9) for batch in step]
    bad = {good[0].keys[3], good[1].keys[0]}
    quarantine = tmp_path / "logs" / "quarantine.jsonl"
    results = []
    for world_size in (1, 2):
        batches, counts = [], []
        for rank in range(world_size):
            loader = Loader(
                config, image_size=2, decode=fake(bad), rank=rank, world_size=world_size, quarantine=str(quarantine)
            )
            batches.append([step[0] for step in steps(loader, 9)])
            counts.append(loader.counters)
        keys = [[key for rank in batches for key in rank[step].keys] for step in range(9)]
        results.append(keys)
        met = sum(batch.keys.count(key) for batch in good for key in bad)
        assert sum(count["bad"] for count in counts) == met
        assert sum(count["bad_decode_error"] for count in counts if "bad_decode_error" in count) >= met
        assert sum(count["samples"] for count in counts) == 72
        for step, expected in zip(keys, good, strict=True):
            assert [a == b for a, b in zip(step, expected.keys, strict=True)] == [k not in bad for k in expected.keys]
            assert not bad & set(step)
    assert results[0] == results[1]
    records = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {record["key"] for record in records} == bad
    assert {"shard", "key", "offset", "reason", "position"} <= set(records[0])


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    write_shards(tmp_path, [30, 30])
    config = replace(BASE, shards=str(tmp_path), global_batch=100)
    half = {f"00001{i:04d}" for i in range(30)}
    loader = Loader(config, image_size=2, decode=fake(half))
    alone = Loader(config, image_size=2, decode=fake(half), world_size=2)
    steps(alone, 12)  # one of several processes does not decide alone
    assert alone.too_many(60, 20) and not alone.too_many(6000, 20)
    said = str(alone.too_many_error(60, 20, [Counter({"a.tar": 5}), Counter({"b.tar": 9, "a.tar": 6})]))
    assert "20 of 60 samples were bad" in said and "a.tar (11), b.tar (9)" in said
    with pytest.raises(DataError, match=r"of \d\d? samples were bad.*max_bad_share=0.01.*00001\.tar"):
        steps(loader, 1)
    with pytest.raises(DataError, match=r"samples were bad.*max_bad_share=0.01"):
        next(loader)  # not the rest of the step that failed
    one = {"000010007"}
    steps(Loader(replace(config, max_bad_share=0.02), image_size=2, decode=fake(one)), 12)  # one of 60 is 0.017
    with pytest.raises(DataError, match=r"of 1\d\d\d samples were bad.*max_bad_share=0.015"):
        steps(Loader(replace(config, max_bad_share=0.015), image_size=2, decode=fake(one)), 12)
    with pytest.raises(DataError, match=r"1 of \d\d? samples were bad"):
        steps(Loader(replace(config, max_bad_share=0.0), image_size=2, decode=fake(one)), 1)


def test_a_data_set_of_bad_samples_is_an_error_not_a_hang(tmp_path: Path) -> None:
    write_shards(tmp_path, [5])
    everything = {f"00000{i:04d}" for i in range(5)}
    with pytest.raises(DataError, match=r"all 64 substitutes .*decode_error.*cascade verify"):
        steps(Loader(replace(BASE, shards=str(tmp_path)), image_size=2, decode=fake(everything)), 1)


def test_an_error_in_the_decoder_reaches_the_trainer(tmp_path: Path) -> None:
    write_shards(tmp_path, [5])

    def broken(sample: dict[str, Any], position: int) -> Decoded:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        steps(Loader(replace(BASE, shards=str(tmp_path)), image_size=2, decode=broken), 1)


def test_a_shard_that_disappears_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [50])
    loader = Loader(replace(BASE, shards=str(tmp_path)), image_size=2, decode=fake(set()))
    Path(paths[0]).unlink()
    with pytest.raises(DataError, match=r"00000\.tar: No such file"):
        steps(loader, 1)


def test_impossible_world_size(photos: str) -> None:
    with pytest.raises(ConfigError, match=r"world size 3.*1, 2, 4"):
        Loader(replace(BASE, shards=photos), image_size=32, world_size=3)


def test_members_that_training_does_not_use_are_not_read(tmp_path: Path) -> None:
    """Latents or masks next to the pictures are not read, and damage to them does not affect the sample."""
    for name in ("plain", "more"):
        (tmp_path / name).mkdir()
        with ShardWriter(str(tmp_path / name / "0.tar")) as shard:
            for key, members in samples().items():
                extra = {"npy": bytes(200_000)} if name == "more" else {}
                shard.write(key, {"jpg": members["jpg"], **extra, "txt": members["txt"]})
    path = tmp_path / "more" / "0.tar"
    modified = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    for part in (part for row in range(4) for part in index_shard(str(path)).parts(row) if part.extension == "npy"):
        data[part.offset] = 1
    path.write_bytes(data)
    os.utime(path, ns=(modified, modified))
    batches = []
    for name in ("plain", "more"):
        loader = Loader(DataConfig(shards=str(tmp_path / name), global_batch=4), image_size=16)
        (batch,) = next(loader)
        assert loader.counters["bad"] == 0
        batches.append(batch)
        loader.close()
    assert batches[0].keys == batches[1].keys and torch.equal(batches[0].images, batches[1].images)
