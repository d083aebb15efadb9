"""The tools of docs/operate.md: the health check, the supervisor and the proxy, on loopback."""

import http.server
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.attack import lab, proxy
from panorama.request import INPUTS

from .conftest import Server

ROOT = Path(__file__).parents[2]
HEALTHCHECK = ROOT / "script" / "healthcheck"
SUPERVISE = ROOT / "script" / "supervise"
SERVE = ROOT / "script" / "serve"
BARE = {"PATH": os.environ["PATH"], "HTTP_PROXY": "http://127.0.0.1:9"}  # no PYTHONPATH either


@pytest.fixture
def health() -> Iterator[Callable[[object], int]]:
    """Yield a function that serves a health document and returns the exit status of the check."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health-check" else 404)
            self.end_headers()
            self.wfile.write(documents[-1])

        def log_message(self, *_):
            pass

    documents = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()

        def check(document: object) -> int:
            documents.append(json.dumps(document).encode())
            port = {"PORT": str(server.server_port)}
            return subprocess.run(
                [HEALTHCHECK], env=BARE | port, stdout=subprocess.DEVNULL
            ).returncode

        yield check
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("document", "code"),
    [
        *(({"status": name}, 0) for name in ("STARTING", "READY", "BUSY")),
        *(({"status": name}, 1) for name in ("UNHEALTHY", "DEFUNCT", "SETUP_FAILED", "UNKNOWN")),
        *((document, 1) for document in ({}, [], "READY", None, {"status": None})),
    ],
    ids=str,
)
def test_the_health_check_goes_by_the_document(health, document, code):
    assert health(document) == code


def test_the_health_check_fails_where_nothing_answers():
    url = f"http://127.0.0.1:{lab.free_port()}/health-check"
    done = subprocess.run([HEALTHCHECK, url], env=BARE, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Connection refused" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_the_supervisor_exits_as_the_server_does(command, code):
    assert subprocess.run([SUPERVISE, "sh", "-c", command]).returncode == code


def test_the_supervisor_ends_a_server_that_never_answers(tmp_path):
    script = f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/pid; wait; wait"
    started = time.monotonic()
    environment = os.environ | {"PORT": str(lab.free_port())}
    command = [SUPERVISE, "--patience", "1", "sh", "-c", script]
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == 1
    assert time.monotonic() - started > 10  # it had the time to end by itself
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Return True if a process has ended; where nobody waits for it, it remains as a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.server
def test_the_supervisor_ends_a_server_whose_worker_was_killed():
    command = (SUPERVISE, "--patience", "6", SERVE)
    with lab.serving(*command, PANORAMA_MODES="sdxl-360") as server:
        assert server.image()
        server.worker.kill()
        lab.wait_until(lambda: server.status() == "UNHEALTHY", 10)
        assert server.process.wait(90) == 1
        assert server.status() == "DOWN"
        assert "unhealthy for 6 s" in server.log()


@pytest.mark.server
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_supervisor_passes_a_signal_on(sent, code):
    with lab.serving(SUPERVISE, SERVE, PANORAMA_MODES="sdxl-360") as server:
        worker = server.worker.pid
        server.process.send_signal(sent)
        assert server.process.wait(60) == code
        assert gone(worker)


@pytest.mark.server
@pytest.mark.skipif(bool(lab.nginx_missing()), reason=lab.nginx_missing() or "nginx is there")
def test_the_proxy_withstands_every_attack(monkeypatch):
    monkeypatch.delitem(proxy.RAW, "a body that stops")  # it takes 8 s
    figures = proxy.run(1, 0)
    missed = {
        name: figures[name] for name, goal in proxy.GOALS.items() if not goal.met(figures[name])
    }
    assert not missed, figures


def test_the_proxy_knows_every_input_that_is_a_file():
    text = (ROOT / "deploy" / "guard.js").read_text()
    files = json.loads(re.search(r"^const FILES = (.*);", text, re.MULTILINE)[1])
    assert files == [name for name, rule in INPUTS.items() if rule.kind is Path]


@pytest.mark.server
def test_neither_an_image_nor_a_webhook_passes_by_a_dead_proxy(server: Server):
    """As docs/operate.md advises; `server` has none, and fetches."""
    inputs = lab.SMALL | {"seed": 2}
    with proxy.trap() as (url, seen):
        with lab.serving(PANORAMA_MODES="sdxl-360") as guarded:
            answer = guarded.post(inputs | {"depth_image": url}).json()
            assert answer["status"] == "failed"
            assert "Unable to connect to proxy" in answer["error"]
            guarded.wait_until_ready()
            body = {"input": inputs, "webhook": url}
            answer = guarded.client.post("/predictions", json=body).json()
            assert answer["status"] == "succeeded"
        assert not seen
        server.predict(inputs | {"depth_image": url})
        assert seen == ["/depth.png"]
