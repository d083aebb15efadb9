"""From latents to the picture, whole or in slices, flat or around a ring."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from panorama.circular import circular, replaced
from panorama.views import flat_starts, ring_starts

MAX_CELLS = 65536
"""Largest canvas, in latent cells, that is decoded whole and so exactly: 8192 x 512 pixels."""
MIN_SLICE = 32
"""Cells along a slice, at least: the decoder sees some 17 cells beyond what it decodes."""


@torch.no_grad()
def decode_canvas(
    vae: Any, latents: Tensor, *, ring: str = "", max_cells: int = MAX_CELLS
) -> Tensor:
    """Decodes a canvas; on a ring the decoder's convolutions wrap, so there is no seam.

    Up to `max_cells` the canvas is decoded whole: rolling a ring's latents by k cells rolls the
    picture by k times the VAE's factor. Beyond, it is decoded in slices along its longer axis,
    which overlap by a quarter and are blended linearly, around the ring too. All of them are
    normalised with the statistics of one decode of blocks from all over the canvas. Slices are not
    exact: those statistics are an estimate, and the decoder's attention sees its slice alone.

    Args:
        vae: an AutoencoderKL.
        latents: (1, C, H, W), as the scheduler left them.
        ring: the axis that wraps, "x", "y" or "" for neither.
        max_cells: H * W above which slices are taken.

    Returns:
        The picture (1, 3, H * f, W * f) in [-1, 1], float32, f the VAE's factor.
    """
    height, width = latents.shape[-2:]
    if height * width <= max_cells:
        with circular(vae, axes=ring):
            return decode(vae, latents).clamp(-1, 1)
    axis, dim, across = ("x", -1, height) if width >= height else ("y", -2, width)
    return decode_slices(vae, latents, dim, ring == axis, max_cells // across).clamp(-1, 1)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) to images (N, 3, H * f, W * f), about [-1, 1], float32."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    images: Tensor = vae.decode(scaled).sample
    return images.float()


def decode_slices(vae: Any, latents: Tensor, dim: int, ring: bool, size: int) -> Tensor:
    """Decodes slices of `size` cells along a dimension and blends them where they overlap."""
    length = latents.shape[dim]
    size = min(max(size, MIN_SLICE), length)
    overlap = size // 4
    starts = (ring_starts if ring else flat_starts)(length, size, size - overlap)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = torch.arange(size * factor, device=latents.device)
    ramp = (torch.minimum(pixels, pixels.flip(0)) + 0.5) / (overlap * factor)
    weight = ramp.clamp(max=1).view(-1, *([1] * (-1 - dim)))
    shape = [1, 3, *(n * factor for n in latents.shape[-2:])]
    total = latents.new_zeros(shape, dtype=torch.float32)
    weights = latents.new_zeros([length * factor, *weight.shape[1:]], dtype=torch.float32)
    with shared_statistics(vae, digest(latents, dim, size)):
        for start in starts:
            cells = torch.arange(start, start + size, device=latents.device) % length
            picture = decode(vae, latents.index_select(dim, cells))
            place = (start * factor + pixels) % (length * factor)
            total.index_add_(dim, place, picture * weight)
            weights.index_add_(0, place, weight)
    return total / weights


def digest(latents: Tensor, dim: int, size: int) -> Tensor:
    """`size` cells along a dimension, in eight blocks from all over the canvas."""
    block = size // 8
    starts = torch.linspace(0, latents.shape[dim] - block, 8).long().tolist()
    return torch.cat([latents.narrow(dim, start, block) for start in starts], dim)


@contextmanager
def shared_statistics(vae: Any, latents: Tensor) -> Iterator[None]:
    """Makes every GroupNorm of the decoder use the statistics that decoding some latents has.

    Slices that each normalised by themselves would differ in tint and contrast.
    """
    norms = [m for m in vae.decoder.modules() if isinstance(m, nn.GroupNorm)]
    statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def record(norm: nn.GroupNorm, inputs: tuple[Tensor], _: Tensor) -> None:
        groups = inputs[0].float().reshape(norm.num_groups, -1)
        statistics[norm] = groups.mean(1), groups.var(1, correction=0)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(record).remove)
        decode(vae, latents)
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(
                replaced(norm, "forward", partial(normalise, norm, *statistics[norm]))
            )
        yield


def normalise(norm: nn.GroupNorm, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """GroupNorm of x (N, C, ...) with a mean and a variance (groups,) from elsewhere."""
    per_group = norm.num_channels // norm.num_groups
    shape = (1, -1, *([1] * (x.dim() - 2)))
    scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group) * norm.weight
    shift = norm.bias - mean.repeat_interleave(per_group) * scale
    return x * scale.view(shape).to(x.dtype) + shift.view(shape).to(x.dtype)
