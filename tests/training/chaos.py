"""`cascade train` in which something happens to one rank at one step. CASCADE_CHAOS: a list of {what, rank, step}.

kill                        SIGKILL at the end of the step
sigterm, sigusr1, sigint    the signal, to this rank alone, at the end of the step
nan, spike                  the loss of the step is NaN, or a thousand times as large
data                        the batch of the step cannot be read
write                       SIGKILL after half of a file of that step's checkpoint
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterable
from typing import Any

import torch

import training.train
from data_pipeline.errors import DataError
from data_pipeline.loader import Loader
from training.config import Experiment
from training.folder import LocalFolder
from training.session import Session


def main(config: Experiment) -> dict[str, Any]:
    events = [e for e in json.loads(os.environ["CASCADE_CHAOS"]) if e["rank"] == int(os.environ["RANK"])]
    log, loss, write, load = Session.log, Session.loss, LocalFolder.write, Loader.__next__

    def at(what: str, step: int) -> bool:
        return any(e["what"] == what and e["step"] == step for e in events)

    def end_of_step(self: Session, step: int, record: dict[str, Any]) -> None:
        log(self, step, record)
        for name in ("kill", "sigterm", "sigusr1", "sigint"):
            if at(name, step):
                os.kill(os.getpid(), getattr(signal, name.upper(), signal.SIGKILL))

    def poisoned(self: Session, batch: Any) -> torch.Tensor:
        mean, step = loss(self, batch), self.position // self.config.data.global_batch
        return mean * (float("nan") if at("nan", step) else 1000.0 if at("spike", step) else 1.0)

    def broken(self: Loader) -> Any:
        if at("data", self.position // self.config.global_batch + 1):
            raise DataError("the shard is gone")
        return load(self)

    def interrupted(self: LocalFolder, name: str, chunks: Iterable[Any]) -> None:
        if name.endswith(".safetensors") and at("write", int(self.path.name.partition("-")[2])):
            chunks = itertools.chain(itertools.islice(chunks, 2), _die())
        write(self, name, chunks)

    Session.log, Session.loss, LocalFolder.write = end_of_step, poisoned, interrupted  # type: ignore[method-assign]
    Loader.__next__ = broken  # type: ignore[method-assign]
    return training.train.main(config)


def _die() -> Iterable[Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield b""
