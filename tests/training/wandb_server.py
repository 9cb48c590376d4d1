"""Enough of W&B's HTTP interface to receive runs: GraphQL, the stream of metrics, and files."""

from __future__ import annotations

import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FILES = {"history": "wandb-history.jsonl", "summary": "wandb-summary.json", "events": "wandb-events.jsonl"}


class WandbServer:
    """A server on this machine; `runs` holds what it has received."""

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.failing = 0
        """The status of all responses to requests with data, unless it is 0."""
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self}))
        self._http.daemon_threads = True
        self.port = int(self._http.server_address[1])
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def env(self) -> dict[str, str]:
        """Variables for programs that should use it."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}

    def stop(self) -> None:
        """From now on connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def steps(self, run: str) -> list[int]:
        """The steps of the lines of metrics that a run has, in order of arrival."""
        lines = [json.loads(line) for _, line in sorted(self.runs[run]["history"].items())]
        return [line["_step"] for line in lines if "loss" in line]

    # ------------------------------------------------------------------------------------------------- answers

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else ""
        if name == "Viewer":
            return {"viewer": {"id": "1", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            return {"model": {**project, "bucket": self._bucket(variables["name"])}}
        if name == "UpsertBucket":
            new = variables["name"] not in self.runs
            run = self._run(variables["name"])
            run["config"] = variables.get("config") or run["config"]
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": new}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"http://127.0.0.1:{self.port}/upload/{file}"}
                for file in variables["files"]
            ]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return {}

    def stream(self, run: str, data: dict[str, Any]) -> None:
        own = self._run(run)
        for file, sent in (data.get("files") or {}).items():
            if file == FILES["history"]:
                for place, line in enumerate(sent["content"], sent["offset"]):
                    own["history"][place] = line
            elif file == FILES["summary"]:
                own["summary"] = sent["content"][-1]
        if "exitcode" in data:
            own["exit_codes"].append(data["exitcode"])

    def _run(self, name: str) -> dict[str, Any]:
        return self.runs.setdefault(name, {"history": {}, "summary": "{}", "config": "{}", "exit_codes": []})

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        lines = [line for _, line in sorted(run["history"].items())]
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "me"}}
        counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
        tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]"}
        rest = {"summaryMetrics": run["summary"], "config": run["config"], "wandbConfig": '{"t": 1}', "tags": []}
        names = {"id": name, "name": name, "displayName": name, "description": "", "notes": "", "sweepName": None}
        return {**names, **counts, **tails, **rest, "project": project}


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.owner.failing:
            return self._answer({"errors": [{"message": "refused"}]}, self.owner.failing)
        if not self.path.endswith(("/graphql", "/file_stream")):  # telemetry
            return self._answer({})
        data = json.loads(sent or b"{}")
        if self.path == "/graphql":
            return self._answer({"data": self.owner.graphql(data["query"], data.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            self.owner.stream(self.path.split("/")[-2], data)
        self._answer({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
