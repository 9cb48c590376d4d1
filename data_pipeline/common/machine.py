"""What this process may use of its machine: cores and memory within its control groups (a container, a job)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Memory limits from here on mean that there is none; cgroup v1 writes its largest number."""


def usable_cores() -> int:
    """Return the number of cores that this process may keep busy: those it may run on, or fewer if its control group
    has a quota (`docker run --cpus=2`)."""
    cores = len(os.sched_getaffinity(0))
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):  # no such file, or `max`: no quota
            if (folder / "cpu.max").exists():
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def total_memory() -> int:
    """Return the bytes of memory of this machine, or the lowest limit of this process's control groups."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _memory_groups())])


def free_memory() -> int:
    """Return the bytes that processes here may still allocate, on the machine and in their control groups. Cached files
    count as free, as they give way."""
    free = UNLIMITED
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), free)
    return max(0, min([free, *(limit - used for limit, used in _memory_groups())]))


def _memory_groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes without cached files, of each control group that limits this process's memory."""
    for folder in _folders("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with suppress(OSError, ValueError):
                most = _number(folder / limit)
                if most < UNLIMITED:
                    yield most, _number(folder / used) - _cached(folder)


def _cached(folder: Path) -> int:
    with suppress(OSError, ValueError):
        pairs = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        prefix = "total_" if "total_inactive_file" in pairs else ""  # v1: with the groups below
        return sum(int(pairs.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return 0


def _number(path: Path) -> int:
    return int(path.read_text())


def oom_kills() -> int:
    """Return how many processes of this process's control group the kernel has killed for lack of memory; 0 without
    control groups."""
    found = 0
    for root, own in _own_groups("memory"):
        for name in ("memory.events", "memory.oom_control"):  # of version 2, of version 1
            with suppress(OSError, ValueError):
                words = (root / own / name).read_text().split()
                found += int(words[words.index("oom_kill") + 1])
    return found


def _folders(controller: str) -> list[Path]:
    """Return the directories of this process's control groups, innermost first, that have limits of `controller`."""
    # In a container, the mount may begin at one of the parents.
    return [root / place for root, own in _own_groups(controller) for place in (own, *own.parents)]


def _own_groups(controller: str) -> list[tuple[Path, Path]]:
    """Return the control groups of this process that may have limits of `controller`: where their hierarchy is mounted,
    and their path in it."""
    found: list[tuple[Path, Path]] = []
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            found.append((CGROUPS / controller if controllers else CGROUPS, Path(path.lstrip("/"))))
    return found
