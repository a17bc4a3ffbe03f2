"""A hub on loopback: takes the requests by which huggingface_hub makes a repository and commits files to it."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """A running hub.

    Attributes:
        repositories: By name: whether it is private, and its files.
        tokens: The tokens of the requests.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.tokens: set[str] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def reply(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a request."""
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content['organization']}/{content['name']}" if content.get("organization") else content["name"]
            is_private = content.get("visibility") == "private" or bool(content.get("private"))  # by its version
            self.repositories.setdefault(name, (is_private, {}))
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        match = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert match is not None, path
        if match[2] == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.repositories[match[1]][1][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"{self.url}/{match[1]}/commit/0", "commitOid": "0" * 40}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("authorization", ""))
                body = self.rfile.read(int(self.headers["content-length"])) if "content-length" in self.headers else b""
                content = json.dumps(hub.reply(self.path.partition("?")[0], body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def start(self) -> None:
        """Serves in a thread."""
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs within the block."""
    server = Hub()
    server.start()
    try:
        yield server
    finally:
        server.close()
