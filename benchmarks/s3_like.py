"""A small S3 look-alike for benchmarks: serves a directory with the latency and bandwidth per connection of an object
store. Supports GET with ranges, HEAD, ListObjectsV2 and PUT; does not check signatures.

    python benchmarks/s3_like.py DIRECTORY --latency 0.03 --rate 80e6      (prints its port)
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import socketserver
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_SLICE = 1 << 18


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root = Path()
    latency = 0.03
    rate = 80e6

    def do_GET(self) -> None:
        time.sleep(self.latency)
        url = urlsplit(self.path)
        path = self.root / unquote(url.path).lstrip("/")
        if path.is_dir():
            self._list(path, parse_qs(url.query))
        elif path.is_file():
            self._send(path)
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>not here</Message></Error>")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        time.sleep(self.latency)
        path = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, b"")

    def _send(self, path: Path) -> None:
        size = path.stat().st_size
        begin, end = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            begin, end = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", _etag(path))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        began = time.monotonic()
        with open(path, "rb") as file:
            sent = 0
            while begin + sent < end:
                sent += os.sendfile(
                    self.connection.fileno(), file.fileno(), begin + sent, min(_SLICE, end - begin - sent)
                )
                ahead = sent / self.rate - (time.monotonic() - began)
                if ahead > 0.001:
                    time.sleep(ahead)

    def _list(self, folder: Path, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        entries = "".join(
            f"<Contents><Key>{path.name}</Key><Size>{path.stat().st_size}</Size><ETag>{_etag(path)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for path in sorted(folder.iterdir())
            if path.name.startswith(prefix)
        )
        body = (
            f"<ListBucketResult><Name>{folder.name}</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        )
        self._answer(200, body.encode())

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _etag(path: Path) -> str:
    return f'"{hashlib.md5(f"{path.name}{path.stat().st_size}".encode()).hexdigest()}"'


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def running(folder: Path, latency: float = 0.03, rate: float = 80e6) -> Iterator[str]:
    """Serve the subdirectories of `folder` as buckets from a child process; yield the endpoint.

    Inside the block, the environment of this process points to it.

    Args:
        folder: the directory.
        latency: seconds before each answer.
        rate: bytes per second and connection.
    """
    command = [sys.executable, __file__, str(folder), "--latency", str(latency), "--rate", str(rate)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
    before = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="any",
        AWS_SECRET_ACCESS_KEY="any",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    try:
        yield endpoint
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=80e6, help="bytes per second and connection")
    arguments = parser.parse_args()
    Handler.root, Handler.latency, Handler.rate = arguments.folder, arguments.latency, arguments.rate
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
