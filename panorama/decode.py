"""From latents to the picture, whole or in slices, flat or around a ring."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panorama.circular import circular, replaced
from panorama.views import even_starts, flat_starts, inwards

MAX_CELLS = 65536
"""Largest canvas, in latent cells, that is decoded whole and so exactly: 8192 x 512 pixels."""
MIN_SLICE = 128
"""Cells along a slice, at least: a decoder sees some 17 cells beyond what it decodes."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def decode_canvas(
    vae: Any, latents: Tensor, *, ring: str = "", max_cells: int = MAX_CELLS
) -> Tensor:
    """Decodes a canvas; on a ring the decoder's convolutions wrap, so there is no seam.

    Up to `max_cells` the canvas is decoded whole: rolling a ring's latents by k cells rolls the
    picture by k times the VAE's factor. Beyond, it is decoded in slices along its longer axis,
    which overlap by a quarter and are blended linearly, around the ring too. All of them are
    normalised with the statistics of blocks from all over the canvas. Slices are not exact: those
    statistics are an estimate, and the decoder's attention sees its slice alone. docs/speed.md says
    how much that is on a picture.

    Where the device has not enough memory, slices of half as many cells are tried.

    Args:
        vae: an AutoencoderKL.
        latents: (1, C, H, W), as the scheduler left them.
        ring: the axis that wraps, "x", "y" or "" for neither.
        max_cells: H * W above which slices are taken, of so many cells or of `MIN_SLICE` along the
            longer axis, whichever is more.

    Returns:
        The picture (1, 3, H * f, W * f) in [-1, 1], float32, f the VAE's factor.

    Raises:
        torch.OutOfMemoryError: there is not enough memory for a slice of `MIN_SLICE`.
    """
    height, width = latents.shape[-2:]
    axis, dim, across = ("x", -1, height) if width >= height else ("y", -2, width)
    size = length = max(height, width)
    if height * width > max_cells:
        size = min(length, max(max_cells // across, MIN_SLICE))
    while True:
        try:
            if size == length:
                with circular(vae, axes=ring):
                    return decode(vae, latents).clamp_(-1, 1)
            with circular(vae, axes="" if ring == axis else ring):
                return decode_slices(vae, latents, dim, ring == axis, size).clamp_(-1, 1)
        except torch.OutOfMemoryError:
            if size <= MIN_SLICE:
                raise
            before, size = size, max(size // 2, MIN_SLICE)
            logger.warning(
                "not enough memory to decode %d latent cells along %s at once: going on with %d",
                before,
                axis,
                size,
            )


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) to images (N, 3, H * f, W * f), about [-1, 1], float32."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    images: Tensor = vae.decode(scaled).sample
    return images.float()


def decode_slices(vae: Any, latents: Tensor, dim: int, ring: bool, size: int) -> Tensor:
    """Decodes slices of `size` cells along a dimension and blends them where they overlap."""
    length = latents.shape[dim]
    stride = size - size // 4
    starts = (
        even_starts(length, ceil(length / stride)) if ring else flat_starts(length, size, stride)
    )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    weight = slice_weight(size * factor, latents.device).view(-1, *([1] * (-1 - dim)))
    shape = [1, 3, *(n * factor for n in latents.shape[-2:])]
    total = latents.new_zeros(shape, dtype=torch.float32)
    weights = latents.new_zeros([length * factor, *weight.shape[1:]], dtype=torch.float32)

    def cut(start: int) -> Tensor:
        cells = torch.arange(start, start + size, device=latents.device) % length
        return latents.index_select(dim, cells)

    with shared_statistics(vae, torch.cat(blocks(latents, dim, size))):
        for start in starts:
            pixels = torch.arange(start * factor, (start + size) * factor, device=latents.device)
            place = pixels % (length * factor)
            total.index_add_(dim, place, decode(vae, cut(start)) * weight)
            weights.index_add_(0, place, weight)
    return total.div_(weights)


def slice_weight(size: int, device: torch.device) -> Tensor:
    """Weights (size,) of a slice's pixels: ramps over its outer quarters, next to none at the ends.

    The outermost sixteenths see the padding at the slice's ends. They count only where there is no
    other slice, at the edges of a flat canvas.
    """
    return ((inwards(size, device) - 1 / 16) * 8).clamp(1e-6, 1)


def blocks(latents: Tensor, dim: int, size: int) -> list[Tensor]:
    """Four blocks from all along a dimension, together as large as a slice of `size` cells."""
    length, block = latents.shape[dim], size // 4
    return [latents.narrow(dim, (length - block) * k // 3, block) for k in range(4)]


@contextmanager
def shared_statistics(vae: Any, latents: Tensor) -> Iterator[None]:
    """Makes every GroupNorm of the decoder use its statistics over latents (N, C, h, w).

    Slices that each normalised by themselves would differ in tint and contrast.
    """
    norms = [m for m in vae.decoder.modules() if isinstance(m, nn.GroupNorm)]
    statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def measure(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        # One of N at a time, for in half precision a copy of x would be the largest tensor of all.
        rows = (row.float().reshape(norm.num_groups, -1) for row in x)
        each = [torch.var_mean(row, 1, correction=0) for row in rows]
        variances, means = (torch.stack(found) for found in zip(*each, strict=True))  # (N, groups)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        statistics[norm] = mean, variance
        return normalise(norm, mean, variance, x)

    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(replaced(norm, "forward", partial(measure, norm)))
        decode(vae, latents)
    with ExitStack() as stack:
        for norm in norms:
            forward = partial(normalise, norm, *statistics[norm])
            stack.enter_context(replaced(norm, "forward", forward))
        yield


def normalise(norm: nn.GroupNorm, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """GroupNorm of x (N, C, ...) with a mean and a variance (groups,) from elsewhere."""
    per_group = norm.num_channels // norm.num_groups
    mean, variance = (value.repeat_interleave(per_group) for value in (mean, variance))
    return F.batch_norm(x, mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)
