"""SyncDiffusion as it was published: one window after the other, nothing shared or batched.

The published code also takes the anchor's gradient and discards it. `sample()` is held against this
loop: its results by the tests, its speed by `script/bench`. For the tests the loop also takes
windows that hang over the ends or are feathered, and `SyncSettings.means`.
"""

import copy
from collections.abc import Sequence
from math import exp
from typing import Any, Protocol

import torch
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.images.vae import decode
from panorama.sampling.canvas import Axis, View
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.synchronize import SyncSettings


class Networks(Protocol):
    """The networks that the loop calls."""

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in windows (N, C, h, w) of unit variance, with guidance."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to images (N, 3, H, W)."""
        ...

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the perceptual features of images."""
        ...

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """Return the distances (N,) of images from embedded ones."""
        ...


class StableDiffusion:
    """The networks of Stable Diffusion 2, with guidance in one batch."""

    def __init__(self, base: BaseModel, conditioning: Conditioning) -> None:
        self._base, self._conditioning = base, conditioning
        self.embed, self.distance = base.perceptual.embed, base.perceptual.distance

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise; see `Networks`."""
        unet, states = self._base.unet, self._conditioning.states[:, 0]  # (G, n * L, D)
        states = states.repeat_interleave(len(x), 0)
        noise = unet(x.to(unet.dtype).repeat(2, 1, 1, 1), t, states).sample.float()
        uncond, text = noise.chunk(2)
        noise_pred: Tensor = uncond + self._conditioning.guidance_scale * (text - uncond)
        return noise_pred

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents; see `Networks`."""
        return decode(self._base.vae, x)


def plain_loop(
    z: Tensor,
    steps: Sequence[Sequence[View]],
    networks: Networks,
    scheduler: Any,
    settings: SyncSettings,
    closed: Axis = "",
) -> Tensor:
    """Denoise a canvas through the windows of each step.

    The parametrisation is written out from its formulas. Every window has a scheduler of its own
    for as long as it stays in place, so a multistep scheduler needs windows that stay.

    Args:
        z: the canvas (1, C, H, W), as the scheduler starts from.
        steps: the views of each step.
        networks: called with one window at a time.
        scheduler: of diffusers, with whole timesteps already set.
        settings: of synchronising with a single anchor.
        closed: the axis of the canvas that closes.

    Returns:
        The denoised canvas, (1, C, H, W).
    """
    exploding = scheduler.init_noise_sigma != 1  # as Euler's: x = x0 + sigma eps
    schedulers: dict[View, Any] = {}

    def predict_noise(x: Tensor, t: Tensor) -> Tensor:
        return networks.predict_noise(x / variance(t).sqrt(), t)

    def variance(t: Tensor) -> Tensor:
        sigma2 = 1 / scheduler.alphas_cumprod[int(t)] - 1
        return 1 + sigma2 if exploding else torch.ones(())

    def image_of(x: Tensor, t: Tensor) -> Tensor:
        noise, alpha_bar = predict_noise(x, t), scheduler.alphas_cumprod[int(t)]
        if exploding:
            x0 = x - (1 / alpha_bar - 1).sqrt() * noise
        else:
            x0 = (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        return networks.decode(x0).clamp(-1, 1)

    for k, (t, views) in enumerate(zip(scheduler.timesteps, steps, strict=True)):
        anchor = views[len(views) // 2]
        schedulers = {v: schedulers.get(v) or copy.deepcopy(scheduler) for v in views}
        weight = settings.weight * settings.decay_rate**k
        moving = weight > 0 and (k + 1) % settings.freq == 0
        anchor_x = cut(z, anchor, closed)
        with torch.no_grad():
            target = image_of(anchor_x, t) if moving and k < settings.threshold else None
            anchor_noise = predict_noise(anchor_x, t) if moving and k < settings.means else None
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for view, own in schedulers.items():
            x = cut(z, view, closed)
            if target is not None:
                x = x.clone().requires_grad_()
                loss = networks.distance(image_of(x, t), networks.embed(target)).sum()
                (gradient,) = torch.autograd.grad(loss, x)
                x = (x if view is anchor else x - weight * variance(t) * gradient).detach()
            if anchor_noise is not None:
                x = share_means(x, anchor_x, weight, z, closed)
            with torch.no_grad():
                noise = predict_noise(x, t)
                if anchor_noise is not None:
                    noise = share_means(noise, anchor_noise, weight, z, closed)
                own.scale_model_input(x, t)  # Euler expects this call before each step
                x = own.step(noise, t, x).prev_sample
            add(total, x * feather(view, x.device), view, closed)
            add(count, torch.ones_like(x) * feather(view, x.device), view, closed)
        z = total / count
    return z


def share_means(x: Tensor, anchor: Tensor, weight: float, z: Tensor, closed: Axis) -> Tensor:
    """Move the means of a window (1, C, h, w) towards those of the anchor.

    They are taken along the axes on which the windows of a canvas z (1, C, H, W) move, and the move
    is smoothed along the others by a Gaussian of an eighth of the window.
    """
    moves = [(-2, closed == "y"), (-1, closed == "x")]
    dims = [dim for dim, closes in moves if closes or z.shape[dim] > x.shape[dim]]
    difference = anchor.mean(dims, keepdim=True) - x.mean(dims, keepdim=True)
    for dim in (-2, -1):
        difference = blur(difference, dim, x.shape[dim] / 8)
    return x + weight / (1 + weight) * difference


def blur(x: Tensor, dim: int, sigma: float) -> Tensor:
    """Average along a dimension, weighted by a Gaussian of the distance."""
    lines, length = [], x.shape[dim]
    for place in range(length):
        weights = [exp(-0.5 * ((place - other) / sigma) ** 2) for other in range(length)]
        total = sum(w * x.select(dim, other) for other, w in enumerate(weights))
        lines.append(total / sum(weights))
    return torch.stack(lines, dim)


def cut(z: Tensor, view: View, closed: Axis) -> Tensor:
    """Cut a window out of a canvas (1, C, H, W), mirrored beyond its flat ends."""
    if inside(z, view):
        return z[:, :, view.top : view.top + view.height, view.left : view.left + view.width]
    height, width = z.shape[-2:]
    rows = [cell(view.top + k, height, closed == "y") for k in range(view.height)]
    columns = [cell(view.left + k, width, closed == "x") for k in range(view.width)]
    return z[:, :, rows][..., columns]


def inside(z: Tensor, view: View) -> bool:
    """Return True if a view lies on a canvas (1, C, H, W) as it is, so that a slice will do."""
    height, width = z.shape[-2:]
    fits = view.top + view.height <= height and view.left + view.width <= width
    return min(view.top, view.left) >= 0 and fits


def cell(place: int, length: int, wraps: bool) -> int:
    """Return the cell of an axis that is seen at a place, which may lie beyond the ends."""
    if wraps:
        return place % length
    place %= 2 * length  # mirrored twice, an axis repeats itself
    return min(place, 2 * length - 1 - place)


def add(total: Tensor, x: Tensor, view: View, closed: Axis) -> None:
    """Add a window (1, C, h, w) to a canvas (1, C, H, W), without what lies beyond flat ends."""
    if inside(total, view):
        cut(total, view, closed).add_(x)
        return
    height, width = total.shape[-2:]
    rows = [k for k in range(view.height) if closed == "y" or 0 <= view.top + k < height]
    columns = [k for k in range(view.width) if closed == "x" or 0 <= view.left + k < width]
    tops = torch.tensor([(view.top + k) % height for k in rows])[:, None]
    lefts = torch.tensor([(view.left + k) % width for k in columns])
    total[:, :, tops, lefts] += x[:, :, rows][..., columns]


def feather(view: View, device: torch.device) -> Tensor:
    """Return the weight of each cell (h, w) of a view, which falls towards a feathered edge."""
    if not view.feathered:
        return torch.ones(view.height, view.width, device=device)
    rows, columns = (
        torch.tensor([(min(k, size - 1 - k) + 0.5) / size for k in range(size)], device=device)
        for size in (view.height, view.width)
    )
    return torch.outer(rows, columns)
