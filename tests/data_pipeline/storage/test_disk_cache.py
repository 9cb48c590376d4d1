from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import ShardStream
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.storage import store
from data_pipeline.storage.disk_cache import DiskCache
from tests.data_pipeline.small_shards import write_shards

PIECE = 1000


def content(etag: str, size: int) -> bytes:
    return random.Random(etag).randbytes(size)


class Origin:
    """Objects, and a record of which bytes were requested."""

    def __init__(self, size: int = 10 * PIECE + 7) -> None:
        self.size, self.asked = size, []  # type: int, list[tuple[str, int]]

    def read(self, cache: DiskCache, etag: str, begin: int, end: int, fresh: bool = False) -> bytes:
        def fetch(low: int, high: int) -> bytes:
            self.asked.append((etag, low))
            return content(etag, self.size)[low:high]

        data = cache.read(etag, self.size, begin, end, fetch, fresh)
        assert data == content(etag, self.size)[begin:end]
        return data


def used(folder: Path) -> int:
    """Bytes on disk, as counted from outside the cache."""
    total = 0
    for name in ("pieces", "partial"):
        for path in (folder / name).iterdir():
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def test_a_piece_that_was_read_before_comes_from_disk(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path), 100 * PIECE, PIECE), Origin()
    origin.read(cache, "a", 1500, 3500)
    assert origin.asked == [("a", 1000), ("a", 2000), ("a", 3000)]
    origin.read(cache, "a", 1000, 4000)
    origin.read(DiskCache(str(tmp_path), 100 * PIECE, PIECE), "a", 3999, 4001)
    assert origin.asked[3:] == [("a", 4000)]
    origin.read(cache, "a", 9_990, 10_007)
    assert used(tmp_path) == 5 * PIECE + 7


def test_objects_are_distinguished_by_etag_and_size(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path), 100 * PIECE, PIECE), Origin()
    origin.read(cache, "a", 0, 100)
    origin.read(cache, "b", 0, 100)
    Origin(5000).read(cache, "a", 0, 100)


def test_the_limit_is_kept_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path), 5 * PIECE, PIECE), Origin()
    for number in range(4):
        origin.read(cache, "a", number * PIECE, number * PIECE + 1)
        time.sleep(0.002)
    origin.read(cache, "a", 0, 1)  # the oldest piece is used again
    origin.asked.clear()
    for number in range(4, 7):
        origin.read(cache, "a", number * PIECE, number * PIECE + 1)
        assert used(tmp_path) <= 5 * PIECE
    origin.asked.clear()
    origin.read(cache, "a", 0, 1)
    assert origin.asked == []
    origin.read(cache, "a", PIECE, PIECE + 1)
    assert origin.asked == [("a", PIECE)]


def test_a_limit_below_one_piece_only_means_no_caching(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path), PIECE // 2, PIECE), Origin()
    origin.read(cache, "a", 0, 2500)
    assert used(tmp_path) == 0


def test_a_piece_that_failed_verification_is_fetched_again(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path), 100 * PIECE, PIECE), Origin()
    origin.read(cache, "a", 0, 10)
    (piece,) = (tmp_path / "pieces").iterdir()
    piece.write_bytes(bytes(PIECE))
    origin.read(cache, "a", 0, 10, fresh=True)
    origin.read(cache, "a", 0, 10)
    assert len(origin.asked) == 2
    piece.write_bytes(b"cut")
    origin.read(cache, "a", 0, 10)
    assert len(origin.asked) == 3


def test_an_unreadable_disk_only_means_that_nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, origin = DiskCache(str(tmp_path), 100 * PIECE, PIECE), Origin()
    origin.read(cache, "a", 0, 10)
    assert cache.whole("index", lambda: b"whole") == b"whole"

    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    origin.read(cache, "a", 0, 10)
    assert origin.asked == [("a", 0)] * 2 and cache.whole("index", lambda: b"again") == b"again"


def test_a_whole_object_is_fetched_once(tmp_path: Path) -> None:
    cache, asked = DiskCache(str(tmp_path), 100 * PIECE, PIECE), []  # type: DiskCache, list[int]

    def fetch() -> bytes:
        asked.append(1)
        return b"whole"

    def missing() -> bytes:
        raise DataError("no such object")

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: cache.whole("index", fetch), range(8))) == {b"whole"}
    assert len(asked) == 1 and cache.whole("index", missing) == b"whole"
    assert cache.whole("index", missing, fresh=True) is None is cache.whole("other", missing)
    assert cache.whole("index", lambda: b"newer", fresh=True) == b"newer" == cache.whole("index", missing)


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 100 * PIECE, PIECE)

    def fail(low: int, high: int) -> bytes:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        cache.read("a", 5000, 0, 10, fail)
    assert used(tmp_path) == 0 and not list((tmp_path / "partial").iterdir())
    assert int((tmp_path / "total").read_text()) == 0


def test_threads_that_want_the_same_piece_fetch_it_once(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path), 100 * PIECE, PIECE), Origin()
    threads = [threading.Thread(target=origin.read, args=(cache, "a", 0, 500)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(origin.asked) == 1


def hammer(folder: str, limit: int, seed: int, seconds: float, slow: float) -> None:
    cache, origin, generator = DiskCache(folder, limit, PIECE), Origin(), random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        etag, begin = generator.choice("abcd"), generator.randrange(origin.size - 1)

        def fetch(low: int, high: int, etag: str = etag) -> bytes:
            time.sleep(slow)
            return content(etag, origin.size)[low:high]

        stop = min(begin + generator.randrange(1, 3000), origin.size)
        assert cache.read(etag, origin.size, begin, stop, fetch) == content(etag, origin.size)[begin:stop]


def test_processes_share_the_limit_and_a_kill_leaves_no_debt(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    limit = 9 * PIECE
    workers = [context.Process(target=hammer, args=(str(tmp_path), limit, seed, 2.0, 0.001)) for seed in range(3)]
    victim = context.Process(target=hammer, args=(str(tmp_path), limit, 99, 30.0, 0.01))
    DiskCache(str(tmp_path), limit, PIECE)
    for process in [*workers, victim]:
        process.start()
    most, killed = 0, False
    while any(process.is_alive() for process in workers):
        most = max(most, used(tmp_path))
        if not killed and list((tmp_path / "partial").glob(f"{victim.pid}-*")):
            os.kill(victim.pid or 0, signal.SIGKILL)
            victim.join()
            killed = True
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert killed and 0 < most <= limit
    cache, origin = DiskCache(str(tmp_path), limit, PIECE), Origin()
    for etag in "wxyz":
        origin.read(cache, etag, 0, 3 * PIECE)
    assert not list((tmp_path / "partial").iterdir())
    assert used(tmp_path) <= limit


def test_a_full_disk_only_means_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, origin = DiskCache(str(tmp_path), 100 * PIECE, PIECE), Origin()

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        origin.read(cache, "a", 0, 500)
    assert used(tmp_path) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", full)
        origin.read(cache, "a", 0, 500)
    origin.read(cache, "a", 0, 500)
    assert len(origin.asked) == 3 and used(tmp_path) == PIECE


def test_a_folder_deleted_in_the_meantime_is_created_again(tmp_path: Path) -> None:
    cache, origin = DiskCache(str(tmp_path / "cache"), 100 * PIECE, PIECE), Origin()
    origin.read(cache, "a", 0, 3 * PIECE)
    shutil.rmtree(tmp_path / "cache")
    origin.read(cache, "a", 0, 3 * PIECE)
    asked = len(origin.asked)
    origin.read(cache, "a", 0, 3 * PIECE)
    assert len(origin.asked) == asked == 6
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("not a folder any more")
    origin.read(cache, "a", 0, 3 * PIECE)


def test_a_folder_deleted_during_a_fetch(tmp_path: Path) -> None:
    cache, data = DiskCache(str(tmp_path / "cache"), 100 * PIECE, PIECE), content("a", PIECE)

    def fetch(low: int, high: int) -> bytes:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return data[low:high]

    assert cache.read("a", PIECE, 0, PIECE, fetch) == data


def test_a_process_forked_under_a_lock_does_not_keep_it(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 100 * PIECE, PIECE)
    with cache._locked("total"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    with cache._locked("total"):
        pass  # pytest-timeout ends it if the child holds the lock
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file: .*; give a directory"):
        DiskCache(str(tmp_path / "file"), 1)


def test_a_second_epoch_over_s3_asks_for_nothing(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in write_shards(tmp_path, [20, 13, 31]):
        store.write_bytes(f"s3://{bucket}/{store.basename(path)}", Path(path).read_bytes())
    options: dict[str, Any] = {"seed": 1, "global_batch": 16, "lanes": 4, "window": 8}
    expected = [sample["__key__"] for sample in ShardStream(str(tmp_path), **options, stop=128)]
    cached = ShardStream(f"s3://{bucket}/", **options, stop=64, cache_dir=str(tmp_path / "cache"))
    assert [sample["__key__"] for sample in cached] == expected[:64]
    monkeypatch.setattr(store, "read_range", None)
    again = ShardStream(f"s3://{bucket}/", **options, position=64, stop=128, cache_dir=str(tmp_path / "cache"))
    assert [sample["__key__"] for sample in again] == expected[64:]
