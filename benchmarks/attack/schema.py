"""Requests that schemathesis makes from the server's own OpenAPI document."""

import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.core import NotSet

from benchmarks.attack.lab import LIMIT, ROOT, Figures, Server, serving
from benchmarks.goals import Goal

GOALS = {
    "requests": Goal(least=5000),
    "answers of 5xx, or none": Goal(most=0),
    "slowest answer: seconds": Goal(most=LIMIT),
    "deaths of the worker": Goal(most=0),
    "afterwards another image": Goal(most=0),
}
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
CHEAP: dict[str, dict[str, Any]] = {
    "width": {"default": 256, "maximum": 256, "multipleOf": 64},
    "height": {"default": 256, "maximum": 256, "multipleOf": 64},
    "num_inference_steps": {"default": 1, "maximum": 1},
    "upscale": {"default": 1, "maximum": 2},
}
"""Limits that keep a legal image quick to make; otherwise a few would take most of the time."""
LARGEST = 16384
"""Sizes above it are not legal, and cost nothing."""


def document() -> dict[str, Any]:
    """Return the document with short images alone, and without ids.

    Cog does not recover from some ids: they are part of the attacks on the proxy.
    """
    raw = json.loads((ROOT / ".cog" / "openapi_schema.json").read_text())
    schemas = copy.deepcopy(raw["components"]["schemas"])
    del schemas["PredictionRequest"]["properties"]["id"]
    schemas["PredictionRequest"]["required"] = ["input"]
    for name, limits in CHEAP.items():
        schemas["Input"]["properties"][name] |= limits
    schemas["Input"]["properties"]["prompt"]["minLength"] = 1  # most would be empty, and refused
    raw["components"]["schemas"] = schemas
    raw["paths"] = {"/predictions": raw["paths"]["/predictions"]}
    return dict(raw)


def cheap(body: Any) -> Any:
    """Return a body whose image is short, if it is legal at all, and which has no id."""
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if name not in ("id", "webhook")}
    if isinstance(inputs := body.get("input"), dict):
        body["input"] = inputs | {
            name: at_most(inputs.get(name), limits) for name, limits in CHEAP.items()
        }
    return body


def at_most(value: Any, limits: dict[str, Any]) -> Any:
    """Return a value, or its default if it is left out, or its maximum if it is more and legal."""
    if value is None:
        return limits["default"]
    return limits["maximum"] if limits["maximum"] < number(value) <= LARGEST else value


def number(value: Any) -> float:
    """Return the number that Cog reads a value as, 0 if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0


def encoded(body: Any) -> bytes:
    """Return the bytes of a body, which may be none, or bytes that are no JSON."""
    if isinstance(body, NotSet):
        return b""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def send(server: Server, body: Any) -> tuple[int, float]:
    """Send a body when there is room; return the status, or 0 for none, and the seconds."""
    server.wait_until_ready()
    started = time.monotonic()
    try:
        content = encoded(body)
        headers = {"Content-Type": "application/json"}
        code = server.client.post("/predictions", content=content, headers=headers).status_code
    except httpx2.TransportError:
        code = 0
    return code, time.monotonic() - started


def fuzz(mode: GenerationMode, count: int, seed: int, attack: Callable[[Any], None]) -> None:
    """Call a function with so many bodies that are legal by the document, or not."""
    operation = schemathesis.openapi.from_dict(document())["/predictions"]["POST"]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def each(case: Any) -> None:
        attack(cheap(case.body))

    each()


def run(count: int, seed: int) -> Figures:
    """Send so many requests, half of them legal by the document and half not."""
    codes: dict[GenerationMode, Counter[int]] = {mode: Counter() for mode in MODES}
    slowest, deaths = 0.0, 0
    with serving() as server:
        before, worker = server.image(), server.worker
        for mode, found in codes.items():

            def attack(body: Any, found: Counter[int] = found) -> None:
                nonlocal slowest, deaths
                code, seconds = send(server, body)
                found[code] += 1
                slowest = max(slowest, seconds)
                deaths += not worker.is_running()

            fuzz(mode, -(-count // 2), seed, attack)
        same = server.image() == before
    total = sum(codes.values(), Counter[int]())
    return {
        "requests": total.total(),
        **{f"{mode.value}: answers by status": dict(found) for mode, found in codes.items()},
        "answers of 5xx, or none": sum(n for code, n in total.items() if code >= 500 or not code),
        "slowest answer: seconds": slowest,
        "deaths of the worker": deaths,
        "afterwards another image": int(not same),
    }
