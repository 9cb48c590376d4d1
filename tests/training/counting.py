"""`cascade train` that counts, at each step, what makes ranks or a GPU wait: collectives, and host synchronisations.

Both go through torch's dispatcher, those of DeepSpeed as well: `c10d::*` are collectives, and a number read from a
tensor is `_local_scalar_dense` (on a GPU: the host waits for all that was queued) or a copy to the host. What the
frozen text encoder does on the CPU with words that it has not seen yet is left out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import training.train
from training.config.experiment import Experiment
from training.run.session import Session


class Counting(TorchDispatchMode):
    """Counts of the operations of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused and (func.namespace == "c10d" or func is torch.ops.aten._local_scalar_dense.default):
            self.counts[f"{func.namespace}.{func.__name__.partition('.')[0]}"] += 1
        return func(*args, **(kwargs or {}))


class Reading(torch.overrides.TorchFunctionMode):
    """Counts `Tensor.tolist`, `cpu` and `numpy`, which ask the dispatcher nothing where the tensor is on a CPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy"):
            self.counts[f"Tensor.{func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def main(config: Experiment) -> dict[str, Any]:
    counting, steps = Counting(), []
    reading = Reading(counting.counts)
    next_batch, begin, text = Session.next_batch, Session.begin, Session._text

    def counted_begin(self: Session) -> None:
        begin(self)
        counting.__enter__()
        reading.__enter__()

    def counted(self: Session, healthy: bool) -> Any:
        steps.append(dict(counting.counts))
        counting.counts.clear()
        return next_batch(self, healthy)

    def uncounted(self: Session, batch: Any) -> Any:
        counting.paused = True
        try:
            return text(self, batch)
        finally:
            counting.paused = False

    Session.begin, Session.next_batch, Session._text = counted_begin, counted, uncounted  # type: ignore[method-assign]
    result = training.train.main(config)
    Path(config.run.dir, f"counts-{os.environ['RANK']}.json").write_text(json.dumps(steps))
    return result
