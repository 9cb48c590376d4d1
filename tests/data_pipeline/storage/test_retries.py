"""The packages for gs:// and az:// repeat no request themselves. These tests need gcsfs and adlfs, which are
optional."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_pipeline.common.errors import StoreError
from data_pipeline.storage import other, retry, store
from data_pipeline.storage.retry import Patience

QUICK = Patience(stall_s=5, deadline_s=0, base_s=0.01, cap_s=0.05)
"""Gives up after the first failure."""


class Failing(BaseHTTPRequestHandler):
    """A store that always fails."""

    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        Failing.asked.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_GET


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    account = f"AccountName=dev;AccountKey=a2V5;BlobEndpoint={address}/dev;DefaultEndpointsProtocol=http"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)
    monkeypatch.setattr(other, "_filesystems", {})
    monkeypatch.setattr(retry, "FILE_S", 0.0)
    Failing.asked.clear()
    yield address
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(("package", "scheme"), [("gcsfs", "gs"), ("adlfs", "az")])
@pytest.mark.parametrize("way", ["read", "size"])
def test_a_failing_store_is_asked_once_per_attempt(server: str, package: str, scheme: str, way: str) -> None:
    pytest.importorskip(package)
    url = f"{scheme}://bucket/a.tar"
    with pytest.raises(StoreError, match=f"{url}.*in 1 attempt") as caught:
        store.read_range(url, 0, 9, patience=QUICK) if way == "read" else store.size(url, QUICK)
    assert len(Failing.asked) == 1, Failing.asked
    assert "TimeoutError" not in str(caught.value), "what the store said, not a wait for the package's next attempt"


@pytest.mark.parametrize(("package", "scheme"), [("gcsfs", "gs"), ("adlfs", "az")])
def test_a_version_whose_retries_cannot_be_switched_off_is_named(
    package: str, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        other._switch_retries_off(object(), package)
    assert f"{package}: its own retries cannot be switched off in this version" in caplog.text
