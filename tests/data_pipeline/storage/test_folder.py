"""Checkpoints in an object store over HTTP."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from data_pipeline.storage import s3
from data_pipeline.storage.folder import PREFIX, LocalFolder, NoRoom, RemoteFolder, TemporaryCopies, open_folder
from tests.faultproxy import FaultProxy
from tests.s3 import S3Server
from training.checkpoint import store as checkpoint_module
from training.checkpoint.store import MANIFEST, CheckpointStore
from training.processes.endings import Superseded
from training.processes.ranks import Ranks

ONE = Ranks()


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"param/{i}": torch.randn(20, 10, generator=generator) for i in range(4)}


def test_checkpoints_in_a_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "PART_BYTES", 1000)
    store = CheckpointStore(f"s3://{bucket}/runs/a/checkpoints")
    assert store.newest() is None
    store.claim(ONE)
    for step in (1, 2, 3):
        store.save(step, tensors(step), {"position": step}, ONE)
    assert store.steps() == [3, 2, 1] and store.newest_whole() == 3
    found = store.newest()
    assert found is not None and found.meta == {"position": 3}
    assert all(torch.equal(found.read(name), wanted) for name, wanted in tensors(3).items())
    assert store.prune(keep_last=2) == [1]
    assert store.steps() == [3, 2]

    name = found.manifest["files"][1]["name"]
    folder = RemoteFolder(f"s3://{bucket}/runs/a/checkpoints/step-00000003")
    folder.write(name, [folder.read(name)[:-1]])
    found = store.newest()
    assert found is not None and found.step == 2

    later = CheckpointStore(f"s3://{bucket}/runs/a/checkpoints")
    assert later.claim(ONE) == 2
    with pytest.raises(Superseded):
        store.save(4, tensors(4), {}, ONE)
    assert 4 not in later.steps() or later.folder.sub("step-00000004").size(MANIFEST) is None


@pytest.mark.parametrize("remote", [False, True])
def test_both_kinds_of_folder_alike(remote: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    where = f"s3://{request.getfixturevalue('bucket')}/x" if remote else str(tmp_path / "x")
    folder = open_folder(where)
    assert isinstance(folder, RemoteFolder if remote else LocalFolder) and str(folder) == where
    assert folder.names() == [] and folder.size("a") is None
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    folder.write("a", [b"12", memoryview(b"345")])
    folder.sub("deeper").write("b", [b""])
    assert folder.names() == ["a", "deeper"]
    assert folder.size("a") == 5 and folder.read("a") == b"12345" and folder.fetch("a").read_bytes() == b"12345"
    folder.remove("a")
    folder.remove("a")
    folder.sub("deeper").remove_files(["b", "missing"])
    assert folder.sub("deeper").names() == []


def test_a_full_temporary_directory_is_not_reported_as_damage(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(f"s3://{bucket}/ck")
    store.claim(ONE)
    store.save(1, tensors(1), {}, ONE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(NoRoom, match=r"TMPDIR=.*no room for a copy of s3://.*point TMPDIR at a disk with room"):
            store.newest()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "skipped" not in caplog.text and store.newest() is not None
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    with pytest.raises(NoRoom, match=r"TMPDIR=.*No usable temporary directory"):
        CheckpointStore(f"s3://{bucket}/ck").newest()
    assert "skipped" not in caplog.text


def test_threads_fetch_a_file_once(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(f"s3://{bucket}/x")
    folder.write("a", [b"1" * 100_000])
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.forget()
        proxy.plan([], default="delay:0.2")
        with ThreadPoolExecutor(8) as pool:
            assert len({path.read_bytes() for path in pool.map(folder.fetch, ["a"] * 8)}) == 1
        assert len(proxy.log) == 1


def test_copies_that_killed_processes_left_are_removed_and_those_of_living_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """if True:
        import sys
        from data_pipeline.storage.folder import TemporaryCopies
        copies = TemporaryCopies(sys.argv[1])
        (copies.path / "copy").write_bytes(b"weights")
        print("ready", flush=True)
        sys.stdin.read()
    """
    names = ["token-0", ""]
    environ, pipe = {**os.environ, "TMPDIR": str(tmp_path)}, subprocess.PIPE
    killed = [
        subprocess.Popen([sys.executable, "-c", program, name], env=environ, stdin=pipe, stdout=pipe) for name in names
    ]
    for process in killed:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    (tmp_path / f"{PREFIX}of-someone").mkdir()
    there = set(tmp_path.iterdir())
    assert len(there) == 3 and tmp_path / f"{PREFIX}token-0" in there
    ours = TemporaryCopies()
    assert set(tmp_path.iterdir()) == {*there, ours.path}, "all of them live"
    for process in killed:
        process.kill()
        process.communicate()
    TemporaryCopies().close()
    assert set(tmp_path.iterdir()) == {tmp_path / f"{PREFIX}of-someone", ours.path}
