"""Other schemes through fsspec: its memory store, and a web server with ranges, one without, one that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from data_pipeline import ShardStream
from data_pipeline.common.errors import DataError, StoreError
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import other, store
from data_pipeline.storage.folder import open_folder
from data_pipeline.storage.retry import Patience
from tests.data_pipeline.small_shards import write_shards

QUICK = Patience(stall_s=1, deadline_s=2, base_s=0.01, cap_s=0.05)
DATA = bytes(range(251)) * 100
OPTIONS: dict[str, Any] = {"seed": 1, "global_batch": 8, "lanes": 4, "window": 8, "stop": 48}


class Web(SimpleHTTPRequestHandler):
    """A server of files that answers ranges, as object stores do, unless told otherwise."""

    ranges = True
    failing: list[int] = []  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if Web.failing:
            self.send_error(Web.failing.pop(0))
            return
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not (Web.ranges and wanted and path.is_file()):
            super().do_GET()
            return
        data = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        body = data[int(first) : int(last) + 1 if last else len(data)]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    Web.ranges, Web.failing = True, []
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where the indexes go: the server is read only
    write_shards(tmp_path / "web", [9, 7, 8])
    expected = order(str(tmp_path / "web"))
    for path in (tmp_path / "web").glob("*.parquet"):
        path.unlink()
    Web.failing = [503, 500]
    assert order([f"{web}/{n:05d}.tar" for n in range(3)]) == expected
    assert order(f"{web}/{{00000..00002}}.tar") == order(web + "/") == expected
    with pytest.raises(DataError, match="is read-only"):
        store.write_bytes(f"{web}/x", b"x")


def test_a_web_server_without_ranges_is_refused_where_they_are_needed(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    Web.ranges = False
    assert store.read_bytes(f"{web}/x") == DATA
    with pytest.raises(DataError, match="does not support range requests"):
        store.read_range(f"{web}/x", 100, 200)


def test_what_a_server_refuses_or_cannot_be_is_told_at_once(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    with pytest.raises(DataError, match="no such object"):
        store.read_bytes(f"{web}/missing")
    with pytest.raises(DataError, match=r"no-such-host\.invalid"):
        store.read_bytes("http://no-such-host.invalid/x.tar", QUICK)
    Web.failing = [503] * 1000
    with pytest.raises(StoreError, match="503"):
        store.read_bytes(f"{web}/x", QUICK)
    with pytest.raises(DataError, match=r"needs the package gcsfs: pip install 'cascade-t2i\[gs\]'"):
        store.read_bytes("gs://bucket/x")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as listing and reading one data set need."""

    content = b"0123456789" * 100
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            asked = self.headers.get("Range")
            first, last = map(int, asked.split("=")[1].split("-")) if asked else (0, len(self.content) - 1)
            if self.command == "GET":
                self.ranges.append(asked)
            return self._answer(206 if asked else 200, self.content[first : last + 1])
        if "/tree/" in self.path:
            return self._json([{"type": "file", "path": "data/a.tar", "size": len(self.content), "oid": "f" * 40}])
        self._json({"id": "o/r", "sha": "c" * 40, "private": False, "siblings": []})

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Says nothing."""


def test_a_data_set_of_the_hub_is_listed_and_read_in_exact_ranges() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = """
from data_pipeline.storage import store
place = "hf://datasets/o/r/data/a.tar"
assert store.expand("hf://datasets/o/r/data") == [place] and store.size(place) == 1000
print(store.read_range(place, 5, 15).decode())
"""
    environ = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ)
    server.shutdown()
    assert done.stdout == "5678901234\n", done.stderr
    assert Hub.ranges == ["bytes=5-14"]


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
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails as where it is not installed
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    other._filesystems.clear()
    with pytest.raises(DataError) as error:
        store.read_bytes(url, QUICK)
    assert str(error.value).endswith(f"needs the package {package}: {install}")
