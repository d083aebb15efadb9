"""SyncDiffusion's gradient step (arXiv 2306.05178, section 4.2, algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

GRADIENT_SCALE = 2.0**10
"""Keeps gradients above half precision's smallest number; a power of two, so that single precision
does not notice.
"""

DIRECT_SCALE, DIRECT_DECAY = 300.0, 10.0
"""How far a `DirectSynchronizer` moves x0 where `Synchronizer` would move x by its gradient:
DIRECT_SCALE * (1 - alpha_bar) ** DIRECT_DECAY times the gradient with respect to x0.

At the first steps x0 then moves about as far as the full gradient takes it, for a UNet makes much
more of a move of x than the move itself: that of the embedded family 269 times as much as the
gradient is long, in the median of the first six of 50 steps. Once the picture has formed, from
alpha_bar 0.06 on, it is about once. The scale falls later than that, for one that fell as early
left windows less alike; one that stayed spoilt pictures. docs/speed.md has the figures.
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
        pooling: how many cells' mean the distance sees as one, along either axis; 1 for each cell.
    """

    predict_noise: PredictNoise
    decode: Callable[[Tensor], Tensor]
    perceptual: Perceptual
    alphas_cumprod: Tensor
    pooling: int = 1

    def embed(self, x: Tensor, noise_pred: Tensor, t: Tensor) -> Features:
        """The features of the image that latents x (N, C, s, s) are predicted to end in."""
        return self.perceptual.embed(self.preview(self.predict_x0(x, noise_pred, t)))

    def step(self, x: Tensor, t: Tensor, anchor: Features, weight: float) -> tuple[Tensor, Tensor]:
        """X - weight * grad_x distance(decode(x0(x)), anchor), and the noise predicted there.

        Args:
            x: windows (N, C, s, s).
            t: the timestep.
            anchor: the features that they should come near to.
            weight: how far they go.
        """

        def distance(x: Tensor) -> Tensor:
            return self.distance(self.predict_x0(x, self.predict_noise(x, t), t), anchor)

        x = x - weight * gradient(distance, x)
        return x, self.predict_noise(x, t)

    def distance(self, x0: Tensor, anchor: Features) -> Tensor:
        """The distances (N,) of clean latents x0 (N, C, s, s) to the anchor."""
        return self.perceptual.distance(self.preview(x0), anchor)

    def preview(self, x0: Tensor) -> Tensor:
        """decode(x0) in [-1, 1], (N, 3, H, W)."""
        return self.decode(avg_pool2d(x0, self.pooling)).clamp(-1, 1)

    def predict_x0(self, x: Tensor, noise_pred: Tensor, t: Tensor) -> Tensor:
        """The clean latents (N, C, s, s) that x and its noise mean."""
        return predict_x0(x, noise_pred, self.alphas_cumprod[t.long()])


@dataclass(frozen=True)
class DirectSynchronizer(Synchronizer):
    """Moves what windows are predicted to end in, and not the windows themselves.

    No gradient goes through the UNet, whose one prediction serves both (manifold-preserving
    guidance, arXiv 2311.16424). In the later half of the steps it moves next to nothing, see
    `DIRECT_SCALE`.
    """

    def step(self, x: Tensor, t: Tensor, anchor: Features, weight: float) -> tuple[Tensor, Tensor]:
        """X with x0 - scale * weight * grad_x0 distance(decode(x0), anchor), and the same noise."""
        noise_pred = self.predict_noise(x, t)
        x0 = self.predict_x0(x, noise_pred, t)
        alpha_bar = self.alphas_cumprod[t.long()]
        scale = DIRECT_SCALE * (1 - alpha_bar) ** DIRECT_DECAY
        move = scale * weight * gradient(lambda x0: self.distance(x0, anchor), x0)
        return x - alpha_bar.sqrt() * move, noise_pred


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grad_x function(x) for each of x (N, ...) and its value (N,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (scaled,) = torch.autograd.grad(GRADIENT_SCALE * function(x).sum(), x)
    return scaled / GRADIENT_SCALE


def predict_x0(x: Tensor, noise_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latents that x and its noise mean (DDIM, arXiv 2010.02502, equation 9)."""
    return (x - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
