"""`sample()` against a plain per-window SyncDiffusion loop written from the formulas."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from panorama.sampler import sample
from panorama.synchronize import Synchronizer, SyncSchedule
from panorama.views import View, make_views, step_views
from tests.plain_loop import plain_loop

SIZE, STEPS, WEIGHT, DECAY, THRESHOLD = 16, 6, 300.0, 0.9, 5
CANVASES: dict[str, dict[str, Any]] = {
    "flat": {"height": 16, "width": 44, "stride": 8},
    "tall": {"height": 40, "width": 16, "stride": 8},
    "grid": {"height": 27, "width": 30, "stride": 10},
    "ring": {"height": 16, "width": 48, "stride": 8, "ring_x": True},
    "tall ring": {"height": 37, "width": 16, "stride": 9, "ring_y": True},
}
TURNING = ["ring", "tall ring"]
SCHEDULERS: dict[str, Callable[..., Any]] = {
    "ddim": lambda **beta: DDIMScheduler(**beta, clip_sample=False, set_alpha_to_one=False),
    "dpm-solver++ 2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


class Networks(nn.Module):
    """Small, smooth, nonlinear stand-ins for the UNet, the decoder and the distance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.noise = nn.Conv2d(4, 4, 3, padding=1)
        self.picture = nn.ConvTranspose2d(4, 3, 4, stride=4)
        self.double()

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.noise(x)) * (1 + t / 1000) + 0.1 * x

    def decode(self, x: Tensor) -> Tensor:
        return self.picture(x)

    def embed(self, images: Tensor) -> list[Tensor]:
        return [images.mean((2, 3)), images.square().mean((2, 3))]

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        pairs = zip(self.embed(images), features, strict=True)
        return torch.stack([(a - b).square().mean(1) for a, b in pairs]).sum(0)


def make_scheduler(name: str) -> Any:
    scheduler = SCHEDULERS[name](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("canvas", CANVASES)
def test_sample_equals_the_plain_loop(canvas: str, freq: int, scheduler: str) -> None:
    layout = CANVASES[canvas]
    check_against_plain_loop([make_views(size=SIZE, **layout)], layout, freq, scheduler)


@pytest.mark.parametrize("canvas", TURNING)
def test_sample_equals_the_plain_loop_on_turning_windows(canvas: str) -> None:
    layout = CANVASES[canvas]
    views = step_views(size=SIZE, **layout)
    assert len(views) > 1
    check_against_plain_loop(views, layout, freq=1, scheduler="ddim")


def check_against_plain_loop(
    views: Sequence[Sequence[View]], layout: dict[str, Any], freq: int, scheduler: str
) -> None:
    networks, solver = Networks(), make_scheduler(scheduler)
    generator = torch.Generator().manual_seed(1)
    shape = (1, 4, layout["height"], layout["width"])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    synchronizer = Synchronizer(
        networks.predict_noise, networks.decode, networks, solver.alphas_cumprod
    )

    schedule = SyncSchedule(WEIGHT, DECAY, freq, THRESHOLD)
    if scheduler == "unipc":
        solver.disable_corrector = [k - 1 for k in range(THRESHOLD) if (k + 1) % freq == 0]
    ours = sample(
        noise,
        views,
        networks.predict_noise,
        copy.deepcopy(solver),
        synchronizer=synchronizer,
        schedule=schedule,
        view_batch_size=3,
    )

    plain = plain_loop(noise, views, networks, solver, schedule)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)  # some solvers step in float32
    unsynchronised = plain_loop(noise, views, networks, solver, SyncSchedule(0.0))
    assert (plain - unsynchronised).abs().max() > 1e-2  # synchronising did something
