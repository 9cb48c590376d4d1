"""Errors that name a setting: the name is data, not part of the wording."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.common.errors import ConfigError, DataError, ShardsError, UserError, about, of_machine
from data_pipeline.config import DataConfig
from data_pipeline.shards.mixture import entries_of, open_dataset
from data_pipeline.storage import store


def test_shards_of_another_setting_are_named_by_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "data.shards" / "*.tar")
    with pytest.raises(ShardsError) as plain:
        store.expand(missing)
    with pytest.raises(ShardsError) as other, about("validation.shards"):
        store.expand(missing)
    assert str(plain.value).startswith(f"data.shards={missing}: no .tar shards found")
    assert str(other.value) == str(plain.value).replace("data.shards=", "validation.shards="), "the path stays"
    copy = pickle.loads(pickle.dumps(other.value))
    assert type(copy) is ShardsError and str(copy) == str(other.value), "as another process sends it"
    with pytest.raises(DataError, match=r"^validation\.shards: data\.shards is full$"), about("validation.shards"):
        raise DataError("data.shards is full")


def test_a_data_set_of_a_mixture_is_named(tmp_path: Path) -> None:
    config = DataConfig(shards=[{"name": "art", "shards": str(tmp_path / "none")}])
    for opened in (open_dataset, entries_of):
        with pytest.raises(ShardsError, match=r"^data\.shards, data set art=.*none: no .tar shards found"):
            opened(config)


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.tar"), "a.tar: too many open files; raise the limit", 1),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no more processes or threads can be started", 1),
        (RuntimeError("can't start new thread"), "no more processes or threads can be started", 1),
        (MemoryError(), "out of memory; raise the limit", 1),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "out of memory", 1),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
            "out of memory; raise",
            1,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"), "CUDA out of memory. Tried to all", 1),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory", 1),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "TMPDIR=/none: there is no", 2),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: Is a directory (debug=true shows where)", 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; give this user access", 2),
        (OSError(errno.ESTALE, "Stale file handle", "x"), "x: Stale file handle; the file server no longer has it", 1),
    ],
)
def test_resources_that_the_machine_lacks_are_reported_in_one_sentence(
    error: Exception, sentence: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/none")
    told = of_machine(error)
    assert told is not None and str(told).startswith(sentence) and told.exit_code == code


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        OSError(errno.ENOSPC, "of the output"),
        RuntimeError("x"),
        OSError("x"),
        BlockingIOError(errno.EAGAIN, "write could not ..."),
    ],
)
def test_bugs_remain_bugs(error: Exception) -> None:
    assert of_machine(error) is None


def test_log_names_that_torch_does_not_know_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._logging import _internal

    monkeypatch.setenv("TORCH_LOGS", "bogus")
    with pytest.raises(ValueError) as caught:
        _internal._parse_log_settings("bogus")
    told = of_machine(caught.value)
    assert isinstance(told, ConfigError) and str(told).startswith("TORCH_LOGS=bogus: ")


def test_a_variable_that_torch_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = compile("import torch; torch.distributed.set_debug_level_from_env()", "/x/torch/distributed/x.py", "exec")
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "bogus")
    with pytest.raises(ValueError) as caught:  # as at its import
        exec(imports)
    assert str(of_machine(caught.value)) == (
        "TORCH_DISTRIBUTED_DEBUG=bogus: torch does not accept it; unset or correct it"
    )


def test_a_library_on_a_noexec_file_system_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR is often mounted noexec, and torch.compile loads what it has built there."""
    said = RuntimeError("ImportError: /tmp/inductor/ab/k.so: failed to map segment from shared object")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    told = of_machine(said)
    assert isinstance(told, UserError) and str(told).startswith("/tmp/inductor/ab: compiled code cannot be loaded")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=0))
    assert str(of_machine(said)).startswith("out of memory")
