"""Files on a server that fails for a moment, or for good: a library that is preloaded into one process makes the system
calls of `reading_files.py` fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.small_shards import write_shards

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
READS = [("sample", "open"), ("sample", "read"), ("stream", "open"), ("stream", "read"), ("folder", "list")]
LISTS = [("glob", "list"), ("nested", "list")]
PASSING = [(*way, number) for way in READS + LISTS for number in (errno.ESTALE, errno.EIO)]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Case -> what became of it: "same" (as without faults), or the type and the message of the error."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("failing")
    library = folder / "failing.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, HERE / "failing_files.c", "-ldl"], check=True)
    write_shards(folder / "a set" / "one", [3])
    cases = [[*case, 2] for case in PASSING]
    cases += [[way, call, errno.EIO, 10_000] for way, call in (*READS, *LISTS)]
    cases += [[way, call, errno.EACCES, 10_000] for way, call in LISTS]
    command = [sys.executable, "-m", "tests.data_pipeline.storage.reading_files", str(folder / "a set")]
    done = subprocess.run(
        [*command, json.dumps(cases)], cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("way", "call", "number"), PASSING)
def test_a_server_that_comes_back_costs_nothing(said: dict[str, list[str]], way: str, call: str, number: int) -> None:
    assert said[f"{way} {call} {number} 2"] == ["same"]


@pytest.mark.parametrize(("way", "call"), [*READS, *LISTS])
def test_one_that_does_not_ends_with_the_file_and_may_be_started_again(
    said: dict[str, list[str]], way: str, call: str
) -> None:
    kind, message = said[f"{way} {call} {errno.EIO} 10000"]
    assert kind == "StoreError" and "Input/output error" in message and "a set/one" in message
    assert "giving up" in message and message.endswith("check the disk, or the mount of the file server")


@pytest.mark.parametrize(("way", "call"), LISTS)
def test_a_glob_leaves_out_no_directory_in_silence(said: dict[str, list[str]], way: str, call: str) -> None:
    kind, message = said[f"{way} {call} {errno.EACCES} 10000"]
    assert kind == "DataError" and "one" in message and "Permission denied; give this user access" in message
