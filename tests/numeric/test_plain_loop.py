"""`sample()` against a plain per-window SyncDiffusion loop written from the formulas."""

from typing import Any

import pytest
import torch

from benchmarks.plain_loop import plain_loop
from panorama.sampling.canvas import Canvas
from panorama.sampling.solver import SCHEDULERS, build_scheduler
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Layout, Sliding, sliding_views
from tests.small import STEPS, WINDOW, Networks, draw_noise, own_scheduler

THRESHOLD = 5
CANVASES: dict[str, tuple[Canvas, int]] = {
    "flat": (Canvas(16, 44), 8),
    "tall": (Canvas(40, 16), 8),
    "grid": (Canvas(27, 30), 10),
    "ring": (Canvas(16, 48, "x"), 8),
    "tall ring": (Canvas(37, 16, "y"), 9),
}


class Still:
    """Windows that stay in place, as multistep schedulers with one history each need."""

    wraps = False

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Any:
        return [sliding_views(canvas, window, self.stride)] * steps


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("name", CANVASES)
def test_sample_equals_the_plain_loop(name: str, freq: int, scheduler: str) -> None:
    canvas, stride = CANVASES[name]
    check_against_plain_loop(canvas, Still(stride), freq, scheduler)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("name", ["ring", "tall ring"])
def test_sample_equals_the_plain_loop_on_turning_windows(name: str, scheduler: str) -> None:
    canvas, stride = CANVASES[name]
    assert len(set(Sliding(stride)(canvas, WINDOW, STEPS))) > 1
    check_against_plain_loop(canvas, Sliding(stride), freq=1, scheduler=scheduler)


def check_against_plain_loop(canvas: Canvas, layout: Layout, freq: int, scheduler: str) -> None:
    networks, settings = Networks(), SyncSettings(300.0, 0.9, freq, THRESHOLD)
    ours = networks.run(canvas, layout, settings, scheduler=scheduler, batch_size=3)

    theirs = build_scheduler(scheduler, own_scheduler())
    theirs.set_timesteps(STEPS)
    if scheduler == "unipc":
        theirs.disable_corrector = [k - 1 for k in range(THRESHOLD) if (k + 1) % freq == 0]
    latents = draw_noise(canvas.height, canvas.width) * theirs.init_noise_sigma
    views = layout(canvas, WINDOW, STEPS)
    plain = plain_loop(latents, views, networks, theirs, settings)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)  # some step in float32
    unsynchronised = plain_loop(latents, views, networks, theirs, SyncSettings(0.0))
    assert (plain - unsynchronised).abs().max() > 1e-2  # synchronising did something
