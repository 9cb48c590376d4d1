"""Mixtures through the stream and the loader: on disk and s3, on any number of processes, resumed, and changed in the
middle."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import ShardStream
from data_pipeline.commands import index, order
from data_pipeline.common.errors import BadSample, ConfigError, DataError
from data_pipeline.common.terminal import in_lines
from data_pipeline.config import DataConfig
from data_pipeline.reading.loader import Loader
from data_pipeline.reading.micro_batches import Decoded
from data_pipeline.reading.state import check_state, state_of
from data_pipeline.shards.mixture import open_dataset
from data_pipeline.storage import store
from tests.data_pipeline.commands.test_order import Command
from tests.data_pipeline.photos import copy_shards
from tests.data_pipeline.small_shards import write_shards

BATCH, LANES = 16, 8
Entry = dict[str, Any]
Seen = list[tuple[str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets in a directory whose name contains a blank; their shards and keys have the same names."""
    folder = tmp_path_factory.mktemp("mixed data") / "with blank"
    for name, counts in {"a": [20, 33, 7], "b": [11, 9], "c": [5, 6]}.items():
        (folder / name).mkdir(parents=True)
        write_shards(folder / name, counts, seed=ord(name))
    return folder


def mixture(home: object) -> list[Entry]:
    return [
        {"name": "a", "shards": f"{home}/a", "weight": 0.7},
        {"name": "b", "shards": f"{home}/b", "weight": 0.3, "filter": {"min_aesthetic": 4.0}},
        {"name": "c", "shards": [f"{home}/c/*.tar"], "weight": {0: 0, 160: 0.5}, "end": 640},
    ]


def read(shards: list[Entry], world_size: int = 1, position: int = 0, stop: int = 960, **options: Any) -> Seen:
    found: dict[int, tuple[str, str]] = {}
    for rank in range(world_size):
        stream = ShardStream(
            shards,
            seed=3,
            global_batch=BATCH,
            lanes=LANES,
            window=4,
            rank=rank,
            world_size=world_size,
            position=position,
            stop=stop,
            **options,
        )
        for sample in stream:
            found[sample["__position__"]] = sample["__dataset__"], sample["__key__"]
    return [found[number] for number in range(position, stop)]


@pytest.fixture(scope="module")
def reference(home: Path) -> Seen:
    return read(mixture(home))


def test_processes_and_stops_change_nothing_and_shares_are_kept(home: Path, reference: Seen) -> None:
    assert read(mixture(home), world_size=8) == reference
    assert read(mixture(home), world_size=2, position=480) == reference[480:]
    shares = [Counter(name for name, _ in reference[a:b]) for a, b in ((0, 160), (160, 640), (640, 960))]
    assert shares == [{"a": 112, "b": 48}, {"a": 224, "b": 96, "c": 160}, {"a": 224, "b": 96}]
    times = Counter(reference)
    assert {times[key] for key in times if key[0] == "a"} <= {9, 10}, "560 of 60 samples"
    kept = {key for name, key in times if name == "b"}
    assert len(kept) == 11 and {times["b", key] for key in kept} <= {21, 22}, "240 of the 11 that pass its filter"


@pytest.mark.parametrize("budget_mb", [64, 0])
def test_a_mixture_on_s3_is_read_in_the_same_order(home: Path, reference: Seen, bucket: str, budget_mb: int) -> None:
    for path in home.rglob("*.*"):
        store.write_bytes(f"s3://{bucket}/{path.relative_to(home)}", path.read_bytes())
    shards = mixture(f"s3://{bucket}")
    assert read(shards, world_size=2, stop=320, prefetch_mb=budget_mb) == reference[:320]
    assert read(shards, position=480, stop=640, prefetch_mb=budget_mb) == reference[480:640]


def test_a_single_data_set_keeps_its_order(home: Path) -> None:
    alone = [key for _, key in read([{"name": "a", "shards": f"{home}/a"}], stop=320)]
    plain = {
        s["__position__"]: s["__key__"]
        for s in ShardStream(f"{home}/a", seed=3, global_batch=BATCH, lanes=LANES, window=4, stop=320)
    }
    assert alone == [plain[number] for number in range(320)]


def state(shards: Any, position: int = 320, **others: Any) -> dict[str, Any]:
    config = DataConfig(shards=shards, global_batch=BATCH, lanes=LANES, window=4, **others)
    return json.loads(json.dumps(state_of(open_dataset(config), config, 3, position)))


def test_a_data_set_appended_in_the_middle_leaves_the_others_in_their_order(home: Path) -> None:
    plain = f"{home}/a"
    before, first = state(plain), [{"name": "z", "shards": plain}]
    more: list[Entry] = [{"name": "b", "shards": f"{home}/b", "weight": 1.5, "start": 320}, *first]
    check_state(state(more), before)
    old = read(first, stop=640)
    new = read(more, stop=640)
    assert new[:320] == old[:320]
    assert Counter(name for name, _ in new[320:]) == {"b": 192, "z": 128}
    after = Counter(key for name, key in new[320:] if name == "z")
    assert set(Counter(key for _, key in new[:320]) + after) == set(Counter(key for _, key in old))
    once = Counter(key for name, key in new if name == "z")
    assert set(once.values()) <= {7, 8}, "448 of its 60 samples: each once in each of its epochs"
    for start in (304, 0):
        with pytest.raises(ConfigError, match=r"from 1 data.shards to .* start: 320 for a new data set"):
            check_state(state([{**more[0], "start": start}, *first]), before)


def test_a_weight_changes_only_from_a_position_on(home: Path) -> None:
    shards = mixture(home)
    before = state(shards)
    check_state(state([*reversed(shards)]), before)
    check_state(state([{**one, "weight": one["weight"] if one["name"] == "c" else {0: 0.7 * n, 320: 1}}
                       for n, one in zip((1, 3 / 7, 0), shards, strict=True)]), before)  # fmt: skip
    heavier = [{**shards[0], "weight": 0.9}, *shards[1:]]
    with pytest.raises(ConfigError, match=r"from 7/10 a \+ 3/10 b.* to 3/4 a \+ 1/4 b.*weight: {0: OLD, 320: NEW}"):
        check_state(state(heavier), before)
    with pytest.raises(ConfigError, match=r"of data set b: data.filter from {'min_aesthetic': 4.0} to {}"):
        check_state(state([shards[0], {**shards[1], "filter": {}}, shards[2]]), before)
    with pytest.raises(ConfigError, match=r"from 7/10 a"):
        check_state(state(f"{home}/a"), before)


def decode(sample: dict[str, Any], position: int) -> Decoded:
    import numpy as np

    if sample["__dataset__"] == "b" and sample["__key__"].endswith("3"):
        raise BadSample("decode_error", "for the test")
    pixels = np.zeros((2, 2, 3), np.uint8)
    return Decoded(sample["__key__"], pixels, None, "caption", dataset=sample["__dataset__"])


def test_bad_samples_count_for_their_data_set_and_are_replaced_from_it(home: Path) -> None:
    config = DataConfig(shards=mixture(home), global_batch=BATCH, lanes=LANES, window=4, max_bad_share=1.0)
    loader = Loader(config, image_size=2, seed=3, decode=decode)
    batches = [next(loader)[0] for _ in range(10)]
    loader.close()
    names = Counter(name for batch in batches for name in batch.datasets)
    assert names == {"a": 112, "b": 48}
    counted = {key: count for key, count in loader.counters.items() if "/" in key}
    bad = counted.pop("bad_dataset/b")
    assert counted == {"samples_dataset/a": 112, "samples_dataset/b": 48} and 0 < bad == loader.counters["bad"]


def test_each_data_set_has_its_captions(tmp_path: Path) -> None:
    folders = [copy_shards(tmp_path / name) for name in ("plain", "longer")]
    shards = [
        {"name": "plain", "shards": str(folders[0])},
        {"name": "longer", "shards": str(folders[1]), "captions": {"sources": {"json:captions": 1}}},
    ]
    loader = Loader(DataConfig(shards=shards, global_batch=8), image_size=16, own_process=True)
    batches = [next(loader)[0] for _ in range(3)]
    loader.close()
    assert Counter(name for batch in batches for name in batch.datasets) == {"plain": 12, "longer": 12}
    assert loader.sources == {"txt": 12, "json:captions": 12}


def test_a_missing_data_set_is_named(home: Path) -> None:
    with pytest.raises(DataError, match=r"data.shards, data set b=.*none: no .tar shard"):
        open_dataset(DataConfig(shards=[{"name": "b", "shards": f"{home}/none"}]))


def test_one_shard_in_two_data_sets_is_reported_and_under_two_names_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = write_shards(tmp_path, [3])
    (tmp_path / "00000.tar.gz").write_bytes(gzip.compress(Path(shard).read_bytes(), 1))
    twice = [{"name": name, "shards": shard} for name in "ab"]
    assert open_dataset(DataConfig(shards=twice)).samples == 6
    assert "shards in several data sets: 1, such as" in caplog.text and "00000.tar in a and b" in caplog.text
    twins = [twice[0], {"name": "b", "shards": f"{shard}.gz"}]
    for config in (DataConfig(shards=twins), DataConfig(shards=twins, buckets=["1x1", "4x3"])):
        with pytest.raises(
            DataError, match=r"data\.shards: \S*00000\.tar and \S*00000\.tar\.gz may be one shard twice"
        ):
            open_dataset(config)


def test_index_reports_each_data_set_and_its_copies(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, [6, 3] if name == "c" else [6], seed=seed)
    shards = [{"name": name, "shards": f"{tmp_path}/{name}"} for name in "abc"]
    command: Any = Command(DataConfig(shards=shards))
    command.json = True
    found = index.main(command)
    assert found["datasets"]["c"] == {"shards": 2, "samples": 9, "remaining": 9}
    first, *others = found["copies"]
    assert first == {"datasets": ["a", "c"], "same_picture": 6, "same_key": 6, "example": first["example"]}
    assert first["example"].startswith("00000")
    assert "c (shards 2, samples 9, remaining 9)" in in_lines(found)
    assert [(pair["datasets"], pair["same_picture"], pair["same_key"]) for pair in others] == [
        (["a", "b"], 0, 6),
        (["b", "c"], 0, 6),
    ]


def test_order_shows_the_data_sets_and_their_shares(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DataConfig(shards=mixture(home), global_batch=BATCH, lanes=LANES, window=4)
    order.main(Command(config, seed=3, batches=1, quality=True))
    first, quality = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert sorted({key.partition(":")[0] for key in first["ranks"][0]}) == ["a", "b"]
    assert quality["datasets"]["c"]["wanted"] == pytest.approx(1 / 3 * 22 / 32, abs=1e-3)
    assert all(abs(one["share"] - one["wanted"]) < 0.01 for one in quality["datasets"].values())
