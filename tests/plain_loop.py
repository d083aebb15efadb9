"""SyncDiffusion as it was published: one window after the other, nothing shared or batched.

The published code takes the anchor's gradient too, and leaves it.

What `sample()` is held against, for its numbers by the tests and for its speed by `script/bench`.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from panorama.synchronize import SyncSchedule
from panorama.views import View


class Networks(Protocol):
    """What a loop calls."""

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...

    def embed(self, images: Tensor) -> list[Tensor]: ...

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor: ...


def plain_loop(
    z: Tensor,
    steps: Sequence[Sequence[View]],
    networks: Networks,
    scheduler: Any,
    schedule: SyncSchedule,
) -> Tensor:
    """Denoises a canvas z (1, C, H, W) through the windows of each step.

    Every window has a solver of its own, so a multistep solver needs windows that stay in place.
    """
    solvers = [copy.deepcopy(scheduler) for _ in steps[0]]

    def cut(view: View) -> Tensor:
        return z.roll((-view.top, -view.left), (2, 3))[:, :, : view.size, : view.size]

    def put(x: Tensor, view: View) -> Tensor:
        canvas = torch.zeros_like(z)
        canvas[:, :, : view.size, : view.size] = x
        return canvas.roll((view.top, view.left), (2, 3))

    def picture_of(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        noise = networks.predict_noise(x, t)
        return networks.decode((x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()).clamp(-1, 1)

    for k, t in enumerate(scheduler.timesteps):
        views = steps[k % len(steps)]
        anchor = views[len(views) // 2]
        weight = schedule.weight * schedule.decay_rate**k
        synchronising = weight > 0 and k < schedule.threshold and (k + 1) % schedule.freq == 0
        if synchronising:
            with torch.no_grad():
                target = picture_of(cut(anchor), t)
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for view, solver in zip(views, solvers, strict=True):
            x = cut(view)
            if synchronising:
                x = x.clone().requires_grad_()
                loss = networks.distance(picture_of(x, t), networks.embed(target)).sum()
                (gradient,) = torch.autograd.grad(loss, x)
                x = (x if view is anchor else x - weight * gradient).detach()
            with torch.no_grad():
                x = solver.step(networks.predict_noise(x, t), t, x).prev_sample
            total += put(x, view)
            count += put(torch.ones_like(x), view)
        z = total / count
    return z
