"""Guided noise prediction for the windows of a canvas, by the UNet of SD 2 or SDXL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from panorama.sampling.canvas import Canvas, View, crop
from panorama.sampling.graphs import Graphs
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


@dataclass(frozen=True, eq=False)
class Networks:
    """A UNet, and a ControlNet if there is depth to follow, as one function of tensors."""

    unet: Any
    control: DepthControl | None

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        states: Tensor,
        pooled: Tensor | None,
        sizes: Tensor | None,
        depth: Tensor | None,
    ) -> Tensor:
        """Predict the noise in N windows.

        Args:
            x: latents, scaled for the UNet, (N, C, h, w).
            t: timestep.
            states: of the text encoders, (N, n * L, D).
            pooled: of SDXL's second text encoder, (N, D').
            sizes: SDXL's time ids, (N, 6).
            depth: of the windows in pixels, (N, 3, h * f, w * f).

        Returns:
            The predicted noise, (N, C, h, w).
        """
        options: dict[str, Any] = {
            "encoder_hidden_states": states,
            "added_cond_kwargs": None,
            "return_dict": False,
        }
        if pooled is not None:
            options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        residuals: dict[str, Any] = {}
        if self.control is not None:
            down, middle = self.control.controlnet(
                x, t, controlnet_cond=depth, conditioning_scale=self.control.scale, **options
            )
            residuals["down_block_additional_residuals"] = down
            residuals["mid_block_additional_residual"] = middle
        (output,) = self.unet(x, t, **options, **residuals)
        prediction: Tensor = output
        return prediction


class UNetDenoiser:
    """Denoise windows by a UNet2DConditionModel that predicts noise.

    The CPU waits for the GPU only while a graph is recorded: copies to the GPU never block.

    Args:
        unet: of SD 2 or SDXL.
        conditioning: the prompts.
        canvas: the canvas under the windows.
        solver: scales latents to the UNet's input.
        factor: pixels per latent cell.
        control: a depth image to follow.
        graphs: replay calls of the networks as CUDA graphs, see `Graphs`. The networks stay as they
            are while this denoiser is used.
    """

    def __init__(
        self,
        unet: Any,
        conditioning: Conditioning,
        canvas: Canvas,
        solver: Solver,
        factor: int,
        control: DepthControl | None = None,
        graphs: bool = False,
    ) -> None:
        self._solver, self._control = solver, control
        self._dtype = unet.dtype  # scans every weight, so read it once
        self._canvas, self._factor = canvas, factor
        self._states = conditioning.states.to(unet.device, self._dtype)
        self._pooled = conditioning.pooled
        if self._pooled is not None:
            self._pooled = self._pooled.to(unet.device, self._dtype)
        self._guidance_scale = conditioning.guidance_scale
        self.parts = conditioning.parts
        networks = Networks(unet, control)
        self._predict = Graphs(networks) if graphs else networks

    def __call__(self, x: Tensor, t: Tensor, views: Sequence[View]) -> Tensor:
        """Predict noise with classifier-free guidance (arXiv 2207.12598, equation 6)."""
        groups = len(self._states)  # negative prompt and prompt share a batch
        inputs = self._solver.scale(x, t).to(self._dtype)
        weights = part_weights(self._canvas, self.parts, views)  # (N, P)
        weights = weights.to(self._states, non_blocking=True)
        pooled = sizes = depth = None
        if self._pooled is not None:
            pooled = interpolate(self._pooled, weights)  # (G * N, D')
            sizes = self._micro_conditioning(views).to(x.device, non_blocking=True)
            sizes = sizes.repeat(groups, 1)  # (G * N, 6)
        if self._control is not None:
            depth = self._depth(self._control, views).repeat(groups, 1, 1, 1)
        output = self._predict(
            inputs.repeat(groups, 1, 1, 1),  # (G * N, C, h, w)
            t.to(x.device, non_blocking=True),
            interpolate(self._states, weights),  # (G * N, n * L, D)
            pooled,
            sizes,
            depth,
        )
        noise_pred: Tensor = output.to(x.dtype)
        if groups == 1:
            return noise_pred
        uncond, text = noise_pred.chunk(2)
        return uncond + self._guidance_scale * (text - uncond)

    def _micro_conditioning(self, views: Sequence[View]) -> Tensor:
        """Tell SDXL which part of which image each window is (arXiv 2307.01952, section 2.2).

        Returns:
            The time ids of N windows, (N, 6).
        """
        return torch.tensor([self._time_ids(view) for view in views], dtype=torch.float32)

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

    def _depth(self, control: DepthControl, views: Sequence[View]) -> Tensor:
        """Return the depth in windows, (N, 3, h * f, w * f)."""
        f = self._factor
        pixels = [View(f * v.top, f * v.left, f * v.height, f * v.width) for v in views]
        return crop(control.image, pixels, self._canvas.closed).to(self._dtype)


def clamp(value: int, largest: int) -> int:
    """Return the number from 0 to `largest` that is nearest to a value."""
    return min(max(value, 0), largest)


def interpolate(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Mix embeddings of P parts, (G, P, ...), by their weights in N windows, to (G * N, ...)."""
    return torch.einsum("np,gp...->gn...", weights, embeddings).flatten(0, 1)
