"""The limits of control groups, versions 1 and 2, as a container or a job sees them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.common import machine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups, none of which contains this process yet."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def put(groups: Path, own: str, files: dict[str, str]) -> None:
    (groups / "own").write_text(own)
    for name, text in files.items():
        (groups / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / "cgroup" / name).write_text(text)


def test_without_control_groups_the_machine_is_the_limit(groups: Path) -> None:
    assert machine.usable_cores() == 64
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.total_memory() == whole and 0 < machine.free_memory() <= whole


def test_the_second_version(groups: Path) -> None:
    """A job in a slice: the tightest limit on the path counts, and cached files do not."""
    files = {
        "job/step/cpu.max": "max 100000\n",
        "job/cpu.max": "250000 100000\n",
        "job/step/memory.max": "max\n",
        "job/memory.max": f"{8 << 20}\n",
        "job/memory.current": f"{7 << 20}\n",
        "job/memory.stat": f"anon {1 << 20}\ninactive_file {4 << 20}\nactive_file {2 << 20}\n",
    }
    put(groups, "0::/job/step\n", files)
    assert machine.usable_cores() == 3
    assert machine.total_memory() == 8 << 20 and machine.free_memory() == 7 << 20


def test_the_first_version_in_a_container(groups: Path) -> None:
    """Its own group is mounted at the root, although its path is the one seen from outside."""
    files = {
        "cpu/cpu.cfs_quota_us": "50000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": f"{6 << 20}\n",
        "memory/memory.usage_in_bytes": f"{9 << 20}\n",
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {1 << 20}\ntotal_active_file 0\n",
    }
    put(groups, "3:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n", files)
    assert machine.usable_cores() == 1
    assert machine.total_memory() == 6 << 20 and machine.free_memory() == 0


def test_files_that_state_no_limit(groups: Path) -> None:
    files = {
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "1\n",
    }
    put(groups, "3:cpu:/\n4:memory:/\n", files)
    assert machine.usable_cores() == 64 and machine.total_memory() > 1 << 28
