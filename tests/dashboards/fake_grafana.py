"""A fake of Grafana's HTTP API: what `jenga dashboards push` uses of it, kept in memory.  It is no Grafana.

It answers as Grafana 11's documentation says: who may do what, which status, which fields; dashboards get an id and a
version number, which a push must not take for a change.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = {"admin-token": "Admin", "editor-token": "Editor", "viewer-token": "Viewer"}


@dataclass
class FakeGrafana:
    """Its state, and what was written to it."""

    version: str = "11.6.0"
    prefix: str = ""
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasources: dict[str, dict[str, Any]] = field(default_factory=dict)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def answer(self, method: str, path: str, role: str | None, body: Any) -> tuple[int, Any]:
        """Status and JSON of one request."""
        if path == "/api/health":
            return 200, {"commit": "fake", "database": "ok", "version": self.version}
        if role is None:
            return 401, {"message": "Invalid API key"}
        kind, _, rest = path.removeprefix("/api/").partition("/")
        if kind == "datasources":
            return self._datasource(method, rest.removeprefix("uid/"), role, body)
        if method != "GET" and role == "Viewer":
            return 403, {"message": "You'll need additional permissions to perform this action"}
        if kind == "folders":
            return self._folder(method, rest, body)
        if kind == "dashboards":
            return self._dashboard(method, rest, body)
        return 404, {"message": "Not found"}

    def _folder(self, method: str, uid: str, body: Any) -> tuple[int, Any]:
        if method == "GET":
            return (200, self.folders[uid]) if uid in self.folders else (404, {"message": "folder not found"})
        self.writes.append(f"{method} folder {body['uid']}")
        self.folders[body["uid"]] = {"id": len(self.folders) + 1, **body}
        return 200, self.folders[body["uid"]]

    def _datasource(self, method: str, uid: str, role: str, body: Any) -> tuple[int, Any]:
        if method != "GET" and role != "Admin":
            return 403, {"message": "You'll need additional permissions: datasources:create"}
        if method == "GET":
            known = self.datasources.get(uid)
            return (200, known) if known else (404, {"message": "Data source not found"})
        self.writes.append(f"{method} datasource {body['uid']}")
        if method == "POST" and any(d["name"] == body["name"] for d in self.datasources.values()):
            return 409, {"message": "data source with the same name already exists"}
        self.datasources[body["uid"]] = {"id": 1, "readOnly": False, **body}
        return 200, {"datasource": self.datasources[body["uid"]], "message": "done"}

    def _dashboard(self, method: str, rest: str, body: Any) -> tuple[int, Any]:
        if method == "GET":
            known = self.dashboards.get(rest.removeprefix("uid/"))
            return (200, known) if known else (404, {"message": "Dashboard not found"})
        page = body["dashboard"]
        known = self.dashboards.get(page["uid"])
        if known and not body.get("overwrite"):
            return 412, {"message": "The dashboard has been changed by someone else", "status": "version-mismatch"}
        if body["folderUid"] not in self.folders:
            return 400, {"message": "folder not found"}
        self.writes.append(f"{method} dashboard {page['uid']}")
        version = known["dashboard"]["version"] + 1 if known else 1
        stored = {**page, "id": 7, "version": version}
        self.dashboards[page["uid"]] = {"dashboard": stored, "meta": {"folderUid": body["folderUid"]}}
        return 200, {"uid": page["uid"], "status": "success", "version": version}


@contextmanager
def serve(answer: Any, prefix: str = "") -> Iterator[int]:
    """An HTTP server on the loopback that answers JSON by `answer(method, path, role, body)`; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not self.path.startswith(f"{prefix}/api/"):
                self._send(404, b"<html>not here</html>", "text/html")
                return
            status, data = answer(self.command, self.path.removeprefix(prefix), TOKENS.get(token), body)
            self._send(status, json.dumps(data).encode(), "application/json")

        def _send(self, status: int, data: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _reply  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running(**options: Any) -> Iterator[FakeGrafana]:
    """A fake Grafana that listens."""
    grafana = FakeGrafana(**options)
    with serve(grafana.answer, grafana.prefix) as port:
        grafana.port = port
        yield grafana
