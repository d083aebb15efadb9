"""Joint denoising of one canvas through overlapping windows."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from panorama.circular import replaced
from panorama.share import ALONE, Share
from panorama.synchronize import PredictNoise, Synchronizer, SyncSchedule
from panorama.views import Fusion, View, crop

Result = TypeVar("Result")
Update = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From windows (N, C, s, s) to the windows to go on with and the noise predicted in them."""
OnStep = Callable[[int, Tensor, Tensor], Tensor]
"""From step index, timestep and latents to the latents to go on with."""

VIEW_BATCH_SIZE = 8
"""Windows that go through the networks at once, if nothing else is asked for."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def sample(
    latents: Tensor,
    views: Sequence[Sequence[View]],
    predict_noise: PredictNoise,
    scheduler: Any,
    *,
    synchronizer: Synchronizer | None = None,
    schedule: SyncSchedule | None = None,
    view_batch_size: int = VIEW_BATCH_SIZE,
    share: Share = ALONE,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoises a canvas: SyncDiffusion (arXiv 2306.05178, algorithm 1) on MultiDiffusion.

    Windows are updated towards the anchor, their noise is predicted, both are averaged over the
    canvas, and the scheduler makes one step for all of it. That equals a step for each window
    because the step is affine in (latents, noise); so one history serves multistep solvers too.

    Args:
        latents: the canvas (1, C, H, W), unit normal noise.
        views: for each step, windows that cover it; from the first list again when they are used
            up. The anchor is the middle one of a list, index N // 2.
        predict_noise: the guided noise prediction of windows (N, C, s, s) at a timestep.
        scheduler: a diffusers scheduler with its timesteps set, see `require_fusable`.
        synchronizer: the gradient step; None, or a weight of 0, makes no gradient, no decode
            and no anchor pass.
        schedule: its weight at each step.
        view_batch_size: windows that go through the networks at once, half as many where they
            are synchronised, for gradients take memory; halved where the device has not enough.
        share: this process's share of the windows; all processes have the same canvas.
        on_step: called after each step; may raise to stop.

    Returns:
        The denoised latents (1, C, H, W).
    """
    plain, synchronising = Batches(view_batch_size), Batches(max(1, view_batch_size // 2))
    weights = [  # a window alone has none to be like
        schedule(k) if synchronizer and schedule and len(views[k % len(views)]) > 1 else 0.0
        for k in range(len(scheduler.timesteps))
    ]

    def predict(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, predict_noise(x, t)

    with keep_moves(scheduler, weights):
        for step, (t, weight) in enumerate(zip(scheduler.timesteps, weights, strict=True)):
            windows = views[step % len(views)]
            fusion = Fusion(torch.cat([latents, latents], 1), windows)  # of windows and their noise
            if synchronizer and weight:
                anchor = windows[len(windows) // 2]
                pair = predict(crop(latents, [anchor]), t)  # (1, C, s, s) both
                features = synchronizer.embed(*pair, t)
                if share.first:
                    fusion.add(torch.cat(pair, 1), [anchor])
                windows = [view for view in windows if view is not anchor]
                update: Update = partial(synchronizer.step, t=t, anchor=features, weight=weight)
                batches = synchronising
            else:
                update = partial(predict, t=t)
                batches = plain
            for batch, pair in batches.map(partial(updated, latents, update), share.of(windows)):
                fusion.add(torch.cat(pair, 1), batch)
            share.sum(fusion.total)
            moved, noise_pred = fusion.mean().chunk(2, 1)  # (1, C, H, W) both
            latents = scheduler.step(noise_pred, t, moved).prev_sample
            if on_step is not None:
                latents = on_step(step, t, latents)
    return latents


@contextmanager
def keep_moves(scheduler: Any, weights: Sequence[float]) -> Iterator[None]:
    """Lets a solver step from the windows as they were moved, while the block runs.

    UniPC's corrector (arXiv 2302.04867, algorithm 1) works out each sample anew from the one
    before, which was not moved. At steps whose weight is not 0 its predictor goes alone.
    """
    if not hasattr(scheduler, "disable_corrector"):
        yield
        return
    # diffusers counts a corrector with the step before.
    moved = [step - 1 for step, weight in enumerate(weights) if weight]
    with replaced(scheduler, "disable_corrector", [*scheduler.disable_corrector, *moved]):
        yield


def updated(latents: Tensor, update: Update, views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """Windows of a canvas (1, C, H, W) after an update, and their noise, (N, C, s, s) both."""
    return update(crop(latents, views))


class Batches:
    """Goes through views some at a time, and fewer at a time once there was not enough memory.

    Attributes:
        size: how many at a time.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def map(
        self, work: Callable[[Sequence[View]], Result], views: Sequence[View]
    ) -> Iterator[tuple[Sequence[View], Result]]:
        """Each run of views with what `work` makes of it.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for one view.
        """
        done = 0
        while done < len(views):
            batch = views[done : done + self.size]
            try:
                result = work(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.size = len(batch) // 2
                logger.warning(
                    "not enough memory for %d windows at once: going on with %d",
                    len(batch),
                    self.size,
                )
                continue
            yield batch, result
            done += len(batch)


def require_fusable(scheduler: Any) -> None:
    """Refuses a scheduler whose step is not affine in (latents, noise) or not what windows need.

    The law itself is tried on a copy: stepping the mean of two samples must give the mean of
    their steps, all along a short run, one history each. Clipping, thresholding and fresh noise
    (ancestral, SDE) break it.

    What is taken need not synchronise equally well. A solver that goes on from a sample of a step
    before, as PNDM and the single-step DPM-Solver do, forgets a part of how windows were moved.

    Raises:
        ValueError: naming the scheduler, what is wrong with it, and ones that would do.
    """
    name = type(scheduler).__name__
    advice = (
        "DDIMScheduler with clip_sample=False, DPMSolverMultistepScheduler or "
        "UniPCMultistepScheduler would do"
    )
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(
            f"scheduler={name}: prediction_type is {prediction!r}, must be 'epsilon'; {advice}"
        )
    if not hasattr(scheduler, "alphas_cumprod") or float(scheduler.init_noise_sigma) != 1.0:
        raise ValueError(
            f"scheduler={name}: must keep latents at unit variance (init_noise_sigma 1 and "
            f"alphas_cumprod); {advice}"
        )
    with torch.random.fork_rng(devices=[]):  # some schedulers draw noise
        affine = steps_affinely(scheduler)
    if not affine:
        raise ValueError(
            f"scheduler={name}: its step must be affine in (latents, noise), without clip_sample, "
            f"thresholding or fresh noise, or else windows can't be averaged before it; {advice}"
        )


def steps_affinely(scheduler: Any, num_inference_steps: int = 5) -> bool:
    """Whether step(mean) is mean(step), tried on copies over a whole short run."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 2, 2)
    solvers = [copy.deepcopy(scheduler) for _ in range(3)]
    for solver in solvers:
        solver.set_timesteps(num_inference_steps)
    # Large values, so that a limit on the sample would bind.
    x = [10 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    x.append((x[0] + x[1]) / 2)
    for t in solvers[0].timesteps:
        noise = [10 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in x[:2]]
        noise.append((noise[0] + noise[1]) / 2)
        x = [s.step(n, t, z).prev_sample for s, n, z in zip(solvers, noise, x, strict=True)]
        if not torch.allclose(x[2], (x[0] + x[1]) / 2, rtol=1e-4, atol=1e-4):
            return False
    return True
