"""SyncDiffusion as it was published: one window after the other, nothing shared or batched.

The published code also takes the anchor's gradient and discards it. `sample()` is held against this
loop: its results by the tests, its speed by `script/bench`.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from panorama.base_model import BaseModel
from panorama.images.vae import decode
from panorama.sampling.canvas import View
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
        unet, states = self._base.unet, self._conditioning.states.repeat_interleave(len(x), 0)
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
) -> Tensor:
    """Denoise a canvas through the windows of each step.

    The parametrisation is written out from its formulas. Every window has a scheduler of its own,
    so a multistep scheduler needs windows that stay in place.

    Args:
        z: the canvas (1, C, H, W), as the scheduler starts from.
        steps: the views of each step.
        networks: called with one window at a time.
        scheduler: of diffusers, with whole timesteps already set.
        settings: of the gradient through the UNet, without pooling.

    Returns:
        The denoised canvas, (1, C, H, W).
    """
    exploding = scheduler.init_noise_sigma != 1  # as Euler's: x = x0 + sigma eps
    schedulers = [copy.deepcopy(scheduler) for _ in steps[0]]

    def cut(view: View) -> Tensor:
        return z.roll((-view.top, -view.left), (2, 3))[:, :, : view.height, : view.width]

    def put(x: Tensor, view: View) -> Tensor:
        canvas = torch.zeros_like(z)
        canvas[:, :, : view.height, : view.width] = x
        return canvas.roll((view.top, view.left), (2, 3))

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
        weight = settings.weight * settings.decay_rate**k
        synchronising = weight > 0 and k < settings.threshold and (k + 1) % settings.freq == 0
        if synchronising:
            with torch.no_grad():
                target = image_of(cut(anchor), t)
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for view, own in zip(views, schedulers, strict=True):
            x = cut(view)
            if synchronising:
                x = x.clone().requires_grad_()
                loss = networks.distance(image_of(x, t), networks.embed(target)).sum()
                (gradient,) = torch.autograd.grad(loss, x)
                move = weight * variance(t) * gradient
                x = (x if view is anchor else x - move).detach()
            with torch.no_grad():
                own.scale_model_input(x, t)  # Euler expects this call before each step
                x = own.step(predict_noise(x, t), t, x).prev_sample
            total += put(x, view)
            count += put(torch.ones_like(x), view)
        z = total / count
    return z
