"""Errors raised at random lines while an image is made: the next image must be the same."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

import torch

from benchmarks.attack.lab import SMALL, Figures
from benchmarks.goals import Goal
from panorama import Models, Request, load
from panorama.environment import hide_progress_bars

GOALS = {"images that differ": Goal(most=0), "images that failed": Goal(most=0)}
KINDS = (MemoryError, KeyboardInterrupt, torch.OutOfMemoryError)
PLACES = ("/panorama/", "/diffusers/", "/transformers/", "/torch/nn/")
REQUESTS = (
    SMALL | {"num_inference_steps": 2},
    {
        "mode": "syncdiffusion",
        "prompt": "night over the sea",
        "width": 320,
        "height": 256,
        "num_inference_steps": 2,
        "sync_threshold": 1,
        "loop_closure": False,
        "seed": 1,
    },
)
"""One that changes the convolutions and the weights, one with a gradient."""


@contextmanager
def traced(on_line: Callable[[FrameType], None]) -> Iterator[None]:
    """Call a function before each line of the packages that make an image."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            name = frame.f_code.co_filename
            return trace if any(place in name for place in PLACES) else None
        if event == "line":
            on_line(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def make(models: Models, inputs: dict[str, Any]) -> bytes:
    """Return the pixels of an image."""
    return models.generate(Request(**inputs)).image.tobytes()


def lines(models: Models, inputs: dict[str, Any]) -> int:
    """Count the lines that an image takes."""
    count = 0

    def add(_: FrameType) -> None:
        nonlocal count
        count += 1

    with traced(add):
        make(models, inputs)
    return count


def raise_at(number: int, error: BaseException, where: list[str]) -> Callable[[FrameType], None]:
    """Return a function that raises at its call of this number, and notes the line."""
    left = number

    def count(frame: FrameType) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            where.append(f"{frame.f_code.co_filename.split('/')[-1]}:{frame.f_lineno}")
            raise error

    return count


def run(count: int, seed: int) -> Figures:
    """Raise so many errors, each at a random line, and make the image again after each."""
    hide_progress_bars()
    random, models = Random(seed), load("tiny", modes=("syncdiffusion", "sdxl-360"))
    expected = [make(models, inputs) for inputs in REQUESTS]
    totals = [lines(models, inputs) for inputs in REQUESTS]
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    failed = 0
    for number in range(count):
        which = random.randrange(len(REQUESTS))
        kind, where = random.choice(KINDS), list[str]()
        on_line = raise_at(random.randint(1, totals[which]), kind("on purpose"), where)
        try:
            with traced(on_line):
                make(models, REQUESTS[which])
            outcomes["recovered"] += 1
        except kind:
            outcomes["raised"] += 1
        except BaseException as error:
            outcomes[f"became {type(error).__name__}"] += 1
        after = (which + number) % len(REQUESTS)
        try:
            if make(models, REQUESTS[after]) != expected[after]:
                bad.append(f"{kind.__name__} at {where}")
        except Exception as error:
            failed += 1
            bad.append(f"{kind.__name__} at {where}: {error!r:.100}")
    return {
        "errors": count,
        "outcomes": ", ".join(f"{name}: {found}" for name, found in outcomes.items()),
        "images that differ": len(bad) - failed,
        "images that failed": failed,
        "after": "; ".join(bad[:5]) or "none",
    }
