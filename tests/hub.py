"""A stand-in for the Hugging Face Hub: as much of its API as huggingface_hub calls to list, read, write and delete.

with Hub() as hub:
    environ["HF_ENDPOINT"] = hub.endpoint      # before huggingface_hub is imported
    hub.files["datasets/o/r", "a.tar"] = b"..."
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = {"id": "c" * 40, "title": "a commit", "date": "2026-01-01T00:00:00.000Z"}


class Hub:
    """A running server with one empty data set and one empty model repository, both called o/r."""

    def __init__(self) -> None:
        self.repositories = {"datasets/o/r", "models/o/r"}
        self.files: dict[tuple[str, str], bytes] = {}
        """(repository, path) -> content."""
        self.log: list[tuple[str, str, str | None]] = []
        """Method, path and range of every request."""
        self.failing: list[int] = []
        """Statuses to answer the next requests with."""
        self.failing_on: dict[str, int] = {}
        """Word in the path -> status of the next answer to such a request."""

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Answers,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, asked = unquote(parts.path).strip("/"), self.headers.get("Range")
        if order := re.fullmatch(r"fail/(\d+)/on/(\w+)", path):  # from a process that has no Hub object
            self.hub.failing_on[order[2]] = int(order[1])
            return self._answer(200, b"{}")
        if due := next((word for word in self.hub.failing_on if word in path.split("/")), ""):
            return self._answer(self.hub.failing_on.pop(due), b"{}")
        self.hub.log.append((self.command, path, asked))
        if self.hub.failing:
            return self._answer(self.hub.failing.pop(0), b"{}")
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.hub.repositories.add(f"models/{name}")
            return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        words = path.removeprefix("api/").split("/")
        words = words if words[0] in ("datasets", "models") else ["models", *words]
        repository, rest = "/".join(words[:3]), words[3:]
        if repository not in self.hub.repositories:
            return self._answer(404, b"{}", "RepoNotFound")
        if path.startswith("api/"):
            return self._api(repository, rest, parse_qs(parts.query), body)
        data = self.hub.files.get((repository, "/".join(rest[2:])))
        if data is None:
            return self._answer(404, b"", "EntryNotFound")
        if not asked:
            return self._answer(200, data)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        self._answer(206, data[int(first) : int(last) + 1 if last else None])

    do_HEAD = do_POST = do_GET

    def _api(self, repository: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        names = sorted(name for one, name in self.hub.files if one == repository)
        if rest[:1] == ["tree"]:
            prefix = "".join(f"{word}/" for word in rest[2:])
            found = [name for name in names if name.startswith(prefix)]
            if prefix and not found:
                return self._answer(404, b"{}", "EntryNotFound")
            deep = query.get("recursive", [""])[0].lower() in ("true", "1")
            below = {name: name[len(prefix) :].split("/") for name in found}
            folders = {
                prefix + "/".join(b[:n]): None for b in below.values() for n in range(1, len(b))[: None if deep else 1]
            }
            files = [name for name in found if deep or len(below[name]) == 1]
            return self._json([*map(self._folder, folders), *(self._file(repository, name) for name in files)])
        if rest[:1] == ["paths-info"]:
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            described = [self._file(repository, name) for name in wanted if name in names]
            folders = {name: None for name in wanted if any(one.startswith(f"{name}/") for one in names)}
            return self._json([*described, *map(self._folder, folders)])
        if rest[:1] == ["preupload"]:
            wanted = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in wanted]
            return self._json({"files": modes})
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                place = repository, line["value"].get("path")
                if line["key"] == "file":
                    self.hub.files[place] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile" and self.hub.files.pop(place, None) is None:
                    return self._answer(404, b"{}", "EntryNotFound")
            return self._json({"commitUrl": f"{self.hub.endpoint}/{repository}/commit/0", "commitOid": COMMIT["id"]})
        self._json({"id": "o/r", "sha": COMMIT["id"], "private": False, "siblings": []})

    def _file(self, repository: str, name: str) -> dict[str, Any]:
        data = self.hub.files[repository, name]
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": oid, "lastCommit": COMMIT}

    def _folder(self, name: str) -> dict[str, Any]:
        return {"type": "directory", "path": name, "size": 0, "oid": "d" * 40, "lastCommit": COMMIT}

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode())

    def _answer(self, status: int, body: bytes, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
