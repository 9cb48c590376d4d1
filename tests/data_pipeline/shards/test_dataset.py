from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.team import Strangers
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.shards.dataset import Dataset, _build_all, load_or_build, window_of
from data_pipeline.shards.index import ShardIndex, index_url, load_index, save_index
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage.retry import DEFAULT
from data_pipeline.storage.store import describe, expand
from tests.data_pipeline.small_shards import write_shards


def load(folder: Path, **rules: Any) -> Dataset:
    config = DataConfig(shards=str(folder), filter=FilterConfig(**rules))
    return load_or_build(expand(config.shards), config)


def picture(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    rows = [
        ((256, 256), {"AESTHETIC_SCORE": 6.0, "pwatermark": 0.1}, "a good caption"),
        ((255, 300), {"AESTHETIC_SCORE": 6.0, "pwatermark": 0.1}, "a good caption"),
        ((600, 256), {"AESTHETIC_SCORE": 6.0, "pwatermark": 0.1}, "a good caption"),
        ((300, 300), {"AESTHETIC_SCORE": 4.9, "pwatermark": 0.9}, "a good caption"),
        ((300, 300), {"pwatermark": 0.1}, "a good caption"),
        ((300, 300), {"AESTHETIC_SCORE": 5.0, "pwatermark": 0.9}, "a good caption"),
        ((300, 300), {"AESTHETIC_SCORE": 5.0, "pwatermark": 0.5}, "x"),
    ]
    with ShardWriter(str(tmp_path / "0.tar")) as shard:
        for number, (size, facts, caption) in enumerate(rows):
            members = {"png": picture(*size), "json": json.dumps(facts).encode(), "txt": caption.encode()}
            shard.write(str(number), members)
        shard.write("7", {"txt": b"no picture"})
    return tmp_path


def test_filters_count_each_reason_exactly(scored: Path) -> None:
    data = load(scored, min_side=256, max_aspect=2, min_aesthetic=5.0, max_watermark=0.5, min_caption=3)
    assert data.dropped == {
        "missing_image": 1,
        "too_small": 1,
        "aspect_ratio": 1,
        "low_aesthetic": 1,
        "unknown_aesthetic": 1,
        "watermark": 1,
        "short_caption": 1,
    }
    assert (data.samples, data.total) == (1, 8)
    assert data.key(0, 0) == "0"


def test_processes_that_cannot_communicate_begin_at_different_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1, 1, 1])
    entries = describe(expand(str(tmp_path)))
    built = _build_all([0, 1, 2, 3], entries, DataConfig(), DEFAULT, Strangers(1, 2).start)
    assert [number for number, _ in built] == [2, 3, 0, 1]


def test_a_score_equal_to_the_limit_passes(tmp_path: Path) -> None:
    """Scores are stored in 32 bits, where 0.3 is slightly more and 5.1 slightly less than in the settings."""
    facts = {"AESTHETIC_SCORE": 5.1, "pwatermark": 0.3, "punsafe": 0.1, "similarity": 0.7}
    with ShardWriter(str(tmp_path / "0.tar")) as shard:
        text = "\ufefffive".encode("utf-16-le")
        shard.write("0", {"png": picture(9, 9), "json": json.dumps(facts).encode(), "txt": text})
    rules = {"min_aesthetic": 5.1, "max_watermark": 0.3, "max_unsafe": 0.1, "min_similarity": 0.7, "max_caption": 5}
    assert load(tmp_path, **rules).samples == 1


def test_without_filters_only_impossible_samples_are_left_out(scored: Path) -> None:
    data = load(scored)
    assert data.samples == 7
    assert data.dropped == {"missing_image": 1}


def test_filters_that_leave_nothing_are_named(scored: Path) -> None:
    with pytest.raises(DataError, match=r"no sample of 8 .*too_small.*data\.filter"):
        load(scored, min_side=10_000)


def test_fingerprint(tmp_path: Path) -> None:
    first, moved, fewer = tmp_path / "first", tmp_path / "moved", tmp_path / "fewer"
    for folder in (first, fewer):
        folder.mkdir()
    write_shards(first, [4, 6, 5])
    shutil.copytree(first, moved)
    write_shards(fewer, [4, 6])
    base = load(first).fingerprint
    assert load(moved).fingerprint == base
    assert load(fewer).fingerprint != base
    assert load(first, min_caption=1).fingerprint != base
    os.remove(moved / "00001.index.parquet")
    assert load(moved).fingerprint == base


def test_missing_indexes_are_built_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, [2, 3])
    (tmp_path / "00001.index.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).samples == 5
    assert "no index for 1 of 2 shards" in caplog.text
    caplog.clear()
    assert load(tmp_path).samples == 5
    assert caplog.text == ""


def test_indexes_deleted_while_their_summaries_remain_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from data_pipeline.shards import summaries

    monkeypatch.setattr(summaries, "_WORTH_A_FILE", 2)
    write_shards(tmp_path, [2, 3])
    assert load(tmp_path).samples == load(tmp_path).samples == 5
    for index in tmp_path.glob("*.index.parquet"):
        index.unlink()
    data = load(tmp_path)
    assert data.key(1, 2) and "its index is missing or damaged; rebuilding it" in caplog.text
    assert [path.name for path in tmp_path.glob("*.index.parquet")] == ["00001.index.parquet"]


def test_damage_is_reported_and_the_rest_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_shards(tmp_path, [6], longest=3000)[0]
    data = Path(path).read_bytes()
    (tmp_path / "00000.index.parquet").unlink()
    Path(path).write_bytes(data[: len(data) // 2])
    (tmp_path / "00001.tar").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path)
    assert 0 < loaded.samples < 6
    assert "truncated_shard" in caplog.text and "empty_shard" in caplog.text


def test_a_shard_that_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    (tmp_path / "00001.tar").write_text("<Error><Code>AccessDenied</Code></Error>")
    with pytest.raises(DataError, match=r"00001\.tar: this is not a tar archive"):
        load(tmp_path)


def test_a_pickled_data_set_reads_the_same(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])
    data = load(tmp_path)
    data.key(0, 0)
    copy = pickle.loads(pickle.dumps(data))
    assert [copy.key(1, row) for row in range(4)] == [data.key(1, row) for row in range(4)]
    assert copy.fingerprint == data.fingerprint


def test_a_later_start_opens_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.shards import dataset, summaries

    monkeypatch.setattr(summaries, "_WORTH_A_FILE", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path, [3, 4, 2])
    first = load(tmp_path, min_aesthetic=4.0)
    opened: list[str] = []
    original = dataset.load_index

    def watch(url: str, *rest: Any) -> Any:
        opened.append(os.path.basename(url))
        return original(url, *rest)

    monkeypatch.setattr(dataset, "load_index", watch)
    again = load(tmp_path, min_aesthetic=4.0)
    assert opened == []
    assert (again.fingerprint, again.counts.tolist(), again.dropped) == (
        first.fingerprint,
        first.counts.tolist(),
        first.dropped,
    )
    (tmp_path / "more").mkdir()
    os.replace(write_shards(tmp_path / "more", [6], seed=5)[0], tmp_path / "00001.tar")
    changed = load(tmp_path, min_aesthetic=4.0)
    assert "00001.tar" in opened and "00000.tar" not in opened
    assert changed.total == 11
    load(tmp_path, min_aesthetic=4.5)
    assert "00000.tar" in opened  # other filters give other counts


@pytest.mark.parametrize(
    ("global_batch", "picture_bytes", "expected"),
    [(64, 139_000, 64), (256, 139_000, 16), (2048, 139_000, 128), (64, 2_000, 1024), (256, 5_000_000, 8)],
)
def test_windows_fit_into_memory(tmp_path: Path, global_batch: int, picture_bytes: int, expected: int) -> None:
    write_shards(tmp_path, [5, 5])
    data = load(tmp_path)
    data.summaries = [
        replace(summary, entry=replace(summary.entry, size=5 * picture_bytes)) for summary in data.summaries
    ]
    assert window_of(data, DataConfig(global_batch=global_batch)) == expected
    assert window_of(data, DataConfig(global_batch=global_batch, window=33)) == 33


def test_no_more_indexes_are_kept_than_windows_need(tmp_path: Path) -> None:
    write_shards(tmp_path, [3] * 40)
    data = load(tmp_path)
    data.expect(4, 6)  # 2 shards in a window
    for shard in range(40):
        data.key(shard, 0)
    assert len(data._cache) == 4 * (2 + 2) + 8


LICENCES: list[dict[str, Any]] = [
    {"license": "CC0 1.0"},
    {"LICENSE": "cc by 2.0", "punsafe": 0.9},
    {"license_url": "https://creativecommons.org/licenses/by/4.0/"},
    {"license": {"id": 4, "name": "Attribution  License"}},
    {"license": 3},
    {"license": "?"},
    {"license": ["CC0"]},
    {"caption": "no licence"},
]


@pytest.fixture
def licensed(tmp_path: Path) -> Path:
    with ShardWriter(str(tmp_path / "0.tar")) as shard:
        for number, facts in enumerate(LICENCES):
            shard.write(str(number), {"png": picture(9, 9), "json": json.dumps(facts).encode(), "txt": b"x"})
        shard.write("8", {"png": picture(9, 9), "txt": b"x"})
        shard.write("9", {"json": b'{"license": "CC0 1.0"}', "txt": b"no picture"})
    return tmp_path


@pytest.mark.parametrize(
    ("allowed", "keys", "dropped"),
    [
        ([], "012345678", {}),
        (["cc0 1.0"], "0", {"licence": 4, "unknown_licence": 4}),
        (["CC0*", "CC BY *", "https://creativecommons.org/licenses/by/*"], "012", {"licence": 2, "unknown_licence": 4}),
        (["unknown", "3", "Attribution License"], "345678", {"licence": 3}),
        (["*"], "012345678", {}),
    ],
)
def test_samples_of_some_licences(licensed: Path, allowed: list[str], keys: str, dropped: dict[str, int]) -> None:
    data = load(licensed, licences=allowed)
    assert "".join(data.key(0, row) for row in range(data.samples)) == keys
    assert data.dropped == {"missing_image": 1, **dropped}


@pytest.mark.parametrize(("wrong", "said"), [("CC0", "licences=CC0: it must be a list"), ([" "], "a licence is empty")])
def test_a_value_that_is_no_list_of_licences_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FilterConfig(licences=wrong)


def test_licences_are_counted_among_the_samples_in_use(licensed: Path) -> None:
    counts = {"CC0 1.0": 1, "cc by 2.0": 1, LICENCES[2]["license_url"]: 1, "Attribution License": 1, "3": 1}
    assert load(licensed).licences == {"unknown": 4, **counts}
    assert load(licensed, licences=["cc*"]).licences == {"CC0 1.0": 1, "cc by 2.0": 1}


def test_an_index_of_the_previous_version_is_read_and_rebuilt_when_licences_are_needed(licensed: Path) -> None:
    fresh = load(licensed)
    path = str(licensed / "0.tar")
    index = load_index(path)
    assert index is not None
    old = {key: value for key, value in index.meta.items() if key != "licences"} | {"version": 4}
    save_index(ShardIndex(path, index.table.drop_columns("licence"), old), index_url(path))
    before = load(licensed)
    assert before.fingerprint == fresh.fingerprint and before.licences == {"not indexed": 9}
    assert load(licensed, min_side=9, max_caption=1, min_caption=1).licences == {"not indexed": 9}
    assert load(licensed, licences=["CC0 1.0"]).samples == 1
    assert load(licensed).licences == fresh.licences, "the index has been rebuilt"
