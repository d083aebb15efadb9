"""Synchronising windows: SyncDiffusion (arXiv 2306.05178, section 4.2), and shared means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from panorama.errors import check_least
from panorama.sampling.canvas import Canvas, View
from panorama.sampling.denoiser import Denoiser
from panorama.sampling.low_band import smooth
from panorama.sampling.parts import part_weights, split_anchors
from panorama.sampling.solver import Solver

GRADIENT_SCALE = 2.0**10
"""Keeps gradients above the smallest number of half precision.

It is a power of two, so it changes nothing in single precision.
"""

SMOOTHNESS = 1 / 8
"""Standard deviation of the Gaussian that smooths shared means, in sides of a window."""

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
class SyncStep:
    """The synchronisation of windows in one step."""

    weight: float  # w_k, more than 0
    gradient: bool  # move windows by the gradient
    means: bool  # share means


@dataclass(frozen=True)
class SyncSettings:
    """Strength and steps of both ways to synchronise.

    Step k of a way that has n steps is a sync step if (k + 1) % freq == 0 and k < n. Its weight is
    weight * decay_rate ** k.

    Attributes:
        weight: of the first step, at least 0.
        decay_rate: factor of the weight from one step to the next, at least 0.
        freq: synchronise at every freq-th step, at least 1.
        threshold: number of first steps in which the gradient of a perceptual distance may move
            windows, as in the paper; at least 0.
        means: number of first steps in which windows may share the means of the anchor, see
            `Synchronizer.share_means`; at least 0.
        tiny_decoder: decode by the base model's AutoencoderTiny for the gradient, at a fraction of
            the cost of the VAE.
    """

    weight: float = 20.0
    decay_rate: float = 0.99
    freq: int = 1
    threshold: int = 5
    means: int = 0
    tiny_decoder: bool = False

    def __post_init__(self) -> None:
        check_least(self, weight=0, decay_rate=0, freq=1, threshold=0, means=0)

    def at(self, step: int) -> SyncStep | None:
        """Return what synchronises windows in a step, None if nothing does."""
        weight = self.weight * self.decay_rate**step
        gradient, means = step < self.threshold, step < self.means
        if (step + 1) % self.freq or not weight or not (gradient or means):
            return None
        return SyncStep(weight, gradient, means)


def keep_memory() -> bool:
    """Save no memory; see `PerceptualGradient.save_memory`."""
    return False


@dataclass(frozen=True)
class PerceptualGradient:
    """The gradient of a perceptual distance of windows from anchors."""

    denoise: Denoiser
    decode: Callable[[Tensor], Tensor]  # latents (N, C, h, w) to images (N, 3, H, W) in [-1, 1]
    perceptual: Perceptual
    solver: Solver
    save_memory: Callable[[], bool] = keep_memory  # called when memory runs out; True if it helped

    def embed(self, t: Tensor, x: Tensor, noise_pred: Tensor) -> Features:
        """Return the features of the images that windows x (N, C, h, w) are predicted to become."""
        return self.perceptual.embed(self.preview(t, x, noise_pred))

    def move(
        self,
        t: Tensor,
        features: Features,
        weights: Tensor,
        x: Tensor,
        views: Sequence[View],
    ) -> Tensor:
        """Move windows by -w grad_x LPIPS(decode(x0(x)), anchor) (algorithm 1, line 8).

        The paper's latents have unit variance. For latents of variance v, scaled by sqrt(v), the
        same move is v times the gradient.

        Args:
            t: timestep.
            features: of P anchors.
            weights: w for each window and anchor, (N, P), on the CPU, which reads them.
            x: windows (N, C, h, w).
            views: their N views.
        """

        def distance(x: Tensor) -> Tensor:
            images = self.preview(t, x, self.denoise(x, t, views))
            total = x.new_zeros(len(x))
            for part, weight in enumerate(weights.unbind(1)):
                if weight.any():
                    anchor = [f[part, None] for f in features]
                    apart = self.perceptual.distance(images, anchor)  # (N,)
                    total = total + weight.to(x.device, non_blocking=True) * apart
            return total

        return x - self.solver.level(t).variance * gradient(distance, x)

    def preview(self, t: Tensor, x: Tensor, noise_pred: Tensor) -> Tensor:
        """Decode the predicted x0 of windows to images (N, 3, H, W) in [-1, 1]."""
        return self.decode(self.solver.x0(x, noise_pred, t)).clamp(-1, 1)


@dataclass(frozen=True)
class Anchors:
    """The anchor of each of P parts of the canvas: the window that others are moved towards."""

    x: Tensor  # (P, C, h, w)
    noise_pred: Tensor  # (P, C, h, w)
    features: Features | None  # for the gradient


@dataclass(frozen=True)
class Synchronizer:
    """Move windows towards the anchor of their part, or of two parts if they lie between."""

    settings: SyncSettings
    denoise: Denoiser
    canvas: Canvas
    window: int  # side of a window, latent cells
    parts: int = 1  # that have prompts of their own
    gradient: PerceptualGradient | None = None

    def split(self, views: Sequence[View]) -> tuple[list[View], list[View]]:
        """Take the anchor of each part out of views; see `split_anchors`."""
        return split_anchors(self.canvas, self.parts, views)

    def anchors(self, t: Tensor, step: SyncStep, x: Tensor, noise_pred: Tensor) -> Anchors:
        """Prepare what windows are moved towards, from P anchors (P, C, h, w) and their noise."""
        features = None
        if self.gradient and step.gradient:
            features = self.gradient.embed(t, x, noise_pred)
        return Anchors(x, noise_pred, features)

    def update(
        self, t: Tensor, anchors: Anchors, step: SyncStep, x: Tensor, views: Sequence[View]
    ) -> tuple[Tensor, Tensor]:
        """Move windows, and predict the noise in them.

        Args:
            t: timestep.
            anchors: from `anchors`, of the same step.
            step: what synchronises windows.
            x: windows (N, C, h, w).
            views: their N views.

        Returns:
            The moved windows and their noise, (N, C, h, w) each.
        """
        parts = part_weights(self.canvas, self.parts, views).to(x.dtype)  # (N, P)
        share = self.share_means if step.means else keep
        if self.gradient and anchors.features is not None:
            x = self.gradient.move(t, anchors.features, step.weight * parts, x, views)
        parts = parts.to(x.device, non_blocking=True)
        x = share(x, anchors.x, step.weight, parts)
        return x, share(self.denoise(x, t, views), anchors.noise_pred, step.weight, parts)

    def share_means(self, x: Tensor, anchors: Tensor, weight: float, parts: Tensor) -> Tensor:
        """Move the means of windows towards those of anchors.

        The means are taken along the axes on which windows move: on a wide canvas, of each row.
        They set the palette and leave the shapes alone. The move, w / (1 + w) of the difference
        between the means, is smoothed along the other axis: on a wide canvas windows then share a
        palette at each height, but not the height of every hill. Where the difference is smooth,
        a mean m becomes the one that minimises |m - own|^2 + w |m - anchor|^2.

        Both latents and the noise in them are moved. Since the first are a sum of x0 and noise,
        x0 moves alike, and so does the history of a multistep solver.

        Args:
            x: latents of windows or the noise in them, (N, C, h, w).
            anchors: the same of the anchors, (P, C, h, w).
            weight: w.
            parts: weight of each anchor for each window, (N, P), rows of sum 1.
        """
        dims = [{"x": -1, "y": -2}[axis] for axis in self.canvas.moving_axes(self.window)]
        target = torch.einsum("np,pchw->nchw", parts, anchors.mean(dims, keepdim=True))
        difference = target - x.mean(dims, keepdim=True)
        return x + weight / (1 + weight) * smooth(difference, self.window * SMOOTHNESS)


def keep(x: Tensor, *_: object) -> Tensor:
    """Return windows as they are."""
    return x


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of function(x) (N,) with respect to x (N, ...)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (scaled,) = torch.autograd.grad(GRADIENT_SCALE * function(x).sum(), x)
    return scaled / GRADIENT_SCALE
