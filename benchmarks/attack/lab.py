"""The real server and the real proxy on loopback, in processes of their own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import randrange
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LIMIT = 10.0  # seconds within which the server must answer
SMALL: dict[str, Any] = {
    "mode": "sdxl-360",
    "prompt": "night over the sea",
    "width": 64,
    "height": 64,
    "num_inference_steps": 1,
    "seed": 1,
}
"""The smallest legal request of the tiny family."""
LONG = SMALL | {"num_inference_steps": 200}

Figures = dict[str, Any]


def free_port() -> int:
    """Return a port that nothing uses, outside the range that clients are given theirs from."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            port = randrange(10_000, 32_000)
            listener.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"still false after {seconds} s")
        time.sleep(0.02)


def client(port: int, source: str = "127.0.0.1") -> httpx2.Client:
    """Return a client of a server on loopback, which calls from an address of its own."""
    transport = httpx2.HTTPTransport(local_address=source)
    return httpx2.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=LIMIT)


@dataclass
class Server:
    """Cog's server in a process of its own."""

    process: "subprocess.Popen[bytes]"
    port: int
    folder: Path  # for its log and all its temporary files

    @cached_property
    def client(self) -> httpx2.Client:
        """Return a client of this server."""
        return client(self.port)

    @cached_property
    def worker(self) -> psutil.Process:
        """Return the process that makes the images."""
        wait_until(self.workers)
        return self.workers()[0]

    def workers(self) -> list[psutil.Process]:
        """Return all of its processes that make images."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if is_worker(process)]

    def status(self) -> str:
        """Return the status in its health document."""
        try:
            return str(self.client.get("/health-check").json()["status"])
        except httpx2.TransportError:
            return "DOWN"

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Wait until there is room for a prediction; Cog needs a moment after an answer."""
        wait_until(lambda: self.status() == "READY", seconds)

    def post(self, inputs: dict[str, Any]) -> httpx2.Response:
        """Wait until there is room, and then make a prediction."""
        self.wait_until_ready()
        return self.client.post("/predictions", json={"input": inputs}, timeout=60)

    def image(self) -> str:
        """Make the small image; return it as a data: URL."""
        return str(self.post(SMALL).json()["output"])

    def log(self) -> str:
        """Return what it has written so far."""
        return (self.folder / "log").read_text()

    @property
    def temporary(self) -> Path:
        """Return the folder of its temporary files."""
        return self.folder / "tmp"


def is_worker(process: psutil.Process) -> bool:
    """Return True for a process in which Cog runs predict.py."""
    with suppress(psutil.NoSuchProcess):
        return "_run_worker" in " ".join(process.cmdline())
    return False


@contextmanager
def serving(*command: str | Path, **environment: str) -> Iterator[Server]:
    """Run a server until the block ends: `script/serve`, or another command."""
    with TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "tmp").mkdir()
        settings = {"PORT": str(port), "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1"}
        # Neither webhooks nor images nor LoRAs from elsewhere.
        dead = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY")}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command or (ROOT / "script" / "serve",),
                env={**os.environ, **settings, **dead, "PANORAMA_LORA_HOSTS": "", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        server = Server(process, port, folder)
        try:
            wait_until(lambda: process.poll() is not None or server.status() == "READY", 240)
            if process.poll() is not None:
                raise RuntimeError(server.log())
            yield server
        finally:
            server.client.close()
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process, by force after a minute, and then whatever is left below it."""
    children = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def nginx_missing() -> str:
    """Return why nginx cannot run deploy/nginx.conf here, or an empty text."""
    nginx = find_nginx()
    if nginx is None:
        return "nginx is not installed"
    with TemporaryDirectory() as name:
        command = [nginx, "-t", "-e", "stderr", "-c", configure(Path(name), 5000, free_port())]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def find_nginx() -> str | None:
    """Return the path of nginx, which Debian keeps where only root looks."""
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


def configure(folder: Path, upstream: int, port: int) -> Path:
    """Write deploy/nginx.conf for these ports and for a user who is not root."""
    text = (DEPLOY / "nginx.conf").read_text()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    for old, new in {
        "server 127.0.0.1:5000;": f"server 127.0.0.1:{upstream};",
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "pid /run/nginx.pid;": f"pid {folder}/pid;",
        "http {": f"http {{\n{paths}",
    }.items():
        if text.count(old) != 1:
            raise ValueError(f"deploy/nginx.conf must have {old!r} once")
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    shutil.copy(DEPLOY / "guard.js", folder)
    return folder / "nginx.conf"


@contextmanager
def proxied(server: Server) -> Iterator[int]:
    """Run nginx with deploy/nginx.conf in front of a server; yield its port."""
    with TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        folder.chmod(0o755)  # its workers are another user
        path = configure(folder, server.port, port)
        command = [find_nginx(), "-e", folder / "log", "-c", path, "-g", "daemon off;"]
        process = subprocess.Popen([str(part) for part in command])
        try:
            with client(port) as probe:
                wait_until(lambda: answers(probe))
            yield port
        finally:
            end(process)


def answers(probe: httpx2.Client) -> bool:
    """Return True if something answers."""
    try:
        probe.get("/health-check")
    except httpx2.TransportError:
        return False
    return True
