"""Schedulers that a canvas can be denoised by, in one convention."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from panorama.sampling.solver import SCHEDULERS, Solver, build_scheduler, require_affine
from tests.small import draw_noise, make_solver, own_scheduler


class UnscaledScheduler(EulerDiscreteScheduler):
    """Leaves the latents' variance to the UNet."""

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        EulerDiscreteScheduler(**BETAS),
        EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
        EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", use_karras_sigmas=True),
        UniPCMultistepScheduler(),
        *(build_scheduler(name, own_scheduler()) for name in SCHEDULERS),
    ],
)
def test_affine_schedulers_are_accepted(scheduler: Any) -> None:
    require_affine(scheduler)


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
        (EulerAncestralDiscreteScheduler(), "affine"),
        (EulerDiscreteScheduler(prediction_type="v_prediction"), "prediction_type"),
        (FlowMatchEulerDiscreteScheduler(), "unit variance"),
        (UnscaledScheduler(), "unit variance"),
    ],
)
def test_others_are_refused_by_name(scheduler: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Solver(scheduler, 5)
    assert f"scheduler={type(scheduler).__name__}" in str(caught.value)
    assert "DDIMScheduler with clip_sample=False" in str(caught.value)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerAncestralDiscreteScheduler()])
def test_a_refusal_draws_nothing_from_the_callers_generator(scheduler: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="affine"):
        require_affine(scheduler)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_leaves_the_scheduler_as_it_was(name: str) -> None:
    scheduler = build_scheduler(name, own_scheduler())
    before = {key: str(value) for key, value in vars(scheduler).items()}
    solver = Solver(scheduler, 4)
    solver.keep_moves([1, 2])
    x = solver.initial(draw_noise(2, 2))
    solver.step(solver.scale(x, solver.timesteps[0]), solver.timesteps[0], x)
    assert {key: str(value) for key, value in vars(scheduler).items()} == before


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_by_name_has_the_noise_schedule_of_the_models_own(name: str) -> None:
    own = DDIMScheduler(
        beta_start=0.001, beta_end=0.009, steps_offset=1, timestep_spacing="leading"
    )
    scheduler = build_scheduler(name, own)
    assert isinstance(scheduler, SCHEDULERS[name][0])
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    solver = Solver(scheduler, 10)
    for t in solver.timesteps:
        assert solver.level(t).alpha_bar == pytest.approx(float(own.alphas_cumprod[int(t)]))


def test_without_a_name_the_models_own_scheduler_runs() -> None:
    own = own_scheduler()
    assert build_scheduler(None, own) is own


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_scaled_to_unit_variance_and_x0_is_recovered(name: str) -> None:
    x0, noise = draw_noise(2, 2, seed=0), draw_noise(2, 2, seed=1)
    timesteps = make_solver(name, 10).timesteps
    start = make_solver(name, 10)
    variance = start.level(timesteps[0]).variance
    torch.testing.assert_close(start.initial(noise), variance**0.5 * noise, rtol=1e-6, atol=0)
    for t in timesteps:
        solver = make_solver(name, 10)  # Euler scales by the step that it is at
        alpha_bar = own_scheduler().alphas_cumprod[int(t)].double()
        unit = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        x = solver.level(t).alpha * x0 + solver.level(t).sigma * noise
        torch.testing.assert_close(solver.scale(x, t), unit, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(solver.x0(x, noise, t), x0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_that_knows_the_noise_ends_in_the_image(name: str) -> None:
    solver, image = make_solver(name, 8), draw_noise(2, 2, seed=1)
    x = solver.initial(draw_noise(2, 2))
    for t in solver.timesteps:
        level = solver.level(t)
        solver.scale(x, t)
        x = solver.step((x - level.alpha * image) / level.sigma, t, x)
    # DDIM ends at the first noise level of all, not at none.
    torch.testing.assert_close(x, image, rtol=0, atol=0.1 if name == "ddim" else 1e-4)


def test_euler_makes_the_steps_of_ddim() -> None:
    ddim, euler = make_solver("ddim", 8), make_solver("euler", 8)
    assert ddim.timesteps.tolist() == euler.timesteps.tolist()
    noise = draw_noise(2, 2)
    x, y = euler.initial(noise), ddim.initial(noise)
    pairs = zip(euler.timesteps[:-1], ddim.timesteps, strict=False)  # they end differently
    for k, (t, same) in enumerate(pairs):
        torch.testing.assert_close(euler.scale(x, t), y, rtol=1e-5, atol=1e-5)
        noise = draw_noise(2, 2, seed=k + 1)
        x, y = euler.step(noise, t, x), ddim.step(noise, same, y)


def response(moved_steps: list[int], last: int | None = None, **config: Any) -> tuple[float, float]:
    """Return how far the next x follows a move of the third one, and how far it should."""
    ends: list[Tensor] = []
    for move in (0.0, 1.0):
        scheduler = UniPCMultistepScheduler(**BETAS, solver_order=1, **config)
        solver = Solver(scheduler, 20, last)
        solver.keep_moves(moved_steps)
        x = torch.ones(1, 4, 2, 2, dtype=torch.float64)
        for step, t in enumerate(solver.timesteps[:3]):
            moved = x + move if step == 2 else x
            x = solver.step(0.1 * torch.ones_like(x), t, moved)
        ends.append(x)
    # With the same noise x0 moves by 1 / alpha of x's move, and the next x by alpha' / alpha of it.
    expected = solver.level(solver.timesteps[3]).alpha / solver.level(solver.timesteps[2]).alpha
    return float((ends[1] - ends[0]).mean()), expected


@pytest.mark.parametrize("last", [None, 12])
def test_unipc_steps_from_the_windows_as_they_were_moved(last: int | None) -> None:
    found, expected = response([0, 1, 2, 3, 4], last)
    assert found == pytest.approx(expected, rel=1e-3)
    found, expected = response([0, 1], last)  # its corrector takes part
    assert abs(found - expected) > 0.1 * expected


def test_correctors_that_the_user_disabled_stay_so() -> None:
    found, expected = response([], disable_corrector=[1])
    assert found == pytest.approx(expected, rel=1e-3)
