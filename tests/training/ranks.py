"""Runs a function of a test module in several processes with real process groups, and brings back what each rank
returned."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from training.config.experiment import Experiment
from training.processes.endings import run_program
from training.processes.launcher import run_processes
from training.processes.ranks import read_ranks


def run_ranks(function: Any, processes: int, scratch: Path, *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` on every rank; arguments and results are JSON values."""
    scratch.mkdir(parents=True, exist_ok=True)
    where = f"{function.__module__}:{function.__name__}"
    command = [sys.executable, "-m", "tests.training.ranks", where, str(scratch), json.dumps(arguments)]
    code = run_processes(command, processes)
    assert code == 0, f"{where} ended with {code}"
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


if __name__ == "__main__":
    run_program(lambda: main(*sys.argv[1:]))
