"""Attacks on Cog's server that deploy/nginx.conf has to keep from it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count as numbers
from random import Random
from typing import Any

import httpx2

from benchmarks.attack.lab import LIMIT, SMALL, Figures, client, proxied, serving
from benchmarks.goals import Goal

GOALS = {
    "answered with another status than expected": Goal(most=0),
    "slowest answer: seconds": Goal(most=LIMIT),
    "fetches of what must not be fetched": Goal(most=0),
    "of 60 at once, answered with 429": Goal(least=30),
    "of 60 at once, answered with neither 400 nor 429": Goal(most=0),
    "afterwards another image": Goal(most=0),
    "of 15 in a row, refused or another image": Goal(most=0),
    "with a dead worker, answers without 503": Goal(most=0),
}

IDS = (
    "a" * 256,
    "a" * 65,
    "a\0b",
    "../../../tmp/x",
    "x/y",
    "..",
    ".",
    "",
    " ",
    "é",
    "a\n",
    7,
    None,
)
ESCAPES = ("a%00b", "..%2f..%2ftmp%2fx")  # nginx itself refuses these, with 400
PATHS = (*ESCAPES, "a" * 256, "%2e%2e", "%20", "%C3%A9", "a%0a", "a%0aX-Y:%20z", "a/b")


@dataclass(frozen=True)
class Attack:
    """A request, and the status that it must be answered with."""

    name: str
    code: int
    method: str = "POST"
    path: str = "/predictions"
    body: Any = None  # bytes, or what becomes JSON

    def content(self) -> bytes:
        """Return the body."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def send(self, client: httpx2.Client) -> int:
        """Send it and return the status of the answer."""
        headers = {"Content-Type": "application/json"}
        return client.request(
            self.method, self.path, content=self.content(), headers=headers
        ).status_code


def attacks(url: str) -> list[Attack]:
    """Return all attacks; `url` is an address that nothing may fetch."""
    files: tuple[object, ...] = (
        *(url, url.upper(), f" {url}", f"//{url}", "http://169.254.169.254/", "file:///etc/passwd"),
        *("/etc/passwd", "ftp://127.0.0.1/", "", [url], {"url": url}, 1, None),
    )
    small = {"input": SMALL}
    twice = json.dumps({"input": SMALL | {"depth_image": "data:,"}})[:-2].encode()
    return [
        *(Attack(f"id {name!r:.20}", 422, body=small | {"id": name}) for name in IDS),
        *(
            Attack(
                f"{method} {path:.20}{end}", 400 if path in ESCAPES else 404, method, place, small
            )
            for path in PATHS
            for method, end in (("PUT", ""), ("POST", "/cancel"))
            for place in (f"/predictions/{path}{end}",)
        ),
        *(
            Attack(f"file {file!r:.30}", 422, body={"input": SMALL | {"depth_image": file}})
            for file in files
        ),
        Attack("a file twice", 422, body=twice + b', "depth_image": "' + url.encode() + b'"}}'),
        Attack("another id", 422, "PUT", "/predictions/one", small | {"id": "two"}),
        Attack("a webhook", 422, body=small | {"webhook": url}),
        Attack("an upload", 422, body=small | {"output_file_prefix": url}),
        Attack("no inputs", 422, body={}),
        Attack("inputs in a list", 422, body={"input": [SMALL]}),
        Attack("a list", 422, body=[small]),
        Attack("no JSON", 400, body=b"{"),
        Attack("nothing", 400, body=b""),
        Attack("no UTF-8", 400, body=b"\xff\xfe\x00"),
        Attack("nested lists", 400, body=b"[" * 1_000_000),
        Attack("nested objects", 400, body=b'{"input":' * 100_000),
        Attack("40 MB", 413, body=b" " * 40_000_000),
        Attack("shutdown", 404, path="/shutdown"),
        Attack("training", 404, path="/trainings", body=small),
        Attack("a folder above", 404, path="/predictions/%2e%2e/shutdown"),
        Attack("delete", 403, "DELETE"),
        Attack("post to an id", 403, path="/predictions/one", body=small),
    ]


RAW = {
    "two lengths": (400, b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a body that stops": (0, b'Content-Length: 100\r\n\r\n{"input":'),
    "a negative length": (400, b"Content-Length: -1\r\n\r\n"),
    "a long header": (400, b"X: " + b"a" * 100_000 + b"\r\n\r\n"),
}
"""Requests that no client sends: the status of the answer, or 0 for a connection that nginx closes;
and what follows the first lines."""


def send_raw(port: int, rest: bytes, source: str) -> int:
    """Send a request byte by byte as given; return the status, or 0 if there is none."""
    address, seconds = ("127.0.0.1", port), LIMIT
    with socket.create_connection(address, seconds, source_address=(source, 0)) as connection:
        connection.sendall(b"POST /predictions HTTP/1.1\r\nHost: a\r\n" + rest)
        answer = connection.recv(100)
    return int(answer.split()[1]) if answer else 0


@contextmanager
def trap() -> Iterator[tuple[str, list[str]]]:
    """Serve on loopback what must not be fetched; yield its URL, and a list of who came."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/depth.png", seen
        server.shutdown()
        thread.join()


def flood(port: int, source: str, count: int = 60) -> list[int]:
    """Send requests all at once from one address; return the statuses."""
    with client(port, source) as one, ThreadPoolExecutor(count) as pool:
        return list(
            pool.map(lambda _: one.post("/predictions", content=b"{").status_code, range(count))
        )


def run(count: int, seed: int) -> Figures:
    """Send every attack so many times, in random order; then kill the worker."""
    # Each attack comes from its own address, or the limit of the rate would answer for the others.
    sources = (f"127.{n >> 16 & 255 | 1}.{n >> 8 & 255}.{n & 255}" for n in numbers(1))
    wrong: list[str] = []
    slowest = 0.0
    # Without the dead proxies: only nginx may stand between a URL and the server.
    with (
        trap() as (url, seen),
        serving(HTTP_PROXY="", HTTPS_PROXY="", PANORAMA_MODES=SMALL["mode"]) as server,
        proxied(server) as port,
    ):
        before = server.image()
        chosen: list[Attack | str] = [*attacks(url), *RAW] * count
        Random(seed).shuffle(chosen)
        for attack in chosen:
            started = time.monotonic()
            try:
                if isinstance(attack, str):
                    name, (code, rest) = attack, RAW[attack]
                    found: Any = send_raw(port, rest, next(sources))
                else:
                    name, code = attack.name, attack.code
                    with client(port, next(sources)) as one:
                        found = attack.send(one)
            except (httpx2.TransportError, OSError) as error:
                found = repr(error)
            slowest = max(slowest, time.monotonic() - started)
            if found != code:
                wrong.append(f"{name}: {found}, not {code}")
        flooded = flood(port, next(sources))
        same = server.image() == before
        with client(port, next(sources)) as one:
            # Within the burst. Cog itself refuses some that follow at once.
            images = [
                one.post("/predictions", json={"input": SMALL}, timeout=60) for _ in range(15)
            ]
            server.worker.kill()
            time.sleep(0.5)
            dead = [
                one.post("/predictions", json={"input": SMALL}).status_code,
                one.get("/health-check").status_code,
            ]
    return {
        "attacks": len(chosen),
        "answered with another status than expected": len(wrong),
        "those": "; ".join(wrong[:5]) or "none",
        "slowest answer: seconds": slowest,
        "fetches of what must not be fetched": len(seen),
        "of 60 at once, answered with 429": flooded.count(429),
        "of 60 at once, answered with neither 400 nor 429": sum(
            c not in (400, 429) for c in flooded
        ),
        "afterwards another image": int(not same),
        "of 15 in a row, refused or another image": sum(
            image.json().get("output") != before for image in images
        ),
        "with a dead worker, answers without 503": sum(code != 503 for code in dead),
    }
