"""A W&B backend in one process: as much of GraphQL and of the file stream as wandb's client needs to start, resume and end a run.

It holds what a real one would show: each run's history lines by their place in the history file, and what the run was started with.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

HISTORY_FILE = "wandb-history.jsonl"


@contextmanager
def wandb_without_account(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb sees no key, no settings of the user and no server, and forgets afterwards what it was told."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "wandb-config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()


@dataclass
class StoredRun:
    entity: str
    project: str
    attributes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None

    def history(self) -> list[dict[str, Any]]:
        lines = self.files.get(HISTORY_FILE, {})
        return [json.loads(lines[place]) for place in sorted(lines)]

    def config(self) -> dict[str, Any]:
        return json.loads(self.attributes["config"])


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(*address)


class FakeWandbServer:
    """Use it as a context manager; `url` is for WANDB_BASE_URL.

    condition: "well", "errors" (every answer is HTTP 500), "silent" (requests are taken and never answered) or "no rows" (the file stream
    is HTTP 404); it may change at any time.
    """

    def __init__(self, condition: str = "well") -> None:
        self.condition = condition
        self.runs: dict[str, StoredRun] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if backend.condition == "silent":
                    backend._closed.wait(60)
                    self.close_connection = True
                    return
                if backend.condition == "errors":
                    self._answer(500, {"error": "the server is unwell"})
                    return
                if backend.condition == "no rows" and self.path.endswith("/file_stream"):
                    self._answer(404, {"error": "no such run"})
                    return
                self._answer(200, backend._answer(self.path, body))

            do_GET = do_PUT = do_POST

            def _answer(self, status: int, content: Any) -> None:
                encoded = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeWandbServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def steps(self, run_id: str) -> list[int]:
        """The steps of the run's history in the order of its lines; a step uploaded twice is there twice."""
        return [line["_step"] for line in self.runs[run_id].history()]

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        with self._lock:
            if path.endswith("/graphql"):
                request = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
                answer = getattr(self, f"_{operation}", None)
                return {"data": answer(request.get("variables", {})) if answer else {}}
            if path.endswith("/file_stream"):
                self._take_lines(path.split("/")[-2], json.loads(body))
            return {}

    def _take_lines(self, run_id: str, request: dict[str, Any]) -> None:
        run = self.runs[run_id]
        for name, chunk in request.get("files", {}).items():
            lines = run.files.setdefault(name, {})
            lines.update(enumerate(chunk["content"], start=chunk["offset"]))
        if request.get("complete"):
            run.exit_code = request["exitcode"]

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "someone", "username": "someone", "email": "", "flags": "{}", "teams": {"edges": []}}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        inserted = run_id not in self.runs
        run = self.runs.setdefault(run_id, StoredRun(variables.get("entity") or "someone", variables["project"]))
        run.attributes |= {key: value for key, value in variables.items() if value is not None}
        return {"upsertBucket": {"bucket": self._bucket(run_id), "inserted": inserted}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        entity = {"id": "1", "name": variables.get("entity") or "someone"}
        bucket = self._bucket(run_id) if run_id in self.runs else None
        return {"model": {"id": "1", "name": variables["project"], "entity": entity, "bucket": bucket}}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]

        def lines(name: str) -> list[str]:
            return [line for _, line in sorted(run.files.get(name, {}).items())]

        return {
            "id": f"storage-{run_id}",
            "name": run_id,
            "displayName": run.attributes.get("displayName"),
            "description": None,
            "notes": None,
            "sweepName": None,
            "tags": run.attributes.get("tags", []),
            "config": run.attributes["config"],
            # Without "t" the client takes the run for one that was never started.
            "wandbConfig": json.dumps(run.config()["_wandb"]["value"]),
            "summaryMetrics": (lines("wandb-summary.json") or ["{}"])[-1],
            "historyTail": json.dumps(lines(HISTORY_FILE)[-1:]),
            "eventsTail": json.dumps(lines("wandb-events.jsonl")[-1:]),
            "historyLineCount": len(lines(HISTORY_FILE)),
            "eventsLineCount": len(lines("wandb-events.jsonl")),
            "logLineCount": len(lines("output.log")),
            "project": {"id": "1", "name": run.project, "entity": {"id": "1", "name": run.entity}},
        }
