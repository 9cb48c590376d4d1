"""How often to save: often enough that a failure costs little, rarely enough that saving costs little.

Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), after Young (1974). Imports
nothing heavy, since job scripts also use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.processes.exit_codes import EXIT_DONE, STOP_CODES

HISTORY = "restarts.jsonl"
"""File in RUN_DIR: one line for each time that a run's processes ended without success."""
NODE_S = 54 * 86400 * 2048 / 419
"""Prior mean time between failures of a node, seconds: 419 unexpected interruptions of 2,048 nodes of eight H100 in 54
days (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4)."""


def best_interval(cost_s: float, between_failures_s: float) -> float:
    """Return the seconds of work between two checkpoints that minimise lost time.

    Args:
        cost_s: seconds by which one checkpoint delays the loop.
        between_failures_s: mean time between failures of the whole job, seconds.
    """
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = math.sqrt(cost_s / (2 * between_failures_s))
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + ratio / 3 + ratio**2 / 9) - cost_s


def between_failures(failures: int, ran_s: float, nodes: int) -> float:
    """Return the mean time between failures of a job in seconds, from its own failures and one at the published
    rate."""
    return (NODE_S / nodes + ran_s) / (failures + 1)


def failures_of(ends: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of failures in the lines of a run's HISTORY; ends that all its ranks agreed on (a stop on
    request, Ctrl-C) lose no work, and do not count."""
    return sum(end.get("code", EXIT_DONE) not in (EXIT_DONE, *STOP_CODES) for end in ends)


def ran_seconds(run_dir: Path, world_size: int) -> float:
    """Return the wall time of all starts of the run so far, seconds."""
    try:
        hours: dict[str, float] = json.loads((run_dir / "hours.json").read_text())
        return sum(hours.values()) * 3600 / world_size
    except (OSError, ValueError, AttributeError, TypeError):
        return 0.0
