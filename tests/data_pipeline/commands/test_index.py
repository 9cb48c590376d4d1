from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands.index import main
from data_pipeline.common.errors import DataError
from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.shards.index import ShardIndex, index_shard, index_url, save_index
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import s3, store
from data_pipeline.storage.s3_errors import Missing
from tests.data_pipeline.photos import jpegs
from tests.data_pipeline.small_shards import write_shards


@dataclass
class Command:
    data: DataConfig
    json: bool = False
    rebuild: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def run(shards: str, **data: Any) -> dict[str, Any]:
    return main(Command(DataConfig(shards=shards, **data)))


def remove_indexes(folder: Path) -> None:
    for path in folder.glob("*.index.parquet"):
        path.unlink()


def test_only_what_is_new_or_changed_is_walked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, [3, 4])
    remove_indexes(tmp_path)
    result = run(str(tmp_path))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert {name: result[name] for name in ("shards", "samples", "problems", "built")} == {
        "shards": 2,
        "samples": 7,
        "problems": {},
        "built": 2,
    }
    assert run(str(tmp_path))["built"] == 0
    (tmp_path / "more").mkdir()
    extra = write_shards(tmp_path / "more", [5], seed=1)[0]
    os.rename(extra, tmp_path / "00002.tar")
    result = run(str(tmp_path))
    assert (result["shards"], result["samples"], result["built"]) == (3, 12, 1)


def test_rebuild_walks_what_is_indexed(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [3, 4])[0]
    good = index_shard(path)
    wrong = good.table.slice(0, 2)
    save_index(ShardIndex(path, wrong, {**good.meta, "samples": 2}), index_url(path))
    command = Command(DataConfig(shards=str(tmp_path)))
    assert main(command)["samples"] == 6
    command.rebuild = True
    result = main(command)
    assert (result["samples"], result["built"]) == (7, 2)
    assert run(str(tmp_path))["samples"] == 7


def test_a_truncated_shard_is_recognized_by_the_count_next_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_shards(tmp_path, [4])[0]
    begin = index_shard(path).parts(3)[0].offset - 512
    Path(path).write_bytes(Path(path).read_bytes()[:begin])
    with caplog.at_level(logging.WARNING):
        assert run(str(tmp_path))["problems"] == {"missing_end_blocks": 1}
        remove_indexes(tmp_path)
        (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 6, "successes": 4}))
        assert run(str(tmp_path))["problems"] == {"count_mismatch": 1, "missing_end_blocks": 1}
    assert "3 samples where 4 were written" in caplog.text


def test_the_count_from_img2datasets_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_shards(tmp_path, [2])
    remove_indexes(tmp_path)
    table = pa.table({"key": ["0", "1", "2"], "status": ["success", "failed_to_download", "success"]})
    pq.write_table(table, tmp_path / "00000.parquet")
    assert run(str(tmp_path))["problems"] == {}


def test_shards_that_are_not_archives_are_counted_and_the_rest_indexed(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "00001.tar").write_text("<html>")
    (tmp_path / "00002.tar").write_bytes(b"")
    result = run(str(tmp_path))
    assert result["problems"] == {"empty_shard": 1, "not_a_tar": 1}
    assert (result["shards"], result["samples"]) == (3, 3)


def test_unreadable_shards_are_counted_and_the_rest_indexed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, [3, 4])
    remove_indexes(tmp_path)
    (tmp_path / "lost.tar").symlink_to(tmp_path / "nowhere.tar")
    (tmp_path / "folder.tar").mkdir()
    for pattern in (str(tmp_path), str(tmp_path / "*.tar")):
        result = run(pattern)
        assert result["problems"] == {"unreadable_shard": 1} and result["samples"] == 7
    assert "dangling link" in caplog.text and "this is a directory, not a shard" in caplog.text


def test_a_listing_keeps_the_runs_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def listing(url: str, delimiter: str = "", patience: Any = None) -> Any:
        seen.append(patience.deadline_s)
        return iter(())

    def head(url: str, patience: Any = None) -> Any:
        seen.append(patience.deadline_s)
        raise Missing(url)

    monkeypatch.setattr(s3, "listing", listing)
    monkeypatch.setattr(s3, "head", head)
    with pytest.raises(DataError):
        run("s3://bucket/shards", deadline_s=7.0)
    assert len(seen) > 1 and set(seen) == {7.0}


def test_filters_are_counted_per_reason(tmp_path: Path) -> None:
    write_shards(tmp_path, [30])
    result = run(str(tmp_path), filter=FilterConfig(min_aesthetic=5.0))
    assert result["remaining"] + result["dropped"]["low_aesthetic"] == 30
    assert 0 < result["remaining"] < 30


def test_scores_written_as_text_are_read_and_words_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = ['"6.1"', '" 4 "', '"1e1"', '"high"', "true", '"nan"', "null", '"6,1"']
    members = {"jpg": jpegs()[0], "txt": b"x"}
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for number, score in enumerate(scores):
            writer.write(f"{number}", {**members, "json": b'{"Aesthetic": %s, "similarity": "0.3"}' % score.encode()})
    remove_indexes(tmp_path)
    result = run(str(tmp_path), filter=FilterConfig(min_aesthetic=5.0, min_similarity=0.3))
    assert result["dropped"] == {"unknown_aesthetic": 5, "low_aesthetic": 1}
    assert result["problems"] == {"bad_score": 3} and "'Aesthetic' is 'high', which is not a number" in caplog.text


def test_on_s3_the_index_is_next_to_its_shard(tmp_path: Path, bucket: str) -> None:
    for path in write_shards(tmp_path, [3, 4]):
        store.write_bytes(f"s3://{bucket}/set/{store.basename(path)}", Path(path).read_bytes())
    result = run(f"s3://{bucket}/set")
    assert (result["samples"], result["built"]) == (7, 2)
    assert "00000.index.parquet" in store.list_dir(f"s3://{bucket}/set")
    assert run(f"s3://{bucket}/set")["built"] == 0
    store.write_bytes(f"s3://{bucket}/set/00000.tar", Path(tmp_path / "00001.tar").read_bytes())
    result = run(f"s3://{bucket}/set")
    assert (result["samples"], result["built"]) == (8, 1)


def test_any_number_of_processes_gives_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.commands import index

    write_shards(tmp_path, [3, 4])
    remove_indexes(tmp_path)
    monkeypatch.setattr(index, "_WORTH_PROCESSES", 0)
    result = run(str(tmp_path))
    assert (result["samples"], result["built"]) == (7, 2)


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.tar shards found"):
        run(str(tmp_path))
