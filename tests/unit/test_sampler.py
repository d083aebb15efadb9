"""What is computed at which step, and which schedulers can be fused."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from panorama.sampler import require_fusable, sample
from panorama.synchronize import Synchronizer, SyncSchedule
from panorama.views import make_views
from tests.numeric.test_plain_loop import Networks, make_scheduler


def test_the_schedule_is_that_of_the_paper() -> None:
    schedule = SyncSchedule(weight=20.0, decay_rate=0.5, freq=2, threshold=5)
    assert [schedule(k) for k in range(8)] == [0, 10.0, 0, 2.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", use_karras_sigmas=True),
        UniPCMultistepScheduler(),
    ],
)
def test_affine_schedulers_are_taken(scheduler: Any) -> None:
    require_fusable(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (DDIMScheduler(), "affine"),  # clips its sample
        (DDIMScheduler(clip_sample=False, thresholding=True), "affine"),
        (DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), "prediction_type"),
        (DDPMScheduler(clip_sample=False), "affine"),
        (LCMScheduler(), "affine"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "affine"),
        (DPMSolverMultistepScheduler(thresholding=True), "affine"),
        (EulerAncestralDiscreteScheduler(), "unit variance"),
        (EulerDiscreteScheduler(), "unit variance"),
    ],
)
def test_others_are_refused_by_name(scheduler: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        require_fusable(scheduler)
    assert type(scheduler).__name__ in str(caught.value)
    assert "DDIMScheduler with clip_sample=False" in str(caught.value)


class Counting(Networks):
    """Counts the pictures that go through each network."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"predict_noise": 0, "decode": 0, "embed": 0, "gradients": 0}

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls["predict_noise"] += len(x)
        self.calls["gradients"] += len(x) * torch.is_grad_enabled()
        return super().predict_noise(x, t)

    def decode(self, x: Tensor) -> Tensor:
        self.calls["decode"] += len(x)
        return super().decode(x)


@pytest.mark.parametrize(
    ("weight", "threshold", "sync_steps"), [(0.0, 6, 0), (20.0, 0, 0), (20.0, 2, 2)]
)
def test_nothing_is_computed_twice(weight: float, threshold: int, sync_steps: int) -> None:
    views = make_views(16, 48, 16, 8)
    networks, solver = Counting(), make_scheduler("ddim")
    synchronizer = Synchronizer(
        networks.predict_noise, networks.decode, networks, solver.alphas_cumprod
    )
    sample(
        torch.randn(1, 4, 16, 48, dtype=torch.float64),
        [views],
        networks.predict_noise,
        solver,
        synchronizer=synchronizer,
        schedule=SyncSchedule(weight, threshold=threshold),
    )
    moved = (len(views) - 1) * sync_steps
    assert networks.calls["gradients"] == moved
    assert networks.calls["predict_noise"] == len(views) * len(solver.timesteps) + moved
    assert networks.calls["decode"] == len(views) * sync_steps
