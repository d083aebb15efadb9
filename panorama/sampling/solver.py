"""One convention over diffusers' schedulers."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from panorama.errors import shorten

SCHEDULERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""The schedulers that can be chosen by name, each with the configuration that it needs."""

ADVICE = (
    "try DDIMScheduler with clip_sample=False, EulerDiscreteScheduler, "
    "DPMSolverMultistepScheduler or UniPCMultistepScheduler"
)


def build_scheduler(choice: Any, own: Any) -> Any:
    """Build a scheduler with the noise schedule of a model's own.

    Args:
        choice: a key of `SCHEDULERS`; a scheduler of diffusers, which is returned as it is; None
            for the model's own.
        own: the scheduler that the model comes with.

    Raises:
        ValueError: there is no scheduler of that name.
    """
    if not isinstance(choice, str):
        return own if choice is None else choice
    if choice not in SCHEDULERS:
        names = ", ".join(SCHEDULERS)
        raise ValueError(f"scheduler={shorten(choice)}: must be one of {names}; try 'ddim'")
    kind, config = SCHEDULERS[choice]
    return kind.from_config(own.config, **config)


@dataclass(frozen=True)
class NoiseLevel:
    """The shares of image and noise in latents: x = alpha * x0 + sigma * eps."""

    alpha: float
    sigma: float

    @property
    def variance(self) -> float:
        """The variance of x: 1 in a variance-preserving parametrisation, else 1 + sigma ** 2."""
        return self.alpha**2 + self.sigma**2

    @property
    def alpha_bar(self) -> float:
        """The share of the image in the variance of x, the same in every parametrisation."""
        return self.alpha**2 / self.variance


class Solver:
    """A run of a diffusers scheduler, from noise to clean latents.

    The scheduler may preserve variance (x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, as DDIM)
    or let it explode (x = x0 + sigma eps, as Euler). Its step must be affine in (latents, noise):
    then a step of the mean of windows equals the mean of their steps. Solvers that go
    back to the sample of an earlier step, such as PNDM and Heun, lose part of a move of windows.

    Use a solver for one run only: multistep schedulers keep a history.

    Attributes:
        timesteps: all timesteps, on the CPU, where schedulers look them up without waiting for a
            GPU.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int, last: int | None = None) -> None:
        """Prepare a run on a copy of a scheduler.

        Args:
            scheduler: of diffusers.
            num_inference_steps: of the whole schedule.
            last: how many of its last steps are made, from an image (SDEdit, arXiv 2108.01073);
                None for all.

        Raises:
            ValueError: the scheduler does not fit, see `require_affine`.
        """
        require_affine(scheduler)
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(num_inference_steps)
        self._levels = noise_levels(self._scheduler)
        self._first = 0 if last is None else num_inference_steps - last
        self.timesteps: Tensor = self._scheduler.timesteps[self._first :]
        if self._first and hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self._first)

    def level(self, t: Tensor) -> NoiseLevel:
        """Return the noise level of latents at a timestep of the run."""
        return self._levels[float(t)]

    def initial(self, noise: Tensor, x0: Tensor | None = None) -> Tensor:
        """Return the latents (1, C, H, W) that the run starts from.

        Args:
            noise: (1, C, H, W) of unit variance.
            x0: latents of an image. A run of part of the schedule, with at least one step,
                starts from them.
        """
        if x0 is None or not self._first:
            latents: Tensor = noise * self._scheduler.init_noise_sigma
            return latents
        level = self.level(self.timesteps[0])
        return level.alpha * x0 + level.sigma * noise

    def scale(self, x: Tensor, t: Tensor) -> Tensor:
        """Scale latents (N, C, h, w) to the unit variance that the UNet expects."""
        scaled: Tensor = self._scheduler.scale_model_input(x, t)
        return scaled

    def x0(self, x: Tensor, noise_pred: Tensor, t: Tensor) -> Tensor:
        """Predict x0 from latents and noise, (N, C, h, w) each (arXiv 2010.02502, equation 9)."""
        level = self.level(t)
        return (x - level.sigma * noise_pred) / level.alpha

    def noise(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the noise (N, C, h, w) in latents that contain x0, the inverse of `x0`."""
        level = self.level(t)
        return (x - level.alpha * x0) / level.sigma

    def step(self, noise_pred: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Step latents (1, C, H, W) from t to the next timestep, given the noise in them."""
        previous: Tensor = self._scheduler.step(noise_pred, t, x).prev_sample
        return previous

    def keep_moves(self, steps: Iterable[int]) -> None:
        """Let the run continue from latents that are moved before some steps, counted from 0.

        UniPC's corrector (arXiv 2302.04867, algorithm 1) recomputes a sample from the one before,
        which was not moved. It is switched off at these steps.
        """
        if hasattr(self._scheduler, "disable_corrector"):
            # diffusers counts a corrector with the step before, in the whole schedule.
            moved = [self._first + step - 1 for step in steps]
            self._scheduler.disable_corrector = [*self._scheduler.disable_corrector, *moved]


def noise_levels(scheduler: Any) -> Mapping[float, NoiseLevel]:
    """Return the noise level of each timestep that was set."""
    timesteps = scheduler.timesteps
    if variance_explodes(scheduler):
        pairs = zip(timesteps, scheduler.sigmas, strict=False)  # the last sigma has no timestep
        return {float(t): NoiseLevel(1.0, float(sigma)) for t, sigma in pairs}
    alpha_bars = scheduler.alphas_cumprod[timesteps.long()].double()
    return {
        float(t): NoiseLevel(float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt()))
        for t, alpha_bar in zip(timesteps, alpha_bars, strict=True)
    }


def variance_explodes(scheduler: Any) -> bool:
    """Return True if latents are x0 + sigma eps rather than of unit variance."""
    return float(scheduler.init_noise_sigma) != 1.0


def require_affine(scheduler: Any) -> None:
    """Refuse a scheduler that `Solver` cannot run.

    Raises:
        ValueError: it predicts something other than noise, does not scale latents to unit
            variance, or its step is not affine: clipping, thresholding and fresh noise
            (ancestral, SDE) break that.
    """
    prediction = scheduler.config.get("prediction_type", "epsilon")
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(5)
    if prediction != "epsilon":
        rule = f"have prediction_type 'epsilon', not {prediction!r}"
    elif not hasattr(trial, "alphas_cumprod") or not scales_to_unit_variance(trial):
        rule = "scale latents to unit variance by alphas_cumprod or sigmas"
    elif not steps_affinely(trial):
        rule = (
            "step affinely in (latents, noise), without clip_sample, thresholding or fresh noise, "
            "or windows cannot be averaged before the step"
        )
    else:
        return
    raise ValueError(f"scheduler={type(scheduler).__name__}: must {rule}; {ADVICE}")


def scales_to_unit_variance(scheduler: Any) -> bool:
    """Return True if the first model input has unit variance by the noise levels."""
    if variance_explodes(scheduler) and not hasattr(scheduler, "sigmas"):
        return False
    t = scheduler.timesteps[0]
    deviation = noise_levels(scheduler)[float(t)].variance ** 0.5
    scaled = copy.deepcopy(scheduler).scale_model_input(torch.full((1,), deviation), t)
    return bool(torch.isclose(scaled, torch.ones(1), rtol=1e-4).all())


def steps_affinely(scheduler: Any) -> bool:
    """Return True if step(mean) equals mean(step) throughout a run, one history for each."""
    generator = torch.Generator().manual_seed(0)
    solvers = [copy.deepcopy(scheduler) for _ in range(3)]

    def draw() -> list[Tensor]:
        # Large values, so that a limit on the sample would take effect.
        pair = 10 * torch.randn(2, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
        return [*pair, pair.mean(0)]

    x = draw()
    with torch.random.fork_rng(devices=[]):  # some schedulers draw noise
        for t in scheduler.timesteps:
            inputs = zip(solvers, draw(), x, strict=True)
            for solver in solvers:
                solver.scale_model_input(x[0], t)  # Euler warns if it steps without
            x = [solver.step(noise, t, z).prev_sample for solver, noise, z in inputs]
            if not torch.allclose(x[2], (x[0] + x[1]) / 2, rtol=1e-4, atol=1e-4):
                return False
    return True
