"""A web server in threads of this process; what each path answers is a function of the request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

Answer = Callable[[Any], None]


class Request(BaseHTTPRequestHandler):
    """One request; it answers by what its server has for the path."""

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        with self.server.turn:
            self.server.asked.append(self.path)
            self.server.headers.append(dict(self.headers))
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            self.server.answers.get(self.path, status(404))(self)
        except OSError:  # whoever asked has gone
            self.close_connection = True
        finally:
            with self.server.turn:
                self.server.busy -= 1

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def reply(self, data: bytes, code: int = 200, **headers: str) -> None:
        """Answer in whole."""
        self.begin(code, **{"Content-Length": str(len(data)), **headers})
        self.wfile.write(data)

    def begin(self, code: int = 200, **headers: str) -> None:
        """Send the status and headers only; underscores stand for hyphens."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def hold(self) -> None:
        """Wait until the server is closed."""
        self.server.closing.wait(60)
        self.close_connection = True


class Web(ThreadingHTTPServer):
    """Listens at `host` until the block ends."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 64
    made: ClassVar[int] = 0

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Request)
        self.host = host
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.turn, self.closing = threading.Lock(), threading.Event()
        self._open: set[Any] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, name="web")

    def url(self, path: str) -> str:
        """Return the address of a path."""
        return f"http://{self.host}:{self.server_port}{path}"

    def put(self, path: str, answer: Answer | bytes) -> str:
        """Let `path` answer; return its address."""
        self.answers[path] = whole(answer) if isinstance(answer, bytes) else answer
        return self.url(path)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join()
        for request in list(self._open):  # that are kept alive
            self.shutdown_request(request)
        self.server_close()


def whole(data: bytes, **headers: str) -> Answer:
    """Answer with `data`."""
    return lambda request: request.reply(data, **headers)


def status(code: int, **headers: str) -> Answer:
    """Answer with a status and nothing else."""
    return lambda request: request.reply(b"", code, **headers)


def redirect(to: str, code: int = 302) -> Answer:
    """Send to another address."""
    return status(code, Location=to)


def in_turn(*answers: Answer) -> Answer:
    """Answer otherwise each time; the last again and again."""
    left = list(answers)

    def answer(request: Request) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(request)

    return answer
