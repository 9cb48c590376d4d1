"""`cascade train` that counts, at each step, what makes ranks or a GPU wait: collectives, and host synchronisations.

Both go through torch's dispatcher, those of DeepSpeed as well: `c10d::*` are collectives, and a number read from a
tensor is `_local_scalar_dense` (on a GPU: the host waits for all that was queued) or a copy to the host. Left
out: what the frozen text encoder does on the CPU with words that it has not seen yet, and decoding, which has a process
of its own outside the tests.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import training.train
from data_pipeline.reading.loader import Loader
from tests.training import chaos
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


class Reading:
    """Counts the calls of `Tensor.tolist`, `cpu` and `numpy` by this thread: for a tensor in host memory these do not
    reach the dispatcher."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.paused = False
        self.thread = threading.get_ident()

    def watch(self) -> None:
        """Watches only these methods, since a torch mode would inspect every call of a step."""
        for name in ("tolist", "cpu", "numpy"):
            setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))

    def _counting(self, name: str, method: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.paused and threading.get_ident() == self.thread:
                self.counts[f"Tensor.{name}"] += 1
            return method(*args, **kwargs)

        return counted


class Objects:
    """Records the collectives on pickled objects in all threads, and which threads have used any collective."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.threads: set[str] = set()

    def watch(self) -> None:
        for name in dir(dist):
            if "object" in name and callable(getattr(dist, name)):
                setattr(dist, name, self._noting(getattr(dist, name), self.sent.append, name))
        dist.all_reduce = self._noting(dist.all_reduce, lambda _: self.threads.add(threading.current_thread().name))

    @staticmethod
    def _noting(call: Any, note: Any, name: str = "") -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            note(name)
            return call(*args, **kwargs)

        return noted


def main(config: Experiment) -> dict[str, Any]:
    counting, steps = Counting(), []
    reading, objects = Reading(counting.counts), Objects()
    next_batch, begin, text, load = Session.next_batch, Session.begin, Session._text, Loader.__next__

    def counted_begin(self: Session) -> None:
        begin(self)
        objects.watch()
        counting.__enter__()
        reading.watch()

    def counted(self: Session, healthy: bool) -> Any:
        steps.append(dict(counting.counts))
        counting.counts.clear()
        reading.paused = True  # the loader fills tensors in host memory
        try:
            return next_batch(self, healthy)
        finally:
            reading.paused = False

    def uncounted(self: Session, batch: Any) -> Any:
        counting.paused = True
        try:
            return text(self, batch)
        finally:
            counting.paused = False

    def decoded(self: Loader) -> Any:
        reading.paused = True
        try:
            return load(self)
        finally:
            reading.paused = False

    Loader.__next__ = decoded  # type: ignore[method-assign]
    Session.begin, Session.next_batch, Session._text = counted_begin, counted, uncounted  # type: ignore[method-assign]
    result = (chaos if "CASCADE_CHAOS" in os.environ else training.train).main(config)
    report = {"steps": steps, "objects": objects.sent, "threads": sorted(objects.threads)}
    Path(config.run.dir, f"counts-{os.environ['RANK']}.json").write_text(json.dumps(report))
    return result
