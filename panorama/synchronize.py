"""SyncDiffusion's gradient step (arXiv 2306.05178, section 4.2, algorithm 1)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

GRADIENT_SCALE = 2.0**10
"""Keeps gradients above half precision's smallest number; a power of two, so that single precision
does not notice.
"""

Features = list[Tensor]
PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""From latents (N, C, s, s) and a timestep to the guided noise prediction (N, C, s, s)."""


class Perceptual(Protocol):
    """A perceptual distance whose fixed side is computed once."""

    def embed(self, images: Tensor) -> Features:
        """The features of images (N, 3, H, W) in [-1, 1]."""
        ...

    def distance(self, images: Tensor, features: Features) -> Tensor:
        """The distances (N,) of images (N, 3, H, W) in [-1, 1] to embedded ones."""
        ...


@dataclass(frozen=True)
class SyncSchedule:
    """At which steps windows are synchronised, and how strongly.

    Step k is a sync step if (k + 1) % freq == 0 and k < threshold; its weight is
    weight * decay_rate ** k.
    """

    weight: float = 20.0
    decay_rate: float = 0.99
    freq: int = 1
    threshold: int = 5

    def __call__(self, step: int) -> float:
        """The weight w_k of step k, 0 where the windows are not synchronised."""
        if step >= self.threshold or (step + 1) % self.freq:
            return 0.0
        return self.weight * self.decay_rate**step


@dataclass(frozen=True)
class Synchronizer:
    """Moves windows towards the anchor, as far as a perceptual distance sees them.

    Attributes:
        predict_noise: the guided noise prediction.
        decode: from latents (N, C, s, s) to images (N, 3, H, W), about [-1, 1].
        perceptual: the distance.
        alphas_cumprod: alpha_bar of every timestep.
    """

    predict_noise: PredictNoise
    decode: Callable[[Tensor], Tensor]
    perceptual: Perceptual
    alphas_cumprod: Tensor

    def embed(self, x: Tensor, noise_pred: Tensor, t: Tensor) -> Features:
        """The features of the image that latents x (N, C, s, s) are predicted to end in."""
        return self.perceptual.embed(self.preview(x, noise_pred, t))

    def step(self, x: Tensor, t: Tensor, anchor: Features, weight: float) -> Tensor:
        """X - weight * grad_x distance(decode(x0(x)), anchor), for windows x (N, C, s, s)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            images = self.preview(x, self.predict_noise(x, t), t)
            distance = self.perceptual.distance(images, anchor).sum()
            (gradient,) = torch.autograd.grad(GRADIENT_SCALE * distance, x)
        return x.detach() - weight / GRADIENT_SCALE * gradient

    def preview(self, x: Tensor, noise_pred: Tensor, t: Tensor) -> Tensor:
        """decode(x0) in [-1, 1], (N, 3, H, W)."""
        return self.decode(predict_x0(x, noise_pred, self.alphas_cumprod[t.long()])).clamp(-1, 1)


def predict_x0(x: Tensor, noise_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that x and its noise mean (DDIM, arXiv 2010.02502, equation 9)."""
    return (x - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Keeps the gradient step from saving anything for the gradients of weights."""
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
