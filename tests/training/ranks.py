"""Runs a function of a test module in several processes with real process groups, and returns the result of each
rank."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tests.training import forks
from training.config.experiment import Experiment
from training.processes.ranks import read_ranks


def run_ranks(function: Any, processes: int, scratch: Path, *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` on every rank; arguments and results are JSON values."""
    scratch.mkdir(parents=True, exist_ok=True)
    words = f"{function.__module__}:{function.__name__}", str(scratch), json.dumps(arguments)
    running = forks.call(main, processes, scratch, *words)
    assert running.codes() == [0] * processes, running.text
    return [json.loads((scratch / f"result-{rank}.json").read_text()) for rank in range(processes)]


def main(where: str, scratch: str, arguments: str) -> None:
    import torch

    from training.engine.start import init_distributed, shut_down

    torch.set_num_threads(1)
    module, name = where.split(":")
    ranks = read_ranks()
    assert ranks is not None
    ranks = init_distributed(ranks, Experiment())
    result = getattr(importlib.import_module(module), name)(ranks, *json.loads(arguments))
    Path(scratch, f"result-{ranks.rank}.json").write_text(json.dumps(result))
    shut_down()
