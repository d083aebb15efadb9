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

from panorama.sampler import keep_moves, require_fusable, sample
from panorama.synchronize import (
    DIRECT_DECAY,
    DIRECT_SCALE,
    DirectSynchronizer,
    Synchronizer,
    SyncSchedule,
)
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


class Memory(Networks):
    """Has room for some windows at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.batches: list[int] = []

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"no memory for {len(x)} windows")
        return super().predict_noise(x, t)


def run_with_room(networks: Memory) -> Tensor:
    solver = make_scheduler("unipc")
    return sample(
        torch.randn(1, 4, 16, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        [make_views(16, 80, 16, 8)],
        networks.predict_noise,
        solver,
        synchronizer=Synchronizer(
            networks.predict_noise, networks.decode, networks, solver.alphas_cumprod
        ),
        schedule=SyncSchedule(300.0, threshold=2),
        view_batch_size=9,
    )


def test_too_little_memory_halves_the_batch_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    short = Memory(room=2)
    latents = run_with_room(short)
    torch.testing.assert_close(latents, run_with_room(Memory(room=9)), rtol=1e-9, atol=1e-9)
    # Half as many as asked for where they are synchronised, and never again so many.
    assert [n for n in short.batches if n > 2] == [4, 9, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "not enough memory for 4 windows at once: going on with 2",
        "not enough memory for 9 windows at once: going on with 4",
        "not enough memory for 4 windows at once: going on with 2",
    ]


def test_too_little_memory_for_one_window_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 windows"):
        run_with_room(Memory(room=0))


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


def count_calls(
    kind: type[Synchronizer], schedule: SyncSchedule
) -> tuple[dict[str, int], int, int]:
    """What a run calls, how many windows it has, and how many steps."""
    views = make_views(16, 48, 16, 8)
    networks, solver = Counting(), make_scheduler("ddim")
    sample(
        torch.randn(1, 4, 16, 48, dtype=torch.float64),
        [views],
        networks.predict_noise,
        solver,
        synchronizer=kind(networks.predict_noise, networks.decode, networks, solver.alphas_cumprod),
        schedule=schedule,
    )
    return networks.calls, len(views), len(solver.timesteps)


@pytest.mark.parametrize(
    ("weight", "threshold", "sync_steps"), [(0.0, 6, 0), (20.0, 0, 0), (20.0, 2, 2)]
)
def test_nothing_is_computed_twice(weight: float, threshold: int, sync_steps: int) -> None:
    calls, windows, steps = count_calls(Synchronizer, SyncSchedule(weight, threshold=threshold))
    moved = (windows - 1) * sync_steps
    assert calls["gradients"] == moved
    assert calls["predict_noise"] == windows * steps + moved
    assert calls["decode"] == windows * sync_steps


def test_unipc_steps_from_the_windows_as_they_were_moved() -> None:
    # With the same noise x0 moves by 1 / alpha of x's move, and the next x by alpha' / alpha of it.

    def response(weights: list[float], **config: Any) -> tuple[float, float]:
        ends = []
        for move in (0.0, 1.0):
            scheduler = UniPCMultistepScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                solver_order=1,
                **config,
            )
            scheduler.set_timesteps(20)
            before = list(scheduler.disable_corrector)
            x = torch.ones(1, 4, 2, 2, dtype=torch.float64)
            with keep_moves(scheduler, weights):
                for step, t in enumerate(scheduler.timesteps[:3]):
                    moved = x + move if step == 2 else x
                    x = scheduler.step(0.1 * torch.ones_like(x), t, moved).prev_sample
            assert scheduler.disable_corrector == before
            ends.append(x)
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.long()].sqrt()
        return float((ends[1] - ends[0]).mean()), float(alphas[3] / alphas[2])

    found, expected = response([20.0] * 5)
    assert found == pytest.approx(expected, rel=1e-3)
    found, expected = response([20.0, 20.0, 0.0])  # its corrector takes part
    assert abs(found - expected) > 0.1 * expected
    found, expected = response([0.0] * 3, disable_corrector=[1])  # the user wants it so
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_direct_step_moves_x0_and_keeps_the_noise() -> None:
    networks, solver = Networks(), make_scheduler("ddim")
    parts = (networks.predict_noise, networks.decode, networks, solver.alphas_cumprod, 2)
    synchronizer = DirectSynchronizer(*parts)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = solver.timesteps[2]
    alpha_bar = solver.alphas_cumprod[t]
    with torch.no_grad():
        noise = networks.predict_noise(x, t)
        x0 = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        anchor = synchronizer.embed(x[:1] + 1, noise[:1], t)
        moved, kept = synchronizer.step(x, t, anchor, 20.0)

    def distance(x0: Tensor) -> Tensor:
        coarse = x0.unflatten(-1, (8, 2)).mean(-1).unflatten(-2, (8, 2)).mean(-2)
        return networks.distance(networks.decode(coarse).clamp(-1, 1), anchor)

    assert torch.equal(kept, noise)
    x0.requires_grad_()
    (expected,) = torch.autograd.grad(distance(x0).sum(), x0)
    after = (moved - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    scale = DIRECT_SCALE * (1 - alpha_bar) ** DIRECT_DECAY
    torch.testing.assert_close(x0 - after, scale * 20.0 * expected, rtol=1e-4, atol=1e-6)
    assert (distance(after) < distance(x0)).all()


def test_a_direct_step_sends_nothing_twice_or_with_a_gradient_through_the_unet() -> None:
    calls, windows, steps = count_calls(DirectSynchronizer, SyncSchedule(20.0, threshold=2))
    assert calls["gradients"] == 0
    assert calls["predict_noise"] == windows * steps
    assert calls["decode"] == 2 * windows
