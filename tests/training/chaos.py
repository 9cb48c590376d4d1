"""`cascade train` in which something happens to one rank at one step. CASCADE_CHAOS: a list of {what, rank, step}.

kill                        SIGKILL at the end of the step
sigterm, sigusr1, sigint    the signal, to this rank alone, at the end of the step
nan, spike                  the loss of the step is NaN, or a thousand times as large
data                        the batch of the step cannot be read
write                       SIGKILL after half of a file of that step's checkpoint
start                       SIGKILL while the session is put together
freeze                      SIGSTOP then (step 0), or before the ranks meet (step -1)
slow write                  each file of that step's checkpoint takes `seconds`
sleep                       `seconds` inside `phase` of the step (step -1: of every step)
stop                        SIGTERM inside `phase` of the step (phase begin: before the first one)
error                       a DataError in phase forward of the step
gpu error                   torch's error `says` in phase forward of the step (step 0: while the text encoder is loaded)
elsewhere                   `SECTION.dir` of the rank is `place`, as on a node that does not share it with the others
missing                     the package `module` is not installed
gpus                        what torch sees of `count` GPUs; with 0, CUDA says `says`
small files, room           from the end of the step on no file can be larger than `bytes` (a full disk); as before
silence                     from the end of the step on no data comes; a second later SIGTERM
hurry                       a failing store is given up `seconds` after a signal
gone, back                  at the end of the step a file takes the place of the checkpoints' directory; it is put back
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import training.run.watchdog
import training.train
from data_pipeline.common.errors import DataError
from data_pipeline.reading.loader import Loader
from data_pipeline.storage import retry
from data_pipeline.storage.folder import LocalFolder
from training.config.experiment import Experiment
from training.run import session, training_data
from training.run.session import Session


def main(config: Experiment) -> dict[str, Any]:
    events = [e for e in json.loads(os.environ["CASCADE_CHAOS"]) if e["rank"] == int(os.environ["RANK"])]
    log, loss, write, load = Session.log, Session.loss, LocalFolder.write, Loader.__next__
    phase, begin, open_loader = Session.phase, Session.begin, training_data.open_loader
    build = session.build_text_encoder
    checkpoints = Path(config.run.dir) / "checkpoints"

    def at(what: str, step: int) -> bool:
        return any(e["what"] == what and e["step"] == step for e in events)

    def end_of_step(self: Session, step: int, record: dict[str, Any]) -> None:
        log(self, step, record)
        for name in ("kill", "sigterm", "sigusr1", "sigint"):
            if at(name, step):
                os.kill(os.getpid(), getattr(signal, name.upper(), signal.SIGKILL))
        if at("silence", step):
            self.data.loader._decoding._process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for event in (e for e in events if e["step"] == step):
            while event["what"] in ("small files", "room", "gone", "back") and self.saving.writer.busy:
                time.sleep(0.01)  # the checkpoint before it is whole, or has failed
            if event["what"] in ("small files", "room"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (event.get("bytes", resource.RLIM_INFINITY), -1))
            elif event["what"] == "gone":
                checkpoints.rename(checkpoints.with_name("away"))
                checkpoints.touch()
            elif event["what"] == "back":
                checkpoints.unlink()
                checkpoints.with_name("away").rename(checkpoints)

    def poisoned(self: Session, batch: Any) -> torch.Tensor:
        mean, step = loss(self, batch), self.data.step
        return mean * (float("nan") if at("nan", step) else 1000.0 if at("spike", step) else 1.0)

    @contextmanager
    def in_phase(self: Session, name: str, step: int) -> Iterator[None]:
        with phase(self, name, step):
            strike(name, step)
            yield

    def at_the_start(*args: Any, **kwargs: Any) -> Loader:
        if any(e["what"] == "start" for e in events):
            os.kill(os.getpid(), signal.SIGKILL)
        if at("freeze", 0):
            os.kill(os.getpid(), signal.SIGSTOP)
        return open_loader(*args, **kwargs)

    def on_the_gpu(*given: Any) -> Any:
        fail_gpu(0)
        return build(*given)

    def fail_gpu(step: int) -> None:
        for event in (e for e in events if e["what"] == "gpu error" and e["step"] == step):
            raise torch.AcceleratorError(event["says"])

    def before_the_first(self: Session) -> None:
        strike("begin", 0)
        begin(self)

    def strike(name: str, step: int) -> None:
        if name == "forward":
            fail_gpu(step)
            if at("error", step):
                raise DataError("something is wrong with the data")
        for event in (e for e in events if e.get("phase") == name and e["step"] in (step, -1)):
            time.sleep(event.get("seconds", 0))
            if event["what"] == "stop":
                os.kill(os.getpid(), signal.SIGTERM)

    def broken(self: Loader) -> Any:
        if at("data", self.position // self.config.global_batch + 1):
            raise DataError("the shard is gone")
        return load(self)

    def interrupted(self: LocalFolder, name: str, chunks: Iterable[Any]) -> None:
        if name.endswith(".safetensors") and at("write", int(self.path.name.partition("-")[2])):
            chunks = itertools.chain(itertools.islice(chunks, 2), _die())
        for event in (e for e in events if e["what"] == "slow write" and self.path.name.endswith(f"{e['step']:08d}")):
            time.sleep(event["seconds"])
        write(self, name, chunks)

    Session.log, Session.loss, LocalFolder.write = end_of_step, poisoned, interrupted  # type: ignore[method-assign]
    Loader.__next__ = broken  # type: ignore[method-assign]
    Session.phase, Session.begin = in_phase, before_the_first  # type: ignore[method-assign, assignment]
    training_data.open_loader = at_the_start
    session.build_text_encoder = on_the_gpu  # type: ignore[assignment]
    for name, seconds in {"MARGIN_S": 2.0, "SILENT_S": 4.0, "BEAT_S": 0.5}.items():
        setattr(training.run.watchdog, name, seconds)
    retry.HURRY_S = next((event["seconds"] for event in events if event["what"] == "hurry"), retry.HURRY_S)
    for event in (e for e in events if e["what"] == "elsewhere"):
        getattr(config, event["section"]).dir = event["place"]
    for event in (e for e in events if e["what"] == "missing"):
        sys.modules[event["module"]] = None  # type: ignore[assignment]
    for event in (e for e in events if e["what"] == "gpus"):
        show_gpus(event["count"], event.get("says", ""))
    if at("freeze", -1):
        os.kill(os.getpid(), signal.SIGSTOP)
    return training.train.main(config)


def show_gpus(count: int, says: str) -> None:
    """Lets torch see GPUs that are not there, or miss them as CUDA does."""

    def initialise() -> None:
        raise RuntimeError(says)

    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: count > 0
    torch.cuda.device_count = lambda: count
    torch.cuda.init = initialise
    setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))  # noqa: B010


def _die() -> Iterable[Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield b""
