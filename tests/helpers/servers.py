"""A server on loopback that speaks the OpenAI protocol over real sockets, and misbehaves as a test tells it."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """A received request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None
    number: int
    """How many requests for an answer came before it."""

    @property
    def question(self) -> str:
        """The content of the last message."""
        return self.body["messages"][-1]["content"]


@dataclass
class Reply:
    """A response to a request.

    Args:
        content: The body, or what becomes it as JSON.
        status: HTTP status.
        headers: Further headers.
        cut: Bytes that are promised and not sent.
        hang: Whether nothing is sent before the server closes.
        drip: Seconds between two bytes of the body.
        reset: Whether the connection is reset instead.
        raw: Pieces that are sent instead of a status line, headers and body, 20 ms apart, until the client goes.
    """

    content: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    hang: bool = False
    drip: float = 0.0
    reset: bool = False
    raw: Iterable[bytes] | None = None


Behaviour = Callable[[Request], Reply]


def chat(text: str | None, finish: str = "stop", model: str = "strong") -> Reply:
    """An answer of `/chat/completions`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Reply({"id": "x", "object": "chat.completion", "model": model, "choices": [choice]})


def completion(text: str, finish: str = "stop", model: str = "strong", **choice: Any) -> Reply:
    """An answer of `/completions`."""
    return Reply({"model": model, "choices": [{"index": 0, "text": text, "finish_reason": finish} | choice]})


def echo(request: Request) -> Reply:
    """Answers with the question."""
    return chat(f"You ask: {request.question}")


class Server:
    """A running server.

    Args:
        behaviour: Gives the reply to each request for an answer.
        served: Names of the models that it lists; None has no such list.
        owner: Who owns them.
    """

    def __init__(self, behaviour: Behaviour, served: tuple[str, ...] | None, owner: str) -> None:
        self.behaviour, self.served, self.owner = behaviour, served, owner
        self.requests: list[Request] = []
        self.listed: list[Request] = []
        self.most_at_once = 0
        self.closing = threading.Event()
        self._lock, self._now = threading.Lock(), 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def questions(self) -> list[str]:
        """The received questions, in order."""
        return [request.question for request in self.requests]

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def _models(self) -> Reply:
        if self.served is None:
            return Reply({"detail": "Not Found"}, 404)
        return Reply({"object": "list", "data": [{"id": name, "owned_by": self.owner} for name in self.served]})

    def _reply_to(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            self.listed.append(request)
            return self._models()
        with self._lock:
            request.number = len(self.requests)
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.behaviour(request)
        finally:
            with self._lock:
                self._now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # 40 ms for each answer otherwise

            def do_GET(self) -> None:
                self._serve(None)

            def do_POST(self) -> None:
                self._serve(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _serve(self, body: dict[str, Any] | None) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                with contextlib.suppress(ConnectionError):  # the client may have gone
                    self._send(server._reply_to(Request(self.path, headers, body, -1)))

            def _send(self, reply: Reply) -> None:
                if reply.hang:
                    server.closing.wait(30)
                if reply.reset or reply.hang:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                for piece in reply.raw or ():
                    self.wfile.write(piece)
                    if server.closing.wait(0.02):
                        break
                if reply.raw is not None:
                    self.close_connection = True
                    return
                content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
                self.send_response(reply.status)
                for name, value in (reply.headers | {"Content-Length": str(len(content) + reply.cut)}).items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in content if reply.drip else ():
                    self.wfile.write(bytes([byte]))
                    if server.closing.wait(reply.drip):
                        return
                self.wfile.write(b"" if reply.drip else content)
                self.close_connection = self.close_connection or bool(reply.cut)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(
    behaviour: Behaviour = echo, served: tuple[str, ...] | None = ("strong",), owner: str = "someone"
) -> Iterator[Server]:
    """A server that runs until the block is left."""
    server = Server(behaviour, served, owner)
    server.start()
    try:
        yield server
    finally:
        server.close()


def first(count: int, reply: Callable[[], Reply], then: Behaviour = echo) -> Behaviour:
    """A behaviour that sends `reply` to the first `count` requests."""
    return lambda request: reply() if request.number < count else then(request)


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
