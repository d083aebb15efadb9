"""The studio's client of a Cog server, on a server that answers as told."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from panorama.request import Request
from studio.backends import CogServer

PNG = "data:image/png;base64,aW1hZ2U="
Answer = tuple[int, bytes]


@dataclass
class Server:
    """Answers predictions, and knows those that it has begun."""

    port: int = 0
    predict: Callable[[dict[str, Any]], Answer] = lambda body: (200, b"{}")
    begun: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> Answer:
        *_, name, last = path.split("/")
        if last == "cancel":
            if name not in self.begun:
                return 404, b"{}"
            self.cancelled.add(name)
            return 200, b"{}"
        self.bodies.append(json.loads(body))
        return self.predict(self.bodies[-1])


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, b'{"status": "READY"}')

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.reply(*found.answer(self.path, body))

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        found.port = listening.server_port
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield found
        listening.shutdown()
        thread.join()


def make(server: Server, poll: Callable[[], None] = lambda: None) -> bytes:
    backend = CogServer(f"http://127.0.0.1:{server.port}", "http://127.0.0.1:9/events")
    return backend.make(Request(prompt="sea"), lambda *_: None, poll)


def succeeded() -> Answer:
    return 200, json.dumps({"status": "succeeded", "output": PNG}).encode()


def test_a_run_that_stops_before_the_server_has_begun_it_is_cancelled(server: Server) -> None:
    class Stopped(Exception):
        pass

    def predict(body: dict[str, Any]) -> Answer:
        time.sleep(0.5)  # to read it
        server.begun.add(body["id"])
        for _ in range(100):
            if body["id"] in server.cancelled:
                return 200, b'{"status": "canceled"}'
            time.sleep(0.1)
        return succeeded()

    def poll() -> None:
        raise Stopped

    server.predict = predict
    with pytest.raises(Stopped):
        make(server, poll)
    (body,) = server.bodies
    assert server.cancelled == {body["id"]}


def test_behind_a_proxy_that_refuses_webhooks_it_does_without(server: Server) -> None:
    def predict(body: dict[str, Any]) -> Answer:
        if "webhook" in body:
            return 422, b'{"detail": [{"loc": ["body", "webhook"], "msg": "must be left out"}]}'
        return succeeded()

    server.predict = predict
    assert make(server) == b"image"
    assert ["webhook" in body for body in server.bodies] == [True, False]


def test_an_answer_that_is_no_prediction_is_named_by_its_status(server: Server) -> None:
    server.predict = lambda body: (413, b"<html>413 Request Entity Too Large</html>")
    with pytest.raises(ValueError, match="the server answers with 413 Request Entity Too Large"):
        make(server)
