"""The real Cog server on loopback, and a client for it."""

import base64
import contextlib
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALLEST = {"prompt": "sunset over green hills", "width": 256, "height": 256, "stride": 16}
QUICK = SMALLEST | {"num_inference_steps": 2, "sync_threshold": 1, "seed": 1}
LONG = SMALLEST | {"num_inference_steps": 200, "seed": 1, "sync_weight": 0.0}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise TimeoutError(f"still false after {seconds} s")


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen
    port: int
    log_path: Path
    statuses: list[str] = field(default_factory=list)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status code and JSON of an answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def predict(self, inputs: dict[str, Any]) -> tuple[int, Any]:
        """Return a prediction that is waited for."""
        self.wait_until_idle()
        return self.call("POST", "/predictions", {"input": inputs})

    def start(self, name: str, inputs: dict[str, Any], webhook: str) -> tuple[int, Any]:
        """Return a prediction that reports to a webhook."""
        self.wait_until_idle()
        body = {"id": name, "input": inputs, "webhook": webhook}
        return self.call("POST", "/predictions", body, Prefer="respond-async")

    def status(self) -> str | None:
        """Health as the server gives it; None before it answers at all."""
        try:
            _, health = self.call("GET", "/health-check")
        except (urllib.error.URLError, ConnectionError):
            return None
        self.statuses.append(health["status"])
        return health["status"]

    def wait_until_idle(self) -> None:
        """Cog may send an answer a moment before it has room for the next prediction."""
        wait_until(lambda: self.status() == "READY")

    def log(self) -> str:
        """Return all that the server has logged."""
        return self.log_path.read_text()


@contextlib.contextmanager
def serving(log_path: Path, **environment: str) -> Iterator[Server]:
    """Yield a server that is ready, and that has ended after the block."""
    port = free_port()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [ROOT / "script" / "serve"],
            env={**os.environ, "PORT": str(port), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, for signals
        )
        server = Server(process, port, log_path)
        try:
            wait_until(lambda: server.status() == "READY" or process.poll() is not None, 120)
            assert process.poll() is None, server.log()
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """One server for every test that leaves it as it was."""
    with serving(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@dataclass
class Webhook:
    """A real HTTP server that keeps what it is sent."""

    url: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first event of this kind, waited for."""
        return wait_until(lambda: next(filter(wanted, list(self.events)), None))

    def last(self) -> dict[str, Any]:
        """Return the event that ends a prediction."""
        return self.event(lambda e: e["status"] in ("succeeded", "failed", "canceled"))


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            hook.events.append(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        hook = Webhook(f"http://127.0.0.1:{httpd.server_port}/")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hook
        httpd.shutdown()
        thread.join()


def png(prediction: dict[str, Any]) -> bytes:
    """Return the file that a prediction answered with."""
    head, _, data = prediction["output"].partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data)


def decoded(prediction: dict[str, Any]) -> Image.Image:
    """Return the image that a prediction answered with."""
    image = Image.open(io.BytesIO(png(prediction)))
    image.load()
    return image
