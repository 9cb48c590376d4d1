"""Decoding in a separate process: the same batches, the same errors, and no process left behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import CascadeError, DataError
from data_pipeline.config import DataConfig
from data_pipeline.reading.loader import Batch, Loader
from data_pipeline.reading.micro_batches import Decoding
from data_pipeline.reading.process import DecodingProcess, Wire, _portable
from data_pipeline.shards.embeddings import SidecarWriter, sidecar_url
from data_pipeline.shards.index import index_shard
from data_pipeline.storage import store
from tests.data_pipeline.small_shards import PHOTOS, write_shards

BASE = DataConfig(global_batch=8, lanes=4, window=3, threads=2)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in PHOTOS.glob("*.tar"):
        shutil.copy(path, folder)
    return str(folder)


def read(config: DataConfig, count: int = 3, **options: Any) -> list[list[Batch]]:
    loader = Loader(config, **{"image_size": 32, "low_res_size": 8, "seed": 1, **options})
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def child_of(loader: Loader) -> subprocess.Popen[bytes]:
    assert isinstance(loader._decoding, DecodingProcess)
    return loader._decoding._process


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("rank", "world_size", "micro_batch", "position"), [(0, 1, 0, 0), (1, 2, 1, 8), (0, 1, 2, 400)]
)
def test_the_batches_are_those_of_threads(
    photos: str, rank: int, world_size: int, micro_batch: int, position: int
) -> None:
    config = replace(BASE, shards=photos, micro_batch=micro_batch)
    options = {"rank": rank, "world_size": world_size, "position": position}
    for expected, found in zip(read(config, **options), read(config, own_process=True, **options), strict=True):
        assert len(found) == len(expected)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.positions, other.positions) and one.keys == other.keys
            assert torch.equal(one.images, other.images) and one.captions == other.captions
            assert one.low_res is not None and other.low_res is not None and torch.equal(one.low_res, other.low_res)
            other.images.zero_()  # the memory is the batch's own


def test_embeddings_are_delivered_with_the_pictures(shards: str, tmp_path: Path) -> None:
    for path in Path(shards).glob("*.tar"):
        index = index_shard(str(path))
        writer = SidecarWriter(sidecar_url(str(path), str(tmp_path)), {"digest": index.digest}, 4)
        for plain in read(replace(BASE, shards=str(path)), 8):
            for key, caption in zip(plain[0].keys, plain[0].captions, strict=True):
                writer.add(key, caption, np.full((len(caption.split()), 4), len(caption), np.float32))
        writer.close()
    (batch,) = read(replace(BASE, shards=shards, embeddings=str(tmp_path)), 1, own_process=True)[0]
    assert batch.embeddings is not None
    for caption, found in zip(batch.captions, batch.embeddings, strict=True):
        assert found.dtype == np.float32 and found.shape == (len(caption.split()), 4)
        assert np.abs(found - len(caption)).max() < 1


def test_bad_samples_are_counted_when_they_are_consumed(shards: str, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "shards")
    write_shards(folder, [1])  # its jpg is not a picture
    config = replace(BASE, shards=str(folder), max_bad_share=1.0)
    quarantine, counts = tmp_path / "quarantine.jsonl", []
    for own_process in (False, True):
        loader = Loader(config, image_size=32, quarantine=str(quarantine), own_process=own_process)
        counts.append([(next(loader), dict(loader.counters))[1] for _ in range(8)])
        loader.close()
    assert counts[0] == counts[1] and counts[0][-1]["bad"] > 0
    lines = quarantine.read_text().splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_a_shard_that_disappears_is_named(photos: str) -> None:
    config = replace(BASE, shards=photos)
    read(config, 1)
    loaders = [Loader(config, image_size=16) for _ in range(2)]
    for path in Path(photos).glob("*.tar"):
        path.unlink()
    for loader, kind in zip(loaders, (Decoding, DecodingProcess), strict=True):
        loader._decoding = kind(loader._work)
        for _ in range(2):  # asking again does not hang
            with pytest.raises(DataError, match=r"\.tar: No such file"):
                next(loader)
        loader.close()


def test_a_process_that_is_killed_ends_the_run_with_a_sentence(shards: str) -> None:
    loader = Loader(replace(BASE, shards=shards), image_size=32, own_process=True)
    next(loader)
    child_of(loader).kill()
    with pytest.raises(CascadeError, match=r"rank 0: the process.*was killed by signal 9 \(SIGKILL\).*prefetch_mb"):
        for _ in range(100):  # what it had sent is delivered
            next(loader)
    loader.close()


def test_closing_ends_the_process(shards: str) -> None:
    for consumed in (0, 2):
        loader = Loader(replace(BASE, shards=shards), image_size=32, own_process=True)
        for _ in range(consumed):
            next(loader)
        loader.close()
        assert child_of(loader).returncode is not None


def test_signals_are_left_to_the_trainer(shards: str) -> None:
    loader = Loader(replace(BASE, shards=shards), image_size=32, own_process=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        child_of(loader).send_signal(number)
    for _ in range(20):
        next(loader)
    assert child_of(loader).poll() is None
    loader.close()


TRAINER = """
import sys, time
from data_pipeline.config import DataConfig
from data_pipeline.reading.loader import Loader
loader = Loader(DataConfig(shards=sys.argv[1], global_batch=8), image_size=32, own_process=True)
next(loader)
print(loader._decoding._process.pid, flush=True)
time.sleep(600)
"""


def test_the_process_ends_with_its_trainer(shards: str) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, shards], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    child = int(trainer.stdout.readline())
    assert is_alive(child)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_for(lambda: not is_alive(child))


def test_what_the_process_logs_is_logged_by_the_trainer(
    shards: str, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in Path(shards).glob("*.tar"):
        store.write_bytes(f"s3://{bucket}/{path.name}", path.read_bytes())
    read(replace(BASE, shards=f"s3://{bucket}/*.tar", prefetch_mb=0), 1, own_process=True)
    (advice,) = (record for record in caplog.records if "samples are requested one by one" in record.getMessage())
    assert advice.name == "data_pipeline.reading.prefetch" and advice.process != os.getpid()


class _Noting:
    """Records in which thread it was pickled."""

    threads: ClassVar[list[threading.Thread]] = []

    def __reduce__(self) -> Any:
        self.threads.append(threading.current_thread())
        return dict, ()


def test_what_the_child_gets_is_pickled_before_the_trainer_goes_on(photos: str) -> None:
    files: Any = _Noting()
    process = DecodingProcess(
        replace(Loader(replace(BASE, shards=photos), image_size=32, seed=1)._work, caption_files=files)
    )
    try:
        assert next(process).keys
    finally:
        process.close()
    assert _Noting.threads == [threading.current_thread()], "another thread may meet a dict that grows"


def test_a_bug_in_the_receiver_ends_the_wait(photos: str, bucket: str) -> None:
    for path in Path(photos).glob("*.tar"):
        store.write_bytes(f"s3://{bucket}/{path.name}", path.read_bytes())

    def broken(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError(record.getMessage())

    logger = logging.getLogger("data_pipeline.reading.prefetch")
    logger.addFilter(broken)
    try:
        with pytest.raises(ZeroDivisionError, match="samples are requested one by one"):
            read(replace(BASE, shards=f"s3://{bucket}/*.tar", prefetch_mb=0), 1, own_process=True)
    finally:
        logger.removeFilter(broken)


class _Unsendable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be sent")


def test_pictures_of_the_stages_size_are_read_without_torch(shards: str) -> None:
    """Importing torch takes a second in each process."""
    loader = Loader(replace(BASE, shards=shards), image_size=32, low_res_size=8, own_process=True)
    next(loader)
    loaded = Path(f"/proc/{child_of(loader).pid}/maps").read_text()
    loader.close()
    assert "_multiarray_umath" in loaded and "libtorch" not in loaded


@pytest.mark.parametrize(
    ("error", "kind"), [(ZeroDivisionError("a bug"), ZeroDivisionError), (_Unsendable(), RuntimeError)]
)
def test_a_bug_arrives_with_its_traceback(error: Exception, kind: type[Exception]) -> None:
    try:
        raise error
    except Exception as caught:
        found = _portable(caught)
    assert type(found) is kind
    assert "test_process.py" in "".join([str(found), *getattr(found, "__notes__", [])])


def test_arrays_of_any_size_cross_the_wire() -> None:
    import socket
    import threading

    ends = socket.socketpair()
    here, there = map(Wire, ends)
    values = [{"a": np.arange(n, dtype=np.uint8), "b": [np.zeros((0, 3)), "text"]} for n in (0, 1, 5_000_000)]
    sender = threading.Thread(target=lambda: [here.send(value) for value in values])
    sender.start()
    for value in values:
        found = there.receive()
        assert np.array_equal(found["a"], value["a"]) and found["b"][0].shape == (0, 3) and found["b"][1] == "text"
    sender.join()
    here.close()
    with pytest.raises(EOFError):
        there.receive()
    for end in ends:
        end.close()
