"""The synchronising step of SyncDiffusion (arXiv 2306.05178, section 4.2, algorithm 1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from panorama.errors import check_least
from panorama.sampling.canvas import View
from panorama.sampling.denoiser import Denoiser
from panorama.sampling.solver import Solver

GRADIENT_SCALE = 2.0**10
"""Keeps gradients above the smallest number of half precision.

It is a power of two, so it changes nothing in single precision.
"""

X0_SCALE, X0_DECAY = 300.0, 10.0
"""The gradient of x0 is multiplied by X0_SCALE * (1 - alpha_bar) ** X0_DECAY.

At the first steps x0 then moves about as far as the full gradient takes it. A UNet amplifies a move
of x there: the embedded family's by 269, the median over the first six of 50 steps. Once the image
has formed, from alpha_bar 0.06 on, it amplifies by about 1. The scale falls later than that,
because one that fell as early left windows less alike, and one that stayed constant spoilt images.
docs/speed.md has the figures.
"""

Features = list[Tensor]
"""For each stage of a perceptual network its features, (N, C, h, w)."""


class Perceptual(Protocol):
    """A perceptual distance that computes its fixed side once."""

    def embed(self, images: Tensor) -> Features:
        """Return the features of images (N, 3, H, W) in [-1, 1]."""
        ...

    def distance(self, images: Tensor, features: Features) -> Tensor:
        """Return the distances (N,) of images (N, 3, H, W) in [-1, 1] from embedded ones."""
        ...


@dataclass(frozen=True)
class SyncSettings:
    """Strength, steps and kind of the synchronising gradient.

    Step k is a sync step if (k + 1) % freq == 0 and k < threshold. Its weight is
    weight * decay_rate ** k.

    Attributes:
        weight: of the first step, at least 0.
        decay_rate: factor of the weight from one step to the next, at least 0.
        freq: synchronise at every freq-th step, at least 1.
        threshold: number of steps, from the first on, that may be sync steps.
        through_unet: take the gradient with respect to latents, as the paper does. Otherwise take
            it with respect to x0, which needs no backward pass through the UNet.
        pooling: side of the squares of latent cells that are averaged before they are decoded.
    """

    weight: float = 20.0
    decay_rate: float = 0.99
    freq: int = 1
    threshold: int = 5
    through_unet: bool = True
    pooling: int = 1

    def __post_init__(self) -> None:
        check_least(self, weight=0, decay_rate=0, freq=1, threshold=0, pooling=1)

    def weight_at(self, step: int) -> float:
        """Return the weight w_k of a step, 0 if it is no sync step."""
        if step >= self.threshold or (step + 1) % self.freq:
            return 0.0
        return self.weight * self.decay_rate**step


def keep_memory() -> bool:
    """Save no memory; see `Synchronizer.save_memory`."""
    return False


@dataclass(frozen=True)
class Synchronizer:
    """Move windows towards the anchor window, by the gradient of a perceptual distance."""

    denoise: Denoiser
    decode: Callable[[Tensor], Tensor]  # latents (N, C, h, w) to images (N, 3, H, W) in [-1, 1]
    perceptual: Perceptual
    solver: Solver
    settings: SyncSettings
    save_memory: Callable[[], bool] = keep_memory  # after an OOM; True to try the windows again

    def embed(self, x: Tensor, noise_pred: Tensor, t: Tensor) -> Features:
        """Return the features of the images that windows x (N, C, h, w) are predicted to become."""
        return self.perceptual.embed(self.preview(self.solver.x0(x, noise_pred, t)))

    def update(
        self, t: Tensor, target: Features, weight: float, x: Tensor, views: Sequence[View]
    ) -> tuple[Tensor, Tensor]:
        """Move windows, and predict the noise in them.

        Args:
            t: timestep.
            target: features of the anchor.
            weight: weight of the gradient.
            x: windows (N, C, h, w).
            views: their N views.

        Returns:
            The moved windows and their noise, (N, C, h, w) each.
        """
        move = self.move_latents if self.settings.through_unet else self.move_x0
        return move(t, target, weight, x, views)

    def move_latents(
        self, t: Tensor, target: Features, weight: float, x: Tensor, views: Sequence[View]
    ) -> tuple[Tensor, Tensor]:
        """Move x by -w grad_x LPIPS(decode(x0(x)), anchor) (algorithm 1, line 8).

        The paper's latents have unit variance. For latents of variance v, scaled by sqrt(v), the
        same move is v times the gradient.
        """

        def distance(x: Tensor) -> Tensor:
            return self.distance(self.solver.x0(x, self.denoise(x, t, views), t), target)

        x = x - weight * self.solver.level(t).variance * gradient(distance, x)
        return x, self.denoise(x, t, views)

    def move_x0(
        self, t: Tensor, target: Features, weight: float, x: Tensor, views: Sequence[View]
    ) -> tuple[Tensor, Tensor]:
        """Move x0 by its own gradient, and keep the noise (cf. arXiv 2311.16424).

        The move is scaled to what `move_latents` does, see `X0_SCALE`. In the second half
        of a run almost nothing moves.
        """
        noise_pred = self.denoise(x, t, views)
        level = self.solver.level(t)
        scale = X0_SCALE * (1 - level.alpha_bar) ** X0_DECAY
        x0 = self.solver.x0(x, noise_pred, t)
        move = scale * weight * gradient(lambda x0: self.distance(x0, target), x0)
        # The gradient of LPIPS has no bound where features vanish. A move longer than x0 itself
        # destroys the window.
        move = move * (norm(x0) / norm(move).clamp(min=1e-12)).clamp(max=1)
        return x - level.alpha * move, noise_pred

    def distance(self, x0: Tensor, target: Features) -> Tensor:
        """Return the distances (N,) of clean latents x0 (N, C, h, w) from the anchor."""
        return self.perceptual.distance(self.preview(x0), target)

    def preview(self, x0: Tensor) -> Tensor:
        """Decode clean latents (N, C, h, w), at a lower resolution if pooled, to [-1, 1]."""
        return self.decode(avg_pool2d(x0, self.settings.pooling)).clamp(-1, 1)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of function(x) (N,) with respect to x (N, ...)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (scaled,) = torch.autograd.grad(GRADIENT_SCALE * function(x).sum(), x)
    return scaled / GRADIENT_SCALE


def norm(x: Tensor) -> Tensor:
    """Return the length of each of x (N, C, h, w), (N, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return length
