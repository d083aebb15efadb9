"""`sample()` against a plain per-window SyncDiffusion loop written from the formulas."""

import pytest
import torch

from benchmarks.plain_loop import plain_loop
from panorama.sampling.canvas import Canvas
from panorama.sampling.solver import SCHEDULERS, build_scheduler
from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Fixed, Layout, Sliding
from tests.small import STEPS, WINDOW, Networks, draw_noise, own_scheduler

THRESHOLD = 5
CANVASES: dict[str, tuple[Canvas, int]] = {
    "flat": (Canvas(16, 44), 8),
    "tall": (Canvas(40, 16), 8),
    "grid": (Canvas(27, 30), 10),
    "ring": (Canvas(16, 48, "x"), 8),
    "tall ring": (Canvas(37, 16, "y"), 9),
}


SYNC: dict[str, SyncSettings] = {
    "gradient": SyncSettings(300.0, 0.9, threshold=THRESHOLD),
    "every other step": SyncSettings(300.0, 0.9, freq=2, threshold=THRESHOLD),
    "means": SyncSettings(0.5, 0.9, threshold=0, means=THRESHOLD),
    "both": SyncSettings(3.0, 0.9, threshold=THRESHOLD, means=THRESHOLD + 1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sync", SYNC)
@pytest.mark.parametrize("name", CANVASES)
def test_sample_equals_the_plain_loop(name: str, sync: str, scheduler: str) -> None:
    canvas, stride = CANVASES[name]
    check_against_plain_loop(canvas, Fixed(stride), SYNC[sync], scheduler)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("sync", ["means", "both"])
@pytest.mark.parametrize("strided", [True, False], ids=["overlapping", "disjoint"])
@pytest.mark.parametrize("name", CANVASES)
def test_sample_equals_the_plain_loop_on_moving_windows(
    name: str, strided: bool, sync: str, scheduler: str
) -> None:
    """A multistep scheduler has no history of a window that moves."""
    canvas, stride = CANVASES[name]
    layout = Sliding(stride if strided else None)
    assert len(set(layout(canvas, WINDOW, STEPS))) == STEPS
    check_against_plain_loop(canvas, layout, SYNC[sync], scheduler)


def check_against_plain_loop(
    canvas: Canvas, layout: Layout, settings: SyncSettings, scheduler: str
) -> None:
    networks = Networks()
    ours = networks.run(canvas, layout, settings, scheduler=scheduler, batch_size=3)

    theirs = build_scheduler(scheduler, own_scheduler())
    theirs.set_timesteps(STEPS)
    if scheduler == "unipc":
        freq = settings.freq
        theirs.disable_corrector = [k - 1 for k in range(THRESHOLD) if (k + 1) % freq == 0]
    latents = draw_noise(canvas.height, canvas.width) * theirs.init_noise_sigma
    views = layout(canvas, WINDOW, STEPS)
    plain = plain_loop(latents, views, networks, theirs, settings, canvas.closed)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)  # some step in float32
    off = SyncSettings(0.0)
    unsynchronised = plain_loop(latents, views, networks, theirs, off, canvas.closed)
    assert (plain - unsynchronised).abs().max() > 1e-2  # synchronising did something
