"""A minimal W&B server: it opens and resumes runs, and stores their history."""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ServerRun:
    """A run on the server."""

    project: str
    entity: str
    history: list[dict] = field(default_factory=list)
    config: str = "{}"
    exit_code: int | None = None

    def answer(self, name: str) -> dict:
        return {
            "id": f"bucket-{name}",
            "name": name,
            "displayName": name,
            "description": "",
            "config": self.config,
            "sweepName": None,
            "projectId": "1",
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "logTail": "[]",
            "summaryMetrics": "{}",
            "wandbConfig": json.dumps({"t": 1}),
            "tags": [],
            "project": {"id": "1", "name": self.project, "entity": {"id": "1", "name": self.entity}},
        }


class _Server(ThreadingHTTPServer):
    """HTTP server for clients that are killed in the middle of a request, as some tests do."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class WandbServer:
    """Runs in a thread; `runs` by id."""

    def __init__(self):
        self.runs: dict[str, ServerRun] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._reply({})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                if "/file_stream" in self.path:
                    return self._reply(server._stream(self.path, body))
                self._reply({"data": server._graphql(body["query"], body.get("variables") or {})})

            def do_PUT(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self._reply({})

            def _reply(self, value: dict) -> None:
                text = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self._http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _graphql(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            name = variables.get("name") or variables["id"].removeprefix("bucket-")
            known = name in self.runs
            run = self.runs.setdefault(
                name, ServerRun(variables.get("project") or "", variables.get("entity") or "somebody")
            )
            run.config = variables.get("config") or run.config
            return {"upsertBucket": {"bucket": run.answer(name), "inserted": not known}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "bucket(" in query:
            name = variables.get("name") or variables.get("run")
            run = self.runs.get(name)
            project = run.project if run else variables.get("project")
            entity = {"id": "1", "name": run.entity if run else "somebody"}
            bucket = run.answer(name) if run else None
            return {"model": {"id": "1", "name": project, "entity": entity, "bucket": bucket}}
        viewer = {"id": "1", "entity": "somebody", "username": "somebody", "flags": "{}", "teams": {"edges": []}}
        info = {"cliVersionInfo": {"max_cli_version": "9.9"}, "latestLocalVersionInfo": None, "features": []}
        return {"viewer": viewer, "serverInfo": info}

    def _stream(self, path: str, body: dict) -> dict:
        run = self.runs[re.search(r"/([^/]+)/file_stream", path)[1]]
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        if history:
            rows = [json.loads(line) for line in history["content"]]
            run.history[history["offset"] :] = rows
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {"exitcode": None, "limits": {}}
