"""Checkpoints without a process group: commit, damage, fencing, pruning, places."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import DataError, StoreError
from data_pipeline.storage import retry
from data_pipeline.storage.folder import LocalFolder
from training.checkpoint import store as checkpoint_module
from training.checkpoint.store import MANIFEST, CheckpointError, CheckpointStore
from training.checkpoint.writer import CheckpointWriter
from training.config.experiment import CheckpointConfig
from training.engine.snapshots import HostSnapshot
from training.processes.endings import Superseded
from training.processes.ranks import Ranks

ONE = Ranks()


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = {"param/a.weight": (7, 5), "exp_avg/a.weight": (7, 5), "param/scalar": (), "param/empty": (0, 3)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "buffer/b": torch.arange(5), "ema/0/half": torch.randn(3).to(torch.bfloat16)}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    store.claim(ONE)
    return store


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, tensors(step), {"position": step * 8}, ONE)


def data_file(store: CheckpointStore, step: int) -> Path:
    return next((Path(str(store.folder)) / f"step-{step:08d}").glob("*.safetensors"))


def test_a_saved_checkpoint_is_read_back(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "PART_BYTES", 100)
    save(store, 5)
    found = store.newest()
    assert found is not None
    assert (found.step, found.meta) == (5, {"position": 40})
    assert len(found.manifest["files"]) > 1, "cut into parts"
    assert found.names("param/") == ["param/a.weight", "param/scalar", "param/empty"]
    for name, wanted in tensors(5).items():
        if name != "ema/0/half":
            assert torch.equal(found.read(name), wanted), name
    assert found.read("ema/0/half").dtype == torch.bfloat16
    assert found.shape("param/a.weight") == (7, 5)
    with pytest.raises(KeyError):
        found.read("param/b")


def test_files_open_with_the_safetensors_library(store: CheckpointStore) -> None:
    from safetensors.torch import load_file

    save(store, 5)
    assert torch.equal(load_file(data_file(store, 5))["param/a.weight"], tensors(5)["param/a.weight"])


def test_no_checkpoint_yet(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.newest() is None
    assert CheckpointStore(str(tmp_path / "nothing")).newest() is None
    assert store.newest_whole() == -1


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: flip_a_bit(data_file(s, 3)), "does not match its checksum"),
        (lambda s: data_file(s, 3).write_bytes(data_file(s, 3).read_bytes()[:-1]), "bytes instead of"),
        (lambda s: data_file(s, 3).unlink(), "is missing"),
        (lambda s: data_file(s, 3).with_name(MANIFEST).unlink(), "was never finished"),
        (lambda s: data_file(s, 3).with_name(MANIFEST).write_text('{"step": 3, "fi'), "manifest.json is damaged"),
        (lambda s: data_file(s, 3).with_name(MANIFEST).write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_damage_falls_back_and_is_named(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: Any, sentence: str
) -> None:
    save(store, 1, 2, 3)
    damage(store)
    with caplog.at_level(logging.WARNING):
        found = store.newest()
    assert found is not None and found.step == 2
    assert sentence in caplog.text and "step-00000003" in caplog.text


def test_all_damaged_is_not_a_fresh_start(store: CheckpointStore) -> None:
    save(store, 1, 2)
    flip_a_bit(data_file(store, 1))
    data_file(store, 2).unlink()
    with pytest.raises(DataError, match=r"all of its checkpoints are damaged .*is missing"):
        store.newest()


def test_a_damaged_manifest_is_not_a_fresh_start_either(store: CheckpointStore) -> None:
    save(store, 1)
    data_file(store, 1).with_name(MANIFEST).write_bytes(b"")
    with pytest.raises(DataError, match=r"all of its checkpoints are damaged .*manifest.json is damaged"):
        store.newest()


def test_a_later_start_fences_off_the_earlier(store: CheckpointStore) -> None:
    save(store, 1)
    later = CheckpointStore(str(store.folder))
    assert later.claim(ONE) == store.attempt + 1
    with pytest.raises(Superseded, match=r"attempt 2 of this run on .* has taken over"):
        save(store, 2)
    with pytest.raises(Superseded):
        store.prune(1)
    save(later, 2)
    found = later.newest()
    assert found is not None and found.step == 2


def test_a_zombie_between_files_and_commit(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has written its files when another start takes over and saves the same step: the latter's checkpoint is
    untouched."""
    later = CheckpointStore(str(store.folder))
    write = LocalFolder.write

    def overtaken(self: LocalFolder, name: str, chunks: Any) -> None:
        write(self, name, chunks)
        if name.startswith("a0001"):
            later.claim(ONE)
            save(later, 7)

    monkeypatch.setattr(LocalFolder, "write", overtaken)
    with pytest.raises(Superseded):
        save(store, 7)
    found = later.newest()
    assert found is not None and found.manifest["attempt"] == 2 and found.problems() == []


def test_a_deleted_record_is_not_taken_for_another_attempt(store: CheckpointStore) -> None:
    """A wiped directory does not mean another attempt: the run continues and claims it again."""
    store.claim(Ranks())
    for name in store.folder.names():
        store.folder.remove(name)
    store.save(1, tensors(1), {}, Ranks())
    assert store.newest() is not None
    store.check_owner()


def test_pruning_keeps_what_it_should(store: CheckpointStore) -> None:
    save(store, 2, 4, 5, 6, 7, 8)
    store.folder.sub("step-00000003").write("a0001-r00000-p000.safetensors", [b"left behind by a crash"])
    store.folder.sub("step-00000009").write("a0001-r00000-p000.safetensors", [b"being written"])
    assert sorted(store.prune(keep_last=2, keep_every=4)) == [2, 3, 5, 6]
    assert store.steps() == [9, 8, 7, 4]
    assert all(store.open(step).problems() == [] for step in (4, 7, 8))


def test_pruning_keeps_the_best_and_the_last_healthy(store: CheckpointStore) -> None:
    for step, healthy, validation in (
        (1, True, 0.5),
        (2, True, 0.3),
        (3, True, None),
        (4, False, 0.4),
        (5, False, None),
    ):
        store.save(step, tensors(step), {"healthy": healthy, "validation": validation}, ONE)
    assert store.prune(keep_last=1, keep_best=True) == [4, 1]
    assert store.steps() == [5, 3, 2], "newest, last healthy, best"
    assert store.prune(keep_last=1) == [2]
    found = store.newest(wanted=lambda meta: meta["healthy"])
    assert found is not None and found.step == 3


def test_pruning_never_trades_a_healthy_one_for_a_damaged_one(store: CheckpointStore) -> None:
    save(store, 6, 9)
    data_file(store, 9).write_bytes(b"cut")
    found = store.newest()
    assert found is not None and found.step == 6
    save(store, 8)
    assert store.prune(keep_last=1) == [6]
    found = CheckpointStore(str(store.folder)).newest()
    assert found is not None and found.step == 8
    save(store, 9)
    assert store.prune(keep_last=1) == [8] and store.open(9).problems() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {**m, "meta": {**m["meta"], "position": 7}}, "its own checksum"),
        (lambda m: {**m, "step": 4}, "it is for step 4"),
        (lambda m: {**m, "meta": None, "sha256": ""}, "wrong types"),
        (lambda m: {**m, "files": [{**f, "tensors": []} for f in m["files"]], "sha256": ""}, "damaged"),
        (lambda m: {**m, "files": [{"name": f["name"], "tensors": {}} for f in m["files"]], "sha256": ""}, "bytes"),
    ],
)
def test_a_manifest_that_was_altered_is_skipped(store: CheckpointStore, change: Any, words: str) -> None:
    save(store, 3, 5)
    manifest = Path(str(store.folder)) / "step-00000005/manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(DataError, match=words):
        store.open(5)
    found = store.newest()
    assert found is not None and found.step == 3 and store.newest_whole() == 3


def test_crafted_manifests_are_damage(store: CheckpointStore) -> None:
    """Also manifests without a checksum of their own."""
    save(store, 3, 5)
    path = data_file(store, 5).with_name(MANIFEST)
    good = json.loads(path.read_text())
    without_sums = [{k: v for k, v in file.items() if k not in ("sha256", "xxh3")} for file in good["files"]]
    outside = [{**file, "name": f"../{file['name']}"} for file in good["files"]]
    shapeless = [{**file, "tensors": {"param/a": {}}} for file in good["files"]]
    for text in (
        "[" * 100_000,
        *(json.dumps({**good, "files": f, "sha256": ""}) for f in (without_sums, outside, shapeless)),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            store.open(5)
        found = store.newest()
        assert found is not None and found.step == 3
    with pytest.raises(DataError, match="has no config; it was not written by a training run"):
        store.open(3).recorded("config")


def test_a_validation_loss_that_is_not_finite_is_not_the_best(store: CheckpointStore) -> None:
    for step, loss in ((10, 0.2), (20, 0.1), (30, float("nan")), (40, float("-inf")), (50, "low"), (60, 0.3)):
        store.save(step, tensors(1), {"validation": loss}, ONE)
    assert sorted(store.prune(keep_last=1, keep_best=True)) == [10, 30, 40, 50]


def test_kept_checkpoints_hold_nothing_of_killed_attempts(store: CheckpointStore) -> None:
    save(store, 10)
    own = data_file(store, 10)
    place = own.parent
    for name in ("a0001-aaaaaa-r00001-p000.safetensors", ".a0001-bbbbbb-r00000-p001.safetensors.123.tmp"):
        (place / name).write_bytes(b"killed while it was written")
    (place / "a0009-aaaaaa-r00000-p000.safetensors").write_bytes(b"of a later attempt")
    (place / "notes.txt").write_text("somebody's own")
    later = CheckpointStore(str(store.folder))
    later.claim(ONE)
    save(later, 20)
    assert later.prune(keep_last=1, keep_every=10) == []
    kept = {path.name for path in place.iterdir()}
    assert kept == {MANIFEST, own.name, "notes.txt", "a0009-aaaaaa-r00000-p000.safetensors"}
    assert later.open(10).problems() == []


def test_a_step_left_by_an_earlier_attempt_gets_another_manifest(store: CheckpointStore) -> None:
    save(store, 10)
    store.folder.sub("step-00000020").write("a0001-aaaaaa-r00000-p000.safetensors", [b"killed while it was written"])
    later = CheckpointStore(str(store.folder))
    assert later.resume(ONE, lambda checkpoint: None).step == 10  # type: ignore[union-attr]
    save(later, 20)
    assert later.open(20).manifest["name"].startswith("manifest-a0002-") and later.open(20).problems() == []
    save(later, 30)
    assert later.open(30).manifest["name"] == MANIFEST
    assert later.prune(keep_last=1) == [20, 10] and later.steps() == [30]


def test_a_late_commit_of_an_earlier_attempt_is_not_part_of_the_run(store: CheckpointStore) -> None:
    save(store, 10)
    later = CheckpointStore(str(store.folder))
    later.resume(ONE, lambda checkpoint: None)
    store.attempts.check = lambda: None  # type: ignore[method-assign]
    save(store, 30)  # its request was on its way when the other attempt looked
    found = CheckpointStore(str(store.folder)).newest()
    assert found is not None and found.step == 30, "nothing else was saved"
    save(later, 20)
    for place in (later, CheckpointStore(str(store.folder))):
        found = place.newest()
        assert found is not None and found.step == 20
    assert later.prune(keep_last=5) == [30]


@pytest.mark.parametrize("damaged", ["manifest", "file"])
def test_damage_does_not_bring_back_what_the_run_has_left_behind(store: CheckpointStore, damaged: str) -> None:
    save(store, 10)
    later = CheckpointStore(str(store.folder))
    later.resume(ONE, lambda checkpoint: None)
    store.attempts.check = lambda: None  # type: ignore[method-assign]
    save(store, 20)
    save(later, 20)
    manifest = later.open(20).manifest
    place = Path(str(store.folder)) / "step-00000020"
    flip_a_bit(place / (manifest["name"] if damaged == "manifest" else manifest["files"][0]["name"]))
    third = CheckpointStore(str(store.folder))
    found = third.resume(ONE, lambda checkpoint: None)
    assert found is not None and found.step == 10
    save(third, 20)
    save(third, 30)
    assert third.prune(keep_last=2) == [10] and third.newest_whole() == 30
    assert third.open(20).manifest["name"].startswith("manifest-a0003-")


def test_a_start_that_meets_a_live_one_continues_from_what_that_one_saves(store: CheckpointStore) -> None:
    save(store, 10)

    def meanwhile(checkpoint: Any) -> None:
        if checkpoint.step == 10:
            save(store, 20)
            store.prune(keep_last=1)

    later = CheckpointStore(str(store.folder))
    found = later.resume(ONE, meanwhile)
    assert found is not None and found.step == 20 and later.attempt == 2


def test_slow_deletions_delay_neither_steps_nor_saves(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, go = LocalFolder.remove_files, threading.Event()

    def slow(self: LocalFolder, names: Any) -> None:
        assert go.wait(60)
        remove(self, names)

    monkeypatch.setattr(LocalFolder, "remove_files", slow)
    writer = CheckpointWriter(store, CheckpointConfig(keep_last=1), ONE)
    for step in (1, 2, 3, 4):
        writer.start(step, HostSnapshot(tensors(step)), {})
        assert writer.wait() is None and writer.last_step == step
    assert store.steps() == [4, 3, 2, 1]
    go.set()
    writer.close()
    assert store.steps() == [4]


def test_a_checkpoint_that_cannot_be_read_at_all_is_skipped(store: CheckpointStore) -> None:
    save(store, 3)
    place = Path(str(store.folder))
    (place / "step-00000004").write_text("a file")
    (place / "step-00000005").symlink_to(place / "step-00000005")
    (place / "step-00000006/manifest.json").mkdir(parents=True)
    assert store.steps() == [6, 5, 4, 3] and store.newest_whole() == 3
    found = store.newest()
    assert found is not None and found.step == 3
    for step in (4, 5, 6):
        with pytest.raises(DataError):
            store.open(step)


def test_starts_at_the_same_moment_take_different_numbers(store: CheckpointStore) -> None:
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda _: CheckpointStore(str(store.folder)).claim(ONE), range(6)))
    assert sorted(taken) == [2, 3, 4, 5, 6, 7]


def test_two_starts_with_one_number_share_no_file(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store that ignores the condition both may take one number; the earlier one stops."""
    other = CheckpointStore(str(store.folder))
    monkeypatch.setattr(LocalFolder, "create", lambda self, name, data: self.write(name, [data]) is None)
    monkeypatch.setattr(LocalFolder, "names", lambda self: [])
    other.claim(ONE)
    monkeypatch.undo()
    assert other.attempt == store.attempt
    save(other, 7)
    with pytest.raises(Superseded):
        save(store, 7)
    assert other.open(7).problems() == []


def test_a_damaged_record_of_attempts_stops_nobody(store: CheckpointStore) -> None:
    store.folder.write("attempt-0001.json", [b""])
    save(store, 1)
    assert CheckpointStore(str(store.folder)).claim(ONE) == 2


def test_a_start_of_an_earlier_version_is_fenced_off_too(store: CheckpointStore) -> None:
    """It looks for its token in attempt.json."""
    store.folder.write("attempt.json", [b'{"attempt": 6, "token": "old", "host": "x"}'])
    later = CheckpointStore(str(store.folder))
    assert later.claim(ONE) == 7
    record = json.loads(store.folder.read("attempt.json"))
    assert record["attempt"] == 7 and record["token"] == later.attempts.token


def test_a_store_that_fails_during_a_save_costs_only_that_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise NotADirectoryError("gone")

    monkeypatch.setattr(checkpoint_module, "PART_BYTES", 100)
    write, written = LocalFolder.write, []

    def second_fails(self: LocalFolder, name: str, chunks: Any) -> None:
        if name.endswith(".safetensors"):
            written.append(name)
            if len(written) == 2:
                monkeypatch.setattr(LocalFolder, "remove", gone)
                gone()
        write(self, name, chunks)

    monkeypatch.setattr(LocalFolder, "write", second_fails)
    with pytest.raises(CheckpointError, match="was not written"):
        save(store, 5)


def test_deleting_takes_the_manifest_first(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1, 2)
    remove = LocalFolder.remove

    def dies(self: LocalFolder, name: str) -> None:
        if name != MANIFEST:
            raise OSError("died here")
        remove(self, name)

    monkeypatch.setattr(LocalFolder, "remove", dies)
    with pytest.raises(OSError, match="died here"):
        store.prune(keep_last=1)
    assert store.steps() == [2, 1]
    with pytest.raises(DataError, match="never finished"):
        store.open(1)


def test_disk_full_loses_nothing_and_leaves_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    write = LocalFolder.write
    monkeypatch.setattr("training.checkpoint.store.PART_BYTES", 1)

    def full(self: LocalFolder, name: str, chunks: Any) -> None:
        if name.endswith("p001.safetensors"):
            raise OSError(28, "No space left on device")
        write(self, name, chunks)

    monkeypatch.setattr(LocalFolder, "write", full)
    writer = CheckpointWriter(store, CheckpointConfig(), ONE)
    writer.start(2, HostSnapshot(tensors(2)), {})
    error = writer.wait()
    assert isinstance(error, CheckpointError)
    assert "step 2 was not written" in str(error) and "No space left" in str(error) and "free up space" in str(error)
    assert not store.folder.sub("step-00000002").names()
    monkeypatch.setattr(LocalFolder, "write", write)
    writer.start(3, HostSnapshot(tensors(3)), {})
    assert writer.wait() is None
    found = store.newest()
    assert found is not None and found.step == 3


def test_a_crash_while_writing_leaves_no_half_file(store: CheckpointStore) -> None:
    def dies() -> Any:
        yield b"first"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.folder.write("file", dies())
    assert store.folder.names() == ["attempt-0001.json"]


def test_the_writer_prunes_and_reports(store: CheckpointStore) -> None:
    writer = CheckpointWriter(store, CheckpointConfig(keep_last=2), ONE)
    for step in (1, 2, 3):
        writer.start(step, HostSnapshot(tensors(step)), {})
        assert writer.wait() is None
    writer.close()
    assert store.steps() == [3, 2]
    assert writer.last_step == 3


def test_a_bug_in_pruning_is_shown_and_the_next_save_prunes(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> list[int]:
        monkeypatch.undo()
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(store, "prune", broken)
    writer = CheckpointWriter(store, CheckpointConfig(keep_last=1), ONE)
    for step in (1, 2):
        writer.start(step, HostSnapshot(tensors(step)), {})
        assert writer.wait() is None
        writer.close()
    assert store.steps() == [2]
    (record,) = (record for record in caplog.records if "were not deleted: a bug" in record.getMessage())
    assert record.exc_info


def test_an_unexpected_error_in_the_background_is_raised(store: CheckpointStore) -> None:
    class Broken(HostSnapshot):
        def assemble(self) -> dict[str, torch.Tensor]:
            raise RuntimeError("Connection reset by peer")

    writer = CheckpointWriter(store, CheckpointConfig(), ONE)
    writer.start(1, Broken({}), {})
    with pytest.raises(RuntimeError, match="Connection reset"):
        writer.wait()


def test_another_format_is_refused(store: CheckpointStore) -> None:
    save(store, 1)
    path = data_file(store, 1).with_name(MANIFEST)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        store.open(1)


@pytest.mark.parametrize("name", ["safetensors", "manifest.json", ""])
@pytest.mark.parametrize(("number", "remedy"), [(errno.EACCES, "give this user access"), (errno.EMFILE, "the limits")])
def test_a_checkpoint_without_read_permission_is_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, remedy: str
) -> None:
    """Resuming from an older checkpoint would repeat steps, and the newer one is not damaged."""
    store = CheckpointStore(str(tmp_path))
    store.claim(ONE)
    for step in (1, 2):
        store.save(step, {"param/w": torch.tensor([float(step)])}, {}, ONE)

    def refusing(function: Any) -> Any:
        def call(path: Any, *args: Any, **settings: Any) -> Any:
            if "step-00000002" in str(path) and str(path).endswith(name or "step-00000002"):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **settings)

        return call

    monkeypatch.setattr("builtins.open", refusing(open))
    monkeypatch.setattr("io.open", refusing(open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    with pytest.raises(DataError, match=f"step-00000002.* cannot be read .*{remedy}"):
        CheckpointStore(str(tmp_path)).newest()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["read", "sizes", "checksum"])
def test_a_disk_that_fails_for_a_moment_costs_no_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Without another attempt, the run would resume from an older one."""
    save(store, 1, 2)
    places: dict[str, Any] = {
        "read": (Path, "read_bytes"),
        "sizes": (os, "scandir"),
        "checksum": (checkpoint_module, "checksum"),
    }
    place = places[name]
    right, failures = getattr(*place), iter([1, 1])

    def flaky(*arguments: Any, **options: Any) -> Any:
        if "step-00000002" in str(arguments[0]) and next(failures, 0):
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return right(*arguments, **options)

    monkeypatch.setattr(place[0], place[1], flaky)
    found = store.newest()
    assert found is not None and found.step == 2 and next(failures, 0) == 0


@pytest.mark.parametrize(("number", "step"), [(errno.ESTALE, None), (errno.EIO, 1)])
def test_a_broken_disk_costs_one_and_a_server_that_is_gone_ends_the_start(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, number: int, step: int | None
) -> None:
    save(store, 1, 2)
    monkeypatch.setattr(retry, "FILE_S", 0.0)
    right = checkpoint_module.checksum

    def broken(path: Path, kind: str) -> str:
        if "step-00000002" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return right(path, kind)

    monkeypatch.setattr(checkpoint_module, "checksum", broken)
    if step is None:
        with pytest.raises(StoreError, match=r"step-00000002.*Stale file handle"):
            store.newest()
    else:
        found = store.newest()
        assert found is not None and found.step == step
