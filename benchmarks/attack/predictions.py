"""Predictions in a row: what the largest costs, and what many leave behind."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

import httpx2

from benchmarks.attack.lab import LONG, SMALL, Figures, Server, client, serving, wait_until
from benchmarks.goals import Goal

WORST = {
    "accepted without an estimate in the log": Goal(most=0),
    "from a cancel to the next image: seconds": Goal(most=2),
}
MEMORY = {
    "growth of memory": Goal(most=0.02),
    "growth of open files": Goal(most=0),
    "growth of threads": Goal(most=0),
    "temporary files while it runs": Goal(most=1),
    "temporary files afterwards": Goal(most=0),
    "afterwards another image": Goal(most=0),
}
COSTLY: dict[str, Any] = {
    **{"mode": "syncdiffusion", "prompt": "sea", "width": 16384, "height": 16384, "seed": 1},
    **{"stride": 8, "num_inference_steps": 200, "sync_threshold": 200},
}
"""Refused; the change that the error suggests makes it the largest request that is legal."""


@contextmanager
def started(server: Server, name: str, inputs: dict[str, Any]) -> Iterator[Future[httpx2.Response]]:
    """Start a prediction with this id; yield its answer, which may take minutes."""
    server.wait_until_ready()
    with client(server.port) as other, ThreadPoolExecutor(1) as pool:
        body = {"input": inputs}
        yield pool.submit(other.put, f"/predictions/{name}", json=body, timeout=60)


def worst(count: int, seed: int) -> Figures:
    """Cancel the largest request that is accepted, so many times, after a random time."""
    random = Random(seed)
    with serving() as server:
        advice = suggestion(server)
        inputs, before = COSTLY | advice, len(server.log())
        seconds = []
        for number in range(count):
            with started(server, f"worst-{number}", inputs):
                wait_until(lambda: server.status() == "BUSY")
                time.sleep(random.uniform(0.5, 4))
                began = time.monotonic()
                server.client.post(f"/predictions/worst-{number}/cancel").raise_for_status()
                with suppress(httpx2.TimeoutException):  # after a minute
                    server.image()
                seconds.append(time.monotonic() - began)
            if seconds[-1] > 30:
                break  # it waits behind the one that was cancelled, and so would the next
        log = server.log()[before:].partition("step 1/")[0]
    estimate = re.search(r"\bcost: (\d+)", log)
    return {
        "a legal change of the largest": ", ".join(f"{k}={v}" for k, v in advice.items()),
        "its estimate: evaluations": int(estimate[1]) if estimate else 0,
        "accepted without an estimate in the log": int(not estimate),
        "from a cancel to the next image: seconds": max(seconds),
    }


def suggestion(server: Server) -> dict[str, int]:
    """Return the change that the error of the costliest request suggests."""
    error = server.post(COSTLY).json()["error"]
    found = re.fullmatch(r".* must cost at most \d+ .*; try (.*)", error, re.DOTALL)
    if not found:
        raise ValueError(f"the costliest request was not refused by its cost: {error}")
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", found[1])}


def usage(server: Server) -> tuple[int, int, int]:
    """Return the memory, the open files and the threads of the worker, once it has been idle.

    Tokio, on which Cog runs, keeps a thread without work for ten seconds.
    """
    server.wait_until_ready()
    time.sleep(12)
    worker = server.worker
    return worker.memory_info().rss, worker.num_fds(), worker.num_threads()


def memory(count: int, seed: int) -> Figures:
    """Make so many small images, and cancel and abandon a tenth as many; compare what is in use.

    The first fifth is not counted: allocators grow until they have seen every size.
    """
    random = Random(seed)
    with serving(PANORAMA_MODES=SMALL["mode"]) as server:
        first = server.image()
        for number in range(count):
            if number == count // 5:
                warm = usage(server)
            server.post(SMALL | {"seed": number, "width": random.choice((64, 128, 256))})
            if number % 10 == 3:
                cancel(server, f"cancel-{number}", random.uniform(0, 0.5))
            if number % 10 == 7:
                abandon(server, random.uniform(0.05, 0.5))
        same = server.image() == first
        used = usage(server)
        during = files(server)
        server.process.terminate()
        server.process.wait(60)
        after = files(server)
    return {
        "images": count,
        "megabytes": used[0] / 1e6,
        "growth of memory": used[0] / warm[0] - 1,
        "growth of open files": used[1] - warm[1],
        "growth of threads": used[2] - warm[2],
        "temporary files while it runs": during,
        "temporary files afterwards": after,
        "afterwards another image": int(not same),
    }


def cancel(server: Server, name: str, after: float) -> None:
    """Start a long prediction and cancel it."""
    with started(server, name, LONG):
        time.sleep(after)
        server.client.post(f"/predictions/{name}/cancel")


def abandon(server: Server, after: float) -> None:
    """Start a long prediction and hang up."""
    server.wait_until_ready()
    with client(server.port) as other:
        try:
            other.post("/predictions", json={"input": LONG}, timeout=after)
        except httpx2.TimeoutException:
            return
    raise RuntimeError("a long prediction was answered at once")


def files(server: Server) -> int:
    """Count the files in the server's temporary folder."""
    return sum(path.is_file() for path in server.temporary.rglob("*"))
