"""Fixtures shared by several folders."""

from __future__ import annotations

import fcntl
import gc
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest

from tests.ceph import Ceph, missing_programs
from tests.s3 import S3Server, start_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""One thread for each of the many processes: threads of tiny tensors that share cores wait for each other, spinning."""

for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
    os.environ.pop(variable, None)  # otherwise every process reads the machine's certificates, even for plain HTTP
gc.disable()
"""Until all tests are collected: next to nothing of it is garbage, and the search takes almost a third of the time, in
every worker."""

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell starts what it puts into the background with SIGINT ignored, and processes under test would inherit that."""

SLOW_FIRST = (
    "tests/slurm/test_survive.py",
    "tests/data_pipeline/storage/test_faults.py",
    "tests/training/test_train.py",
    "tests/training/ablation/test_ablate.py",
    "tests/slurm/test_graph.py",
    "tests/training/plan/test_memory.py",
    "tests/training/test_places.py",
    "tests/training/test_waiting.py",
    "tests/slurm/test_launch.py",
    "tests/slurm/",
    "tests/training/test_trouble.py",
    "tests/integration/",
    "tests/training/checkpoint/test_two_attempts.py",
    "tests/training/engine/",
    "tests/training/test_",
    "tests/training/cli/",
    "tests/training/plan/",
    "tests/training/ablation/",
    "tests/training/run/",
    "tests/test_",
    "tests/data_pipeline/reading/",
    "tests/data_pipeline/content/",
    "tests/training/",
    "tests/data_pipeline/",
)
"""The order in which several workers take files: by measured CPU time, so that no worker ends alone with a long one."""


def pytest_configure(config: pytest.Config) -> None:
    """Before workers start, the process that all of them fork from."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        from tests.training import forks

        forks.share()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow files first where workers share them."""
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in SLOW_FIRST])


def pytest_collection_finish() -> None:
    """Objects that exist now stay to the end: no garbage collection needs to look at them again. Later ones are looked
    at every 20,000 new objects; every 700, as Python does by default, it takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def messages_of_one_file() -> Iterator[None]:
    """A training in this process starts logging to the terminal; the next file's tests would read its messages."""
    before = {name: logging.getLogger(name).level for name in (None, "cascade", "training", "data_pipeline")}
    yield
    if tracking := sys.modules.get("training.run.reporting.tracking"):
        tracking.stop_logging()
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """Under nohup, processes that the tests start would ignore a closed terminal as well."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SHARED_SERVER = "s3.json"
"""Where workers leave the address of the S3 server that they share, in the directory that theirs are in."""


@pytest.fixture(scope="session")
def moto_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for the whole session and all its workers: the first that needs it starts it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        server, process = start_server()
        yield server
        process.kill()
        process.wait()
        return
    shared = tmp_path_factory.getbasetemp().parent / SHARED_SERVER
    with open(shared.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            server, process = start_server()
            shared.write_text(json.dumps({"pid": process.pid, "server": asdict(server)}))
    yield S3Server(**json.loads(shared.read_text())["server"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The server that the workers share ends after all of them."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        return
    shared = session.config._tmp_path_factory.getbasetemp() / SHARED_SERVER  # type: ignore[attr-defined]
    if shared.exists():
        os.kill(json.loads(shared.read_text())["pid"], signal.SIGKILL)


@pytest.fixture(scope="session")
def ceph_starting() -> Iterator[Future[Ceph] | None]:
    """Ceph, where it is installed: it starts slowly, while other tests run."""
    if missing_programs():
        yield None
        return
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(Ceph)
        yield starting
    if not starting.exception():
        starting.result().stop()


@pytest.fixture(scope="session")
def ceph_process(ceph_starting: Future[Ceph] | None) -> S3Server:
    """Ceph's S3 server, where its packages are installed; if it is installed, it must start."""
    if ceph_starting is None:
        lacking = ", ".join(missing_programs())
        pytest.skip(f"Ceph is not installed ({lacking}; apt-get install radosgw ceph-mon ceph-osd)")
    return ceph_starting.result().server


@pytest.fixture(scope="session")
def s3_process(moto_process: S3Server) -> S3Server:
    """The S3 server of most tests; those of faults run against both."""
    return moto_process


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's environment pointing at it (`.endpoint`, `.env` for other processes)."""
    from data_pipeline.storage import s3

    for name, value in s3_process.env.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    s3.forget()
    return s3_process


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client: Any = s3_server.client()
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few training shards of drawings, with their index."""
    from dataclasses import replace

    from data_pipeline.commands import prepare
    from training.config.experiment import Experiment

    config = Experiment()
    config.prepare.output = str(tmp_path_factory.mktemp("shards"))
    config.prepare.draw = replace(config.prepare.draw, count=40, heldout=4, size=32, samples_per_shard=16)
    prepare.main(config)
    return f"{config.prepare.output}/train"
