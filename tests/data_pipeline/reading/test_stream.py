from __future__ import annotations

import gc
import io
import json
import os
import tarfile
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from data_pipeline import ShardStream
from data_pipeline.common.errors import ConfigError
from data_pipeline.reading.prefetch import Prefetcher
from data_pipeline.storage import store
from tests.data_pipeline.small_shards import members, write_shards

COUNTS = [13, 7, 0, 19, 5, 16]  # 60 samples, uneven
BATCH, LANES, WINDOW = 16, 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path, COUNTS)
    return str(path)


def stream(shards: Any, **options: Any) -> ShardStream:
    return ShardStream(shards, **{"seed": 3, "global_batch": BATCH, "lanes": LANES, "window": WINDOW, **options})


def batches_of(parts: list[list[str]], world_size: int) -> list[list[str]]:
    """Merges the ranks' lists of keys into the keys of each global batch."""
    share = BATCH // world_size
    steps = len(parts[0]) // share
    return [[key for part in parts for key in part[step * share : (step + 1) * share]] for step in range(steps)]


def keys(shards: Any, world_size: int, workers: int, steps: int, **options: Any) -> list[list[str]]:
    """Keys per global batch as `world_size` ranks with that many worker processes read them."""
    parts = []
    for rank in range(world_size):
        start = options.get("position", 0)
        source = stream(shards, rank=rank, world_size=world_size, stop=start + steps * BATCH, **options)
        pipeline = wds.DataPipeline(source, wds.map(_key), wds.batched(source.micro_batch, collation_fn=None))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more workers than cores
            loader = wds.WebLoader(pipeline, num_workers=workers, batch_size=None)
            parts.append([key for batch in loader for key in batch])
    return batches_of(parts, world_size)


def _key(sample: dict[str, Any]) -> str:
    return sample["__key__"]


@pytest.fixture(scope="module")
def reference(folder: str) -> list[list[str]]:
    return keys(folder, 1, 0, 15)


def test_every_sample_once_per_epoch_and_batches_straddle_epochs(reference: list[list[str]]) -> None:
    read = [key for batch in reference for key in batch]
    n = sum(COUNTS)
    by_position = {}
    order = stream_positions(15 * BATCH)
    for position, key in zip(order, read, strict=True):
        by_position[position] = key
    for epoch in range(4):
        counted = Counter(by_position[p] for p in range(epoch * n, (epoch + 1) * n))
        assert len(counted) == n and set(counted.values()) == {1}


def stream_positions(count: int) -> list[int]:
    from data_pipeline.order.order import rank_positions

    return [p for step in range(count // BATCH) for p in rank_positions(step, BATCH, LANES, 0, 1).tolist()]


@pytest.mark.parametrize(
    "world_size, workers, micro_batch", [(1, 1, 0), (1, 3, 0), (2, 0, 0), (2, 3, 4), (4, 0, 2), (4, 1, 0), (8, 0, 0)]
)
def test_same_batches_on_any_number_of_ranks_and_workers(
    folder: str, reference: list[list[str]], world_size: int, workers: int, micro_batch: int
) -> None:
    assert keys(folder, world_size, workers, 5, micro_batch=micro_batch) == reference[:5]


@pytest.mark.parametrize("world_size, workers, steps_done", [(1, 0, 1), (2, 1, 4), (4, 0, 7), (1, 3, 9)])
def test_any_position_resumes_with_another_layout(
    folder: str, reference: list[list[str]], world_size: int, workers: int, steps_done: int
) -> None:
    resumed = keys(folder, world_size, workers, 4, position=steps_done * BATCH)
    assert resumed == reference[steps_done : steps_done + 4]


@pytest.mark.parametrize("batch", [2, 4, 5, 0])
def test_workers_divide_positions_as_their_pipeline_batches(
    folder: str, reference: list[list[str]], batch: int
) -> None:
    """The stream is not told how large batches are, and they need not fit the rank's share of 8 samples."""
    parts = []
    for rank in range(2):
        stages = [wds.map(_key), *([wds.batched(batch, collation_fn=None)] if batch else [])]
        pipeline = wds.DataPipeline(stream(folder, rank=rank, world_size=2), *stages)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = wds.WebLoader(pipeline, num_workers=3, batch_size=None)
            items = islice(loader, 8 * 5 // max(batch, 1))
            parts.append([key for item in items for key in (item if batch else [item])])
    assert batches_of(parts, 2) == reference[:5]


def _as_it_is(items: Any) -> Any:
    return items


def test_a_loader_that_batches_itself_states_its_batch_or_has_one_worker(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch waits this long, in vain, for each worker of a loader that ended with an error
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)

    def positions(workers: int, batch: int | None, **options: Any) -> list[int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = DataLoader(stream(folder, **options), batch_size=batch, num_workers=workers, collate_fn=_as_it_is)
            items = list(islice(loader, 12))
        return [int(sample["__position__"]) for item in items for sample in (item if batch else [item])]

    for workers in (1, 3):
        assert positions(workers, None, micro_batch=1) == positions(0, None, micro_batch=1)
        assert positions(workers, 4, micro_batch=4) == positions(0, 4, micro_batch=4)
    for batch in (None, 4):
        with pytest.raises(ConfigError, match="micro_batch=1 for batch_size=None"):
            positions(2, batch)
    gc.collect()  # ends such a loader here, not in a later test


def test_a_state_resumes_and_refuses_what_changed(folder: str, reference: list[list[str]], tmp_path: Path) -> None:
    state = json.loads(json.dumps(stream(folder).state(2 * BATCH)))
    resumed = stream(folder, state=state, stop=4 * BATCH)
    assert [sample["__key__"] for sample in resumed] == reference[2] + reference[3]
    write_shards(tmp_path, [*COUNTS, 3])
    with pytest.raises(ConfigError, match="number of shards from 6 to 7"):
        stream(str(tmp_path), state=state)
    with pytest.raises(ConfigError, match=r"data\.window from 4 to 5"):
        stream(folder, state=state, window=5)


def test_a_state_is_taken_between_global_batches(folder: str, reference: list[list[str]]) -> None:
    """Within one, samples are not consumed in the order of their positions."""
    source = stream(folder, position=8, stop=40)
    for position in (8, 24, 40, np.int64(24), BATCH + 8):
        assert json.loads(json.dumps(source.state(position)))["position"] == position
    with pytest.raises(ConfigError, match=r"state: position=30 lies within a global batch of 16 .* at 24 or 40"):
        source.state(30)
    with pytest.raises(ConfigError, match=r"position=3\.5: it must be a whole number"):
        source.state(3.5)  # type: ignore[arg-type]
    states: list[Any] = [{}, [], "x", 3]
    for state in states:
        with pytest.raises(ConfigError, match="state: give what"):
            stream(folder, state=state)


def test_every_iteration_begins_at_the_position(folder: str, reference: list[list[str]]) -> None:
    source = stream(folder)
    epoch = wds.DataPipeline(source, wds.map(_key)).with_epoch(BATCH)
    assert list(epoch) == list(epoch) == reference[0]
    source.position = BATCH
    assert list(epoch) == reference[1]


def test_numbers_of_numpy_are_numbers(folder: str, reference: list[list[str]]) -> None:
    given = {"seed": 3, "global_batch": BATCH, "lanes": LANES, "window": WINDOW, "stop": BATCH}
    source = stream(folder, **{name: np.int64(value) for name, value in given.items()})
    assert [sample["__key__"] for sample in source] == reference[0]
    assert json.loads(json.dumps(source.state(BATCH))) == stream(folder).state(BATCH)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1.5}, "seed=1.5: it must be a whole number"),
        ({"stop": "64"}, "stop='64': it must be a whole number"),
        ({"rank": "0"}, "rank='0': it must be a whole number"),
        ({"window": 1.5}, "ShardStream: window=1.5: it must be a whole number"),
        ({"global_batch": None}, "ShardStream: global_batch=None: it must be a whole number"),
        ({"cache_dir": 3}, "ShardStream: cache_dir=3: it must be text"),
        ({"filter": 3}, "ShardStream: filter=3: it must be a mapping"),
        ({"filter": {"min_side": "x"}}, "filter: min_side='x': it must be a whole number"),
        ({"filter": {"licences": "CC0"}}, "filter: licences='CC0': it must be a list"),
    ],
)
def test_values_of_another_type_are_named(folder: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stream(folder, **options)
    assert str(caught.value) == sentence


def test_misspelt_settings_are_named(folder: str) -> None:
    with pytest.raises(ConfigError, match="filter: unknown setting min_sid; the settings are min_side"):
        stream(folder, filter={"min_sid": 64})
    with pytest.raises(ConfigError, match="members: unknown setting img; the settings are image, caption, json"):
        stream(folder, members={"img": ["jpg"]})
    with pytest.raises(ConfigError, match=r"unknown setting prefetch; the settings are .*prefetch_mb"):
        stream(folder, prefetch=64)


def test_members_may_be_a_mapping(folder: str, tmp_path: Path) -> None:
    named = stream(folder, members={"image": ["jpg"]}, index_dir=str(tmp_path))
    assert [sample["__key__"] for sample in islice(named, 8)] == [
        sample["__key__"] for sample in islice(stream(folder), 8)
    ]


def test_samples_are_the_members_bytes(folder: str) -> None:
    for sample in islice(stream(folder), 20):
        number, i = int(sample["__key__"][:5]), int(sample["__key__"][5:])
        content = {name: value for name, value in sample.items() if not name.startswith("__")}
        assert content == members(f"0/{number}/{i}")
        assert sample["__url__"].endswith(f"{number:05d}.tar")
    assert [sample["__position__"] for sample in islice(stream(folder), 20)] == stream_positions(48)[:20]


@pytest.mark.parametrize("budget_mb, whole", [(64, True), (0, False)])
def test_on_s3_the_order_is_the_same(
    folder: str, reference: list[list[str]], bucket: str, monkeypatch: pytest.MonkeyPatch, budget_mb: int, whole: bool
) -> None:
    upload(folder, bucket)
    seen: list[bool] = []

    def watch(self: Prefetcher) -> Iterator[Any]:
        seen.append(self.whole_windows)
        return iterate(self)

    iterate = Prefetcher.__iter__
    monkeypatch.setattr(Prefetcher, "__iter__", watch)
    assert keys(f"s3://{bucket}/*.tar", 2, 0, 5, prefetch_mb=budget_mb) == reference[:5]
    assert seen == [whole, whole]


def test_s3_works_in_worker_processes_after_the_parent_has_used_it(
    folder: str, reference: list[list[str]], bucket: str
) -> None:
    upload(folder, bucket)
    assert keys(f"s3://{bucket}/", 1, 2, 3, position=2 * BATCH) == reference[2:5]


def upload(folder: str, bucket: str) -> None:
    for path in sorted(Path(folder).iterdir()):
        store.write_bytes(f"s3://{bucket}/{path.name}", path.read_bytes())


def test_members_that_are_far_apart_are_requested_individually(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tar packed by type: first all pictures, then all texts."""
    samples = {f"{i:03d}": members(str(i), longest=200_000) for i in range(24)}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for extension in ("jpg", "txt"):
            for key, sample in samples.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(sample[extension])
                tar.addfile(info, io.BytesIO(sample[extension]))
    url = f"s3://{bucket}/0.tar"
    store.write_bytes(url, (tmp_path / "0.tar").read_bytes())
    source = stream(url, global_batch=8, stop=24)
    requested: list[int] = []
    read_range = store.read_range

    def counted(url: str, start: int, end: int, *args: Any) -> bytes:
        requested.append(end - start)
        return read_range(url, start, end, *args)

    monkeypatch.setattr(store, "read_range", counted)
    read = {sample["__key__"]: sample for sample in source}
    assert read.keys() == samples.keys()
    assert all(read[key][name] == sample[name] for key, sample in samples.items() for name in ("jpg", "txt"))
    size = sum(len(sample["jpg"]) + len(sample["txt"]) for sample in samples.values())
    assert sum(requested) < 3 * size, "samples near the seam are read through"
    assert caplog.text.count("are far apart") == 1


def test_a_compressed_shard_is_read_in_the_same_order(tmp_path: Path, folder: str, reference: list[list[str]]) -> None:
    import gzip

    for path in Path(folder).glob("*.tar"):
        (tmp_path / path.name).write_bytes(gzip.compress(path.read_bytes()))
    assert keys(str(tmp_path), 1, 0, 3) == reference[:3]


@pytest.mark.parametrize("by_type", [False, True])
def test_a_compressed_shard_takes_no_more_memory_than_the_budget(tmp_path: Path, by_type: bool) -> None:
    """The files of 24 samples, 24 MB in a gzip of kilobytes, side by side or (`by_type`) all pictures first."""
    names = [f"{number}.{ending}" for number in range(24) for ending in ("jpg", "txt")]
    with tarfile.open(tmp_path / "a.tar.gz", mode="w:gz", compresslevel=1) as tar:
        for name in sorted(names, key=lambda name: by_type and name.endswith("txt")):
            info = tarfile.TarInfo(name)
            info.size = 1 << 20 if name.endswith("jpg") else len(name)
            tar.addfile(info, io.BytesIO(name.encode().ljust(info.size, b"\0")))
    source = stream(str(tmp_path), prefetch_mb=4, window=0, stop=24)
    tracemalloc.start()
    try:
        read = [(sample["jpg"][:9].split(b"\0")[0], sample["txt"]) for sample in source]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(read) == sorted((f"{n}.jpg".encode(), f"{n}.txt".encode()) for n in range(24))
    assert peak < 14 << 20, f"{peak >> 20} MiB"


def test_filters_apply_and_the_stream_stops(folder: str) -> None:
    source = stream(folder, filter={"min_aesthetic": 5.0}, stop=40)
    read = list(source)
    assert len(read) == 40
    assert source.dataset.samples < 60
    assert all(float(s["json"].split(b'SCORE": ')[1].rstrip(b"}")) >= 5.0 for s in read)


def test_impossible_layouts(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"world size 3.*1, 2, 4, 8"):
        stream(folder, rank=0, world_size=3)
    with pytest.raises(ConfigError, match=r"data\.lanes=5"):
        stream(folder, lanes=5)
    with pytest.raises(ConfigError, match="rank=2"):
        stream(folder, rank=2, world_size=2)
    for position in (-3, 1.5, 2**70):
        with pytest.raises(ConfigError, match=rf"position={position}: it must be a whole number"):
            stream(folder, position=position)


def test_rank_and_world_size_come_from_the_environment(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = stream(folder)
    assert (source.rank, source.world_size) == (1, 2)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        source = stream(folder)
    finally:
        torch.distributed.destroy_process_group()
    assert (source.rank, source.world_size) == (3, 4), (
        "where it is initialized, the variables may be another launcher's"
    )
    monkeypatch.setenv("RANK", "")
    with pytest.raises(ConfigError, match="RANK='': this environment variable must be a whole number"):
        stream(folder)
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="rank: it is not known, nor is RANK set; with world_size=2, give it"):
        stream(folder)


def test_a_flipped_byte_is_replaced_by_the_same_substitute_everywhere(folder: str, tmp_path: Path) -> None:
    paths = write_shards(tmp_path, COUNTS)
    clean = {s["__position__"]: s["__key__"] for s in stream(str(tmp_path), stop=64)}
    source = stream(str(tmp_path), stop=64)
    index, _ = source.dataset.index(3)
    victim = index.key(4)
    modified = os.stat(paths[3]).st_mtime_ns
    with open(paths[3], "r+b") as file:
        file.seek(index.parts(4)[0].offset)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(paths[3], ns=(modified, modified))  # a failing disk leaves no trace
    read = {s["__position__"]: s for s in source}
    hit = [p for p, sample in read.items() if sample["__failures__"]]
    assert hit and all(clean[p] == victim and read[p]["__key__"] != victim for p in hit)
    assert all(json.loads(read[p]["__failures__"])[0]["reason"] == "checksum" for p in hit)
    assert {p: s["__key__"] for p, s in read.items() if p not in hit} == {
        p: k for p, k in clean.items() if p not in hit
    }
    batched = wds.DataPipeline(stream(str(tmp_path), stop=64), wds.batched(16))
    assert [len(batch["__key__"]) for batch in batched] == [16] * 4, "a substitute has the keys of any other sample"
    halves = [s for rank in range(2) for s in stream(str(tmp_path), stop=64, rank=rank, world_size=2)]
    assert {s["__position__"]: s["__key__"] for s in halves} == {p: s["__key__"] for p, s in read.items()}


def test_the_first_sample_does_not_wait_until_the_budget_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network or in a .tar.gz, the budget would hold tens of thousands of epochs of a few small samples."""
    with tarfile.open(tmp_path / "a.tar.gz", mode="w:gz") as tar:
        for name in ("0.jpg", "0.txt", "1.jpg", "1.txt"):
            info = tarfile.TarInfo(name)
            info.size = 9
            tar.addfile(info, io.BytesIO(b"x" * 9))
    asked, plan = [], Prefetcher._plan
    monkeypatch.setattr(Prefetcher, "_plan", lambda self, *place: asked.append(place) or plan(self, *place))
    first = next(iter(stream(str(tmp_path / "a.tar.gz"))))
    assert first["__key__"] in ("0", "1") and len(asked) <= 256
