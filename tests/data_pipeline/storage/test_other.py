"""Other schemes through fsspec: its memory store, and web servers with ranges, without ranges, and with failures."""

from __future__ import annotations

import email.utils
import gzip
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
from botocore.exceptions import ClientError

from data_pipeline import ShardStream
from data_pipeline.common.errors import DataError, StoreError
from data_pipeline.shards.embeddings import sidecar_url
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import other, store
from data_pipeline.storage.folder import open_folder
from data_pipeline.storage.retry import Patience, asked_delay
from data_pipeline.storage.s3_errors import Denied
from tests.data_pipeline.small_shards import write_shards
from tests.hub import Hub

QUICK = Patience(stall_s=1, deadline_s=2, base_s=0.01, cap_s=0.05)
DATA = bytes(range(251)) * 100
OPTIONS: dict[str, Any] = {"seed": 1, "global_batch": 8, "lanes": 4, "window": 8, "stop": 48}


class Web(SimpleHTTPRequestHandler):
    """A server of files that answers ranges, as object stores do, unless told otherwise."""

    ranges = lists = True
    token = ""
    """The required value of the Authorization header."""
    shifted = 0
    """By how many bytes its ranges begin too late."""
    packs = False
    """Whether it compresses for clients that accept that."""
    failing: list[int] = []  # noqa: RUF012
    said: dict[str, str] = {}  # noqa: RUF012
    """Headers of its failures."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if Web.failing:
            body = b"<html><p>its words</p></html>"
            self.send_response(Web.failing.pop(0))
            for name, value in {"Content-Length": str(len(body)), **Web.said}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            return
        if Web.token and self.headers.get("Authorization") != Web.token:
            self.send_error(401)
            return
        path = Path(self.translate_path(self.path))
        if path.is_dir() and not Web.lists:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        if Web.packs and "gzip" in self.headers.get("Accept-Encoding", "") and path.is_file():
            body = gzip.compress(path.read_bytes())
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        if not (Web.ranges and wanted and path.is_file()):
            super().do_GET()
            return
        data = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        first = str(int(first) + Web.shifted)
        if int(first) >= len(data):
            self.send_error(416)
            return
        body = data[int(first) : int(last) + 1 if last else len(data)]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    Web.shifted, Web.token = 0, ""
    Web.ranges, Web.lists, Web.packs, Web.failing, Web.said = True, True, False, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_read_write_list_and_remove(memory: str) -> None:
    for name in ("a/1", "a/b/2", "ab"):
        store.write_bytes(f"{memory}/{name}", DATA)
    assert store.read_bytes(f"{memory}/a/1") == DATA
    assert store.read_range(f"{memory}/ab", 100, 20_000) == DATA[100:20_000]
    assert store.list_dir(memory) == ["a", "ab"] and store.list_dir(f"{memory}/a") == ["1", "b"]
    assert store.sizes(f"{memory}/a") == {"1": len(DATA), "b": -1} and store.size(f"{memory}/ab") == len(DATA)
    assert store.list_dir(f"{memory}/none") == []
    assert store.exists(f"{memory}/a/b") and not store.exists(f"{memory}/c")
    assert not store.create(f"{memory}/ab", b"x") and store.create(f"{memory}/new", b"x")
    store.remove_files(f"{memory}/a", ["1", "missing"])
    store.remove(f"{memory}/a")
    assert store.list_dir(memory) == ["ab", "new"]
    with pytest.raises(DataError, match="no such object"):
        store.read_bytes(f"{memory}/a/1")
    with pytest.raises(DataError, match=r"instead of \d+; repeat"):
        store.read_range(f"{memory}/ab", 0, len(DATA) + 1)


def test_a_folder_of_checkpoints(memory: str) -> None:
    folder = open_folder(f"{memory}/ck").sub("step-00000001")
    folder.write("part", [b"12", memoryview(b"345")])
    assert folder.names() == ["part"] and folder.read("part") == b"12345"
    assert folder.fetch("part").read_bytes() == b"12345"
    folder.remove_files(["part"])
    assert folder.names() == [] and folder.size("part") is None


def order(shards: Any) -> list[str]:
    return [sample["__key__"] for sample in ShardStream(shards, **OPTIONS)]


def test_shards_in_memory_are_read_in_the_same_order(memory: str, tmp_path: Path) -> None:
    for path in write_shards(tmp_path, [9, 7, 8]):
        store.write_bytes(f"{memory}/set/{store.basename(path)}", Path(path).read_bytes())
    expected = order(str(tmp_path))
    assert order(f"{memory}/set") == order(f"{memory}/set/*.tar") == expected
    assert store.exists(f"{memory}/set/00000.index.parquet"), "the index lies beside its shard"
    with ShardWriter(f"{memory}/written/0.tar") as shard:
        shard.write("0", {"txt": b"caption"})
    assert store.list_dir(f"{memory}/written") == ["0.index.parquet", "0.tar"]


def test_shards_from_a_web_server(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where the indexes go: the server is read-only
    write_shards(tmp_path / "web", [9, 7, 8])
    expected = order(str(tmp_path / "web"))
    for path in (tmp_path / "web").glob("*.parquet"):
        path.unlink()
    Web.failing = [503, 500]
    assert order([f"{web}/{n:05d}.tar" for n in range(3)]) == expected
    assert order(f"{web}/{{00000..00002}}.tar") == order(web + "/") == expected
    with pytest.raises(DataError, match="is read-only"):
        store.write_bytes(f"{web}/x", b"x")


def test_shards_with_a_query_from_a_server_that_lists_nothing(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / "web", [2] * 6)
    expected = order(str(tmp_path / "web"))
    for path in (tmp_path / "web").glob("*.parquet"):
        path.unlink()
    Web.lists = False
    assert order(f"{web}/{{00000..00005}}.tar") == expected
    assert order(f"{web}/{{00000..00005}}.tar?download=true&signed=a/b.tar") == expected
    assert len({path.parent for path in (tmp_path / "cache").rglob("*.parquet")}) == 1, "one index, whatever the query"
    assert store.exists(f"{web}/00000.tar") and not store.exists(f"{web}/none")
    assert store.present(web, ["00000.tar", "none"]) == {"00000.tar"}
    assert sidecar_url(f"{web}/00000.tar?x=a/b", "out") == "out/00000.embeddings.safetensors"


def test_a_web_server_that_compresses_sends_the_file_itself(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    Web.packs = True
    assert store.read_range(f"{web}/x", 100, 200) == DATA[100:200] and store.read_bytes(f"{web}/x") == DATA


def test_a_header_in_fsspecs_settings_reaches_a_web_server(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    Web.token = "Bearer T"
    with pytest.raises(DataError, match=r"access is denied .*401.*check .*FSSPEC_HTTPS"):
        store.read_range(f"{web}/x", 100, 200)
    headers = {"headers": {"Authorization": "Bearer T"}}
    for settings in (headers, {"client_kwargs": headers}):
        monkeypatch.setitem(fsspec.config.conf, "https", settings)
        other._filesystems.clear()
        assert store.read_range(f"{web}/x", 100, 200) == DATA[100:200]
    other._filesystems.clear()


def test_a_server_that_says_when_to_retry_is_waited_for(
    web: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "web" / "x").write_bytes(DATA)
    Web.failing, Web.said = [429], {"Retry-After": "1"}
    assert store.read_range(f"{web}/x", 100, 200) == DATA[100:200]
    assert "429, message='Too Many Requests: its words'" in caplog.text and "attempt 2 in 1.0 s" in caplog.text
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    for answer, seconds in (({"retry-after": later}, 90), ({"retry-after": "soon"}, 0), ({}, 0)):
        error = ClientError({"ResponseMetadata": {"HTTPHeaders": answer}}, "GetObject")
        assert seconds <= asked_delay(error) <= seconds + 10


def test_a_shard_that_changes_on_a_server_is_named(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not counted as one bad sample after another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = Path(write_shards(tmp_path / "web", [9])[0])
    stream = iter(ShardStream(f"{web}/00000.tar", **OPTIONS | {"prefetch_mb": 0}))
    next(stream)
    path.write_bytes(bytes(len(path.read_bytes()) + 512))
    with pytest.raises(DataError, match=r"00000\.tar: the object has changed since it was indexed"):
        list(stream)


def test_refusals_of_gcsfs_and_adlfs_are_recognized() -> None:
    """gcsfs raises a plain OSError for 403, adlfs FileExistsError for all conflicts."""
    refused = other._permanent(OSError("Forbidden: b/x\nno storage.objects.get access"), "gs://b/x")
    assert isinstance(refused, Denied) and "no storage.objects.get access" in str(refused)
    kept = FileExistsError("x")
    kept.__cause__ = OSError("BlobImmutableDueToPolicy")
    assert "cannot be replaced (OSError: BlobImmutableDueToPolicy)" in str(other._permanent(kept, "az://b/x"))


def test_a_web_server_without_ranges_is_refused_where_they_are_needed(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    Web.ranges = False
    assert store.read_bytes(f"{web}/x") == DATA
    with pytest.raises(DataError, match="does not support range requests"):
        store.read_range(f"{web}/x", 100, 200)
    Web.ranges, Web.shifted = True, 3
    with pytest.raises(DataError, match=r"asked for 'bytes 100-199' and sent 'bytes 103-\d+/"):
        store.read_range(f"{web}/x", 100, 200)


def test_refusals_and_impossible_servers_are_reported_at_once(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    with pytest.raises(DataError, match="no such object"):
        store.read_bytes(f"{web}/missing")
    with pytest.raises(DataError, match=r"x: the object is shorter than it was; repeat"):
        store.read_range(f"{web}/x", len(DATA), len(DATA) + 10)
    for status, words in ((403, r"access is denied \(.*403.*its words"), (507, "its words.*the store is full")):
        Web.failing = [status] * 2
        with pytest.raises(DataError, match=words) as error:
            store.read_bytes(f"{web}/x?signature=SECRET", QUICK)
        assert str(error.value).count("SECRET") == 1, "only in the address that was given"
    Web.failing, Web.said = [302] * 100, {"Location": f"{web}/x"}
    with pytest.raises(DataError, match="redirects the request in a circle"):
        store.read_bytes(f"{web}/x", QUICK)
    with pytest.raises(DataError, match=r"no-such-host\.invalid"):
        store.read_bytes("http://no-such-host.invalid/x.tar", QUICK)
    Web.failing = [503] * 1000
    with pytest.raises(StoreError, match="503"):
        store.read_bytes(f"{web}/x", QUICK)
    with pytest.raises(DataError, match=r"needs the package gcsfs: pip install 'cascade-t2i\[gs\]'"):
        store.read_bytes("gs://bucket/x")


ON_THE_HUB = """
import json, os, urllib.request
from data_pipeline.common.errors import DataError
from data_pipeline.storage import store
place = "hf://datasets/o/r/data/a.tar"
assert store.expand("hf://datasets/o/r/data") == [place] and store.size(place) == 1000
assert store.read_range(place, 5, 15) == b"5678901234"
assert store.describe([place])[0].etag == store.describe([place] * 5)[0].etag != ""
run = "hf://datasets/o/r/run"
store.write_bytes(f"{run}/1", b"one")
assert not store.create(f"{run}/1", b"x") and store.create(f"{run}/deep/2", b"two")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/fail/412/on/commit").close()  # another has committed meanwhile
store.write_bytes(f"{run}/1", b"one")
assert store.sizes(run) == {"1": 3, "deep": -1} and store.read_bytes(f"{run}/deep/2") == b"two"
lines = [{"key": "header", "value": {}}]
lines += [{"key": "file", "value": {"path": f"run/{n}", "content": "bGF0ZXI="}} for n in (1, 3)]
body = "".join(json.dumps(line) + chr(10) for line in lines).encode()  # as another process would
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/datasets/o/r/commit/main", body).close()
assert (store.size(f"{run}/1"), store.size(f"{run}/3")) == (5, 5)
assert store.read_bytes(f"{run}/1") == store.read_bytes(f"{run}/3") == b"later"
store.remove_files(run, ["3", "missing"])
store.remove(run)
assert not store.exists(run) and store.list_dir(run) == []
for url, words in (("hf://datasets/o/none/x", "repository not found"), (f"{run}/1", "no such object")):
    try:
        store.read_bytes(url)
    except DataError as error:
        assert words in str(error), error
    else:
        raise AssertionError(url)
print("done")
"""


def test_a_repository_of_the_hub_is_listed_read_in_exact_ranges_and_written() -> None:
    with Hub() as hub:
        hub.files["datasets/o/r", "data/a.tar"] = b"0123456789" * 100
        environ = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB], capture_output=True, text=True, env=environ, timeout=120
        )
    assert done.stdout == "done\n", done.stderr
    ranges = [asked for method, path, asked in hub.log if method == "GET" and path.endswith("resolve/main/data/a.tar")]
    assert ranges == ["bytes=5-14"]


@pytest.mark.parametrize(
    ("url", "package", "install"),
    [
        ("gs://bucket/x", "gcsfs", "pip install 'cascade-t2i[gs]'"),
        ("az://container/x", "adlfs", "pip install 'cascade-t2i[az]'"),
        ("abfs://container/x", "adlfs", "pip install 'cascade-t2i[az]'"),
        ("hf://datasets/a/b/x", "huggingface_hub", "pip install huggingface_hub"),
    ],
)
def test_a_scheme_without_its_package_names_what_to_install(
    url: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # makes importing it fail as if it were not installed
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    other._filesystems.clear()
    with pytest.raises(DataError) as error:
        store.read_bytes(url, QUICK)
    assert str(error.value).endswith(f"needs the package {package}: {install}")


def test_a_request_to_a_silent_server_is_given_up_and_repeated(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    stuck, really = [threading.Event()], Web.do_GET

    def silent_once(answer: Web) -> None:
        if stuck:
            stuck.pop().wait(30)
        with suppress(BrokenPipeError):  # the client has given up
            really(answer)

    monkeypatch.setattr(Web, "do_GET", silent_once)
    patience = Patience(stall_s=0.5, deadline_s=60, base_s=0.01, cap_s=0.05)
    event = stuck[0]
    try:
        assert store.read_range(f"{web}/x", 5, 100, patience=patience) == DATA[5:100] and not event.is_set()
    finally:
        event.set()
