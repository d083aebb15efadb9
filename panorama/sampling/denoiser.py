"""Guided noise prediction for the windows of a canvas, by the UNet of SD 2 or SDXL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from panorama.sampling.canvas import Canvas, View, crop
from panorama.sampling.parts import part_weights
from panorama.sampling.solver import Solver


class Denoiser(Protocol):
    """Predict the noise in windows of a canvas, with guidance."""

    def __call__(self, x: Tensor, t: Tensor, views: Sequence[View]) -> Tensor:
        """Predict the noise.

        Args:
            x: latents of N windows (N, C, h, w), as the solver has them.
            t: timestep.
            views: where each window lies on its canvas.

        Returns:
            The predicted noise, (N, C, h, w).
        """
        ...


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The embeddings of G texts for each of P parts of the canvas.

    With guidance G is 2, the negative prompt and the prompt; without it G is 1, the prompt.
    """

    states: Tensor  # of the text encoders, (G, P, n * L, D)
    pooled: Tensor | None  # of SDXL, (G, P, D'); None for SD 2
    guidance_scale: float  # weight of classifier-free guidance

    @property
    def parts(self) -> int:
        """The number of parts."""
        return self.states.shape[1]


@dataclass(frozen=True, eq=False)
class DepthControl:
    """A ControlNet and the depth that it follows."""

    controlnet: Any
    image: Tensor  # of the whole canvas in pixels, (1, 3, H * f, W * f) in [0, 1], 1 is nearest
    scale: float  # how closely to follow it, more than 0


class UNetDenoiser:
    """Denoise windows by a UNet2DConditionModel that predicts noise.

    It never waits for a GPU: what the processor computes is copied without blocking.

    Args:
        unet: of SD 2 or SDXL.
        conditioning: the prompts.
        canvas: the canvas under the windows.
        solver: scales latents to the UNet's input.
        factor: pixels per latent cell.
        control: a depth image to follow.
    """

    def __init__(
        self,
        unet: Any,
        conditioning: Conditioning,
        canvas: Canvas,
        solver: Solver,
        factor: int,
        control: DepthControl | None = None,
    ) -> None:
        self._unet, self._solver, self._control = unet, solver, control
        self._dtype = unet.dtype  # scans every weight, so read it once
        self._canvas, self._factor = canvas, factor
        self._states = conditioning.states.to(unet.device, self._dtype)
        self._pooled = conditioning.pooled
        if self._pooled is not None:
            self._pooled = self._pooled.to(unet.device, self._dtype)
        self._guidance_scale = conditioning.guidance_scale
        self.parts = conditioning.parts

    def __call__(self, x: Tensor, t: Tensor, views: Sequence[View]) -> Tensor:
        """Predict noise with classifier-free guidance (arXiv 2207.12598, equation 6)."""
        groups = len(self._states)  # negative prompt and prompt share a batch
        inputs = self._solver.scale(x, t).to(self._dtype)
        inputs = inputs.repeat(groups, 1, 1, 1)  # (G * N, C, h, w)
        weights = part_weights(self._canvas, self.parts, views)  # (N, P)
        weights = weights.to(self._states, non_blocking=True)
        t = t.to(x.device, non_blocking=True)
        options: dict[str, Any] = {
            "encoder_hidden_states": interpolate(self._states, weights),  # (G * N, n * L, D)
            "added_cond_kwargs": self._micro_conditioning(views, weights),
            "return_dict": False,
        }
        residuals = self._follow(inputs, t, views, options)
        (output,) = self._unet(inputs, t, **options, **residuals)  # (G * N, C, h, w)
        noise_pred: Tensor = output.to(x.dtype)
        if groups == 1:
            return noise_pred
        uncond, text = noise_pred.chunk(2)
        return uncond + self._guidance_scale * (text - uncond)

    def _micro_conditioning(
        self, views: Sequence[View], weights: Tensor
    ) -> dict[str, Tensor] | None:
        """Tell SDXL which part of which image each window is (arXiv 2307.01952, section 2.2)."""
        if self._pooled is None:
            return None
        sizes = torch.tensor([self._time_ids(view) for view in views])
        sizes = sizes.to(self._pooled.device, torch.float32, non_blocking=True)
        return {
            "text_embeds": interpolate(self._pooled, weights),  # (G * N, D')
            "time_ids": sizes.repeat(len(self._pooled), 1),  # (G * N, 6)
        }

    def _time_ids(self, view: View) -> list[int]:
        """Return original size, crop coordinates and target size of a window in pixels.

        On a closed axis every place is alike, so the crop coordinate there is 0. A window that
        hangs over a flat end has that of the nearest window within the canvas.
        """
        canvas = self._canvas
        top = 0 if canvas.closed == "y" else clamp(view.top, canvas.height - view.height)
        left = 0 if canvas.closed == "x" else clamp(view.left, canvas.width - view.width)
        cells = (canvas.height, canvas.width, top, left, view.height, view.width)
        return [self._factor * n for n in cells]

    def _follow(
        self, inputs: Tensor, t: Tensor, views: Sequence[View], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the ControlNet's residuals for the UNet, {} without a depth image."""
        if self._control is None:
            return {}
        f = self._factor
        pixels = [View(f * v.top, f * v.left, f * v.height, f * v.width) for v in views]
        depth = crop(self._control.image, pixels, self._canvas.closed)  # (N, 3, h * f, w * f)
        down, middle = self._control.controlnet(
            inputs,
            t,
            controlnet_cond=depth.to(self._dtype).repeat(len(inputs) // len(views), 1, 1, 1),
            conditioning_scale=self._control.scale,
            **options,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def clamp(value: int, largest: int) -> int:
    """Return the number from 0 to `largest` that is nearest to a value."""
    return min(max(value, 0), largest)


def interpolate(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Mix embeddings of P parts, (G, P, ...), by their weights in N windows, to (G * N, ...)."""
    return torch.einsum("np,gp...->gn...", weights, embeddings).flatten(0, 1)
