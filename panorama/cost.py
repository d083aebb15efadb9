"""The cost of a request, bounded before any work."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

from panorama.conditioning.prompts import as_parts
from panorama.pipeline import Pipeline, Settings
from panorama.request import INPUTS, ModeSettings, ResolvedRequest
from panorama.sampling.operations import count_work

MAX_COST: Mapping[str, int] = {"cuda": 100_000, "cpu": 20_000}
"""The default bound, in guided evaluations of the UNet for one window, by the type of device.

On the tiny family, whose windows are the smallest, 16384 x 16384 with speed=fast costs 96,530
and a strip of 16384 x 256 with the defaults 13,513.
"""
LEAST_BOUND = 1000
"""With this bound every mode has a request that fits, of any number of parts."""
FAIR_STEPS = 20
"""The size of the image is reduced before the steps are fewer than this."""


def estimate(pipeline: Pipeline, settings: Settings, steps: int) -> float:
    """Return the cost of so many steps, in guided evaluations of the UNet for one window.

    The gradient counts as what it costs. A ControlNet, and the coding of the image, are left out.
    """
    if not steps:
        return 0
    base, canvas = pipeline.base, pipeline.canvas(settings)
    views = settings.layout(canvas, base.window, steps)
    area = views[0][0].height * views[0][0].width / base.window**2
    work = count_work(views, settings.sync, len(as_parts(settings.prompt)))
    return base.prices.cost(work, area, guided=settings.guidance_scale != 1)


def check_cost(
    request: ResolvedRequest,
    settings: ModeSettings,
    bound: float,
    cost: Callable[[ResolvedRequest], float],
) -> float:
    """Return the cost of a request; ValueError, with a change that fits, if it exceeds a bound."""
    found = cost(request)
    if found <= bound:
        return found
    changes: dict[str, Any] = {}
    for name, values in _knobs(request, settings):
        cheaper = replace(request, **changes)
        cost_of = partial(_cost_with, cost, cheaper, name)
        if cost_of(values[0]) < cost(cheaper):
            fitting = bisect_right(values, bound, key=cost_of)
            changes[name] = values[max(fitting - 1, 0)]
            if fitting:
                break
    inputs = ", ".join(f"{name}={getattr(request, name)}" for name in changes)
    advice = ", ".join(f"{name}={value}" for name, value in changes.items())
    raise ValueError(
        f"{inputs}: must cost at most {bound:.0f} guided evaluations of the UNet, not "
        f"{ceil(found)}; try {advice}"
    )


def _cost_with(
    cost: Callable[[ResolvedRequest], float], request: ResolvedRequest, name: str, value: int
) -> float:
    """Return the cost of a request with another value of an input."""
    changes: dict[str, Any] = {name: value}
    return cost(replace(request, **changes))


def _knobs(request: ResolvedRequest, settings: ModeSettings) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield inputs that lower the cost, with their values from the cheapest to the request's."""
    if request.upscale > 1:
        yield "upscale", [n for n in INPUTS["upscale"].choices if 1 < n <= request.upscale]
    if settings.window:
        largest = settings.window - request.loop_closure
        takes_stride = settings.speeds[request.speed or settings.speed].takes_stride
        if takes_stride and not request.only_enlarges:
            yield "sync_threshold", range((request.sync_threshold or 0) + 1)
            yield "stride", range(largest, request.stride - 1, -1)
    steps = request.num_inference_steps
    yield "num_inference_steps", range(min(FAIR_STEPS, steps), steps + 1)
    longer, other = ("width", "height") if request.width >= request.height else ("height", "width")
    for name, parts in ((longer, len(request.parts)), (other, 1)):
        least = parts * max(settings.smallest, ceil(INPUTS[name].minimum))
        yield name, range(least, getattr(request, name) + 1, settings.multiple)
    yield "num_inference_steps", range(1, steps + 1)
