"""A hub on loopback that the real client talks to: repositories at commits, and a plain server.

It speaks what huggingface_hub asks of `/{repository}/resolve/{revision}/{file}`: X-Repo-Commit and
ETag; for large files X-Linked-ETag, X-Linked-Size and a redirect to another host, and for small
ones a redirect on the same host.
"""

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

from huggingface_hub.utils.sha import git_hash

CHUNK = 1 << 14
LARGE = (".safetensors", ".pti")
SMALL_PATH, LARGE_PATH = "/api/resolve-cache", "/large"
"""The paths that redirects lead to."""


@dataclass
class Fault:
    """A fault of a file.

    Attributes:
        methods: Requests that it befalls.
        times: How often.
        status: In place of 200.
        headers: Besides the usual ones.
        change: Of the content.
        honest: True if size and ETag stay those of the unchanged content.
        cut: Bytes after which the connection breaks.
        hang_up: True to end the connection without an answer.
        hold: Event to wait for before the answer.
        stall: Seconds of silence before the connection breaks.
        delay: Seconds before the answer.
    """

    methods: tuple[str, ...] = ("GET",)
    times: float = inf
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] = lambda content: content
    honest: bool = True
    cut: int | None = None
    hang_up: bool = False
    hold: threading.Event | None = None
    stall: float = 0
    delay: float = 0


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """A hub that serves files, injects faults and records requests."""

    url: str = ""
    other_url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    expired_tokens: set[str] = field(default_factory=set)
    pause: float = 0
    requests: list[Request] = field(default_factory=list)

    def add(self, repository: str, files: Mapping[str, bytes], commit: str = "a" * 40) -> None:
        """Add a commit with all its files, the newest from now on."""
        self.repositories.setdefault(repository, {})[commit] = dict(files)
        self.newest[repository] = commit

    def asked(self, method: str, name: str) -> list[Request]:
        """Return the requests for a file."""
        return [r for r in self.requests if r.method == method and r.path.endswith(name)]

    def fault(self, method: str, path: str) -> Fault:
        """Return what goes wrong with a request."""
        for name, fault in self.faults.items():
            if path.endswith(name) and method in fault.methods and fault.times > 0:
                fault.times -= 1
                return fault
        return Fault()


def wait(seconds: float) -> None:
    """Sleep, even where a test has replaced time.sleep to hurry a client."""
    threading.Event().wait(seconds)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def log_message(self, *_: Any) -> None:
        pass

    def serve(self) -> None:
        self.hub.requests.append(
            Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        )
        fault = self.hub.fault(self.command, self.path)
        wait(fault.delay)
        if fault.hold:
            fault.hold.wait(60)
        if fault.hang_up:
            self.close_connection = True
            return None
        if self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.expired_tokens:
            message = "Invalid credentials in Authorization header"
            return self.reply(401, {"X-Error-Message": message})
        if fault.status is not None:
            return self.reply(fault.status, fault.headers)
        path = self.path.removeprefix(LARGE_PATH).removeprefix(SMALL_PATH)
        repository, resolve, rest = path.strip("/").partition("/resolve/")
        if not resolve:
            content = self.hub.plain.get(self.path.strip("/"))
            return self.reply(404, {}) if content is None else self.send_file(content, {}, fault)
        revision, _, name = rest.partition("/")
        commit = self.hub.newest.get(repository, "") if revision == "main" else revision
        files = self.hub.repositories.get(repository, {}).get(commit)
        if files is None or name not in files:
            kinds = {True: "EntryNotFound", False: "RevisionNotFound"}
            error = (
                "RepoNotFound" if repository not in self.hub.newest else kinds[files is not None]
            )
            return self.reply(404, {"X-Error-Code": error, "X-Repo-Commit": commit})
        self.send_repository_file(name, files[name], commit, fault)

    def send_repository_file(self, name: str, content: bytes, commit: str, fault: Fault) -> None:
        claimed = content if fault.honest else fault.change(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(claimed)}"', **fault.headers}
        if self.path.startswith((SMALL_PATH, LARGE_PATH)):
            return self.send_file(content, headers, fault)
        if not name.endswith(LARGE):
            return self.reply(307, {**headers, "Location": SMALL_PATH + self.path})
        digest = hashlib.sha256(claimed).hexdigest()
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(claimed))}
        location = {"Location": f"{self.hub.other_url}{LARGE_PATH}{self.path}"}
        self.reply(302, {**headers, **linked, **location, **fault.headers})

    def send_file(self, content: bytes, headers: Mapping[str, str], fault: Fault) -> None:
        content = fault.change(content)
        status, begin = 200, 0
        asked = self.headers.get("Range")
        if asked:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(content):
                return self.reply(416, {})
            status = 206
            headers = {
                **headers,
                "Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}",
            }
        self.reply(status, headers, content[begin:], fault.cut, fault.stall)

    def reply(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes = b"",
        cut: int | None = None,
        stall: float = 0,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_slowly(body[:cut])
            wait(stall)
        if cut is not None:
            self.close_connection = True

    def send_slowly(self, body: bytes) -> None:
        try:
            for start in range(0, len(body), CHUNK):
                self.wfile.write(body[start : start + CHUNK])
                wait(self.hub.pause)
        except ConnectionError:
            self.close_connection = True  # the client went away, as those that are killed do


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignore errors: clients of these tests go away."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a hub that serves while the block runs."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with QuietServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        hub.other_url = f"http://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
