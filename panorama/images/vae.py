"""Decode a canvas of latents, whole or in slices, flat or around a ring."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from panorama.errors import require_finite
from panorama.sampling.canvas import Axis, edge_distance
from panorama.sampling.circular import circular, replaced
from panorama.sampling.views import even_starts, flat_starts

MAX_CELLS = 65536
"""The largest canvas, in latent cells, that is decoded whole and so exactly: 8192 x 512 pixels."""
MIN_SLICE = 128
"""The least cells along a slice: a decoder sees about 17 cells beyond what it decodes."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def decode_canvas(
    vae: Any,
    latents: Tensor,
    closed: Axis = "",
    *,
    extended: str = "",
    max_cells: int = MAX_CELLS,
) -> Tensor:
    """Decode a canvas of latents. On a closed axis the decoder's convolutions wrap.

    Up to `max_cells` the canvas is decoded whole: rolling the latents by k cells along the closed
    axis rolls the image by k times the VAE's factor. A larger canvas is decoded in slices along its
    longer axis, which overlap by a quarter and are blended linearly, around a ring too. All slices
    are normalised with the statistics of blocks from all over the canvas. Slices are not exact:
    the statistics are an estimate, and the decoder's attention sees only its slice. docs/speed.md
    has the difference that this makes.

    If the device runs out of memory, slices of half as many cells are tried.

    Args:
        vae: AutoencoderKL.
        latents: (1, C, H, W), as the solver leaves them.
        closed: the axis that closes.
        extended: the axes on which the ends of the canvas are no edges of an image as the VAE knows
            them, see `circular`. Zeros beyond them would show as a thin line at the ends.
        max_cells: the largest H * W that is decoded whole. A larger canvas is decoded in slices of
            about as many cells, but at least `MIN_SLICE` along the longer axis.

    Returns:
        The image (1, 3, H * f, W * f) in [-1, 1], float32, f the VAE's factor.

    Raises:
        NotFiniteError: the image is not finite.
        torch.OutOfMemoryError: there is too little memory for a slice of `MIN_SLICE`.
    """
    height, width = latents.shape[-2:]
    length, across = max(height, width), min(height, width)
    size = length
    if height * width > max_cells:
        size = min(length, max(max_cells // across, MIN_SLICE))
    while True:
        try:
            image = decode_slices(vae, latents, closed, size, extended)
        except torch.OutOfMemoryError:
            if size <= MIN_SLICE:
                raise
            failed, size = size, max(size // 2, MIN_SLICE)
            logger.warning(
                "not enough memory to decode %d latent cells at once: continuing with %d",
                failed,
                size,
            )
        else:
            require_finite(image, "the decoded image is")
            return image.clamp_(-1, 1)


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (1, 3, H, W) in [0, 1] to 8 bits, rounded to the nearest level."""
    levels = (image[0] * 255).round_().to(torch.uint8)  # (3, H, W)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (N, C, H, W) to images (N, 3, H * f, W * f), about [-1, 1], float32."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    images: Tensor = vae.decode(scaled).sample
    return images.float()


def decode_slices(vae: Any, latents: Tensor, closed: Axis, size: int, extended: str = "") -> Tensor:
    """Decode slices of `size` cells along the longer axis, blended, to (1, 3, H * f, W * f)."""
    height, width = latents.shape[-2:]
    axis, dim = ("x", -1) if width >= height else ("y", -2)
    length = latents.shape[dim]
    if size == length:
        with circular(vae, axes=closed, extended=extended):
            return decode(vae, latents)
    stride = size - size // 4
    starts = (
        even_starts(length, ceil(length / stride))
        if closed == axis
        else flat_starts(length, size, stride)
    )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    weight = slice_weight(size * factor, latents.device).view(-1, *([1] * (-1 - dim)))
    total = latents.new_zeros([1, 3, height * factor, width * factor], dtype=torch.float32)
    weights = latents.new_zeros([length * factor, *weight.shape[1:]], dtype=torch.float32)

    def cut(start: int) -> Tensor:
        cells = torch.arange(start, start + size, device=latents.device) % length
        return latents.index_select(dim, cells)

    with (
        circular(vae, axes="" if closed == axis else closed, extended=extended),
        shared_statistics(vae, torch.cat(blocks(latents, dim, size))),
    ):
        for start in starts:
            pixels = torch.arange(start * factor, (start + size) * factor, device=latents.device)
            place = pixels % (length * factor)
            total.index_add_(dim, place, decode(vae, cut(start)) * weight)
            weights.index_add_(0, place, weight)
    return total.div_(weights)


def slice_weight(size: int, device: torch.device) -> Tensor:
    """Return the weights (size,) of a slice's pixels: ramps over its outer quarters.

    The outermost sixteenths see the padding at the slice's ends. They count only where there is no
    other slice, at the edges of a flat canvas.
    """
    return ((edge_distance(size, device) - 1 / 16) * 8).clamp(1e-6, 1)


def blocks(latents: Tensor, dim: int, size: int) -> list[Tensor]:
    """Take four blocks spread evenly along a dimension, together `size` cells long."""
    length, block = latents.shape[dim], size // 4
    return [latents.narrow(dim, (length - block) * k // 3, block) for k in range(4)]


@contextmanager
def shared_statistics(vae: Any, latents: Tensor) -> Iterator[None]:
    """Make every GroupNorm of the decoder use its statistics over latents (N, C, h, w).

    Slices that were each normalised by themselves would differ in tint and contrast.
    """
    norms = [m for m in vae.decoder.modules() if isinstance(m, nn.GroupNorm)]
    statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def measure(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        # One of N at a time: in half precision a float32 copy of x would be the largest tensor.
        rows = (row.float().reshape(norm.num_groups, -1) for row in x)
        each = [torch.var_mean(row, 1, correction=0) for row in rows]
        variances, means = (torch.stack(found) for found in zip(*each, strict=True))  # (N, groups)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        statistics[norm] = mean, variance
        return normalize(norm, mean, variance, x)

    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(replaced(norm, "forward", partial(measure, norm)))
        decode(vae, latents)
    with ExitStack() as stack:
        for norm in norms:
            forward = partial(normalize, norm, *statistics[norm])
            stack.enter_context(replaced(norm, "forward", forward))
        yield


def normalize(norm: nn.GroupNorm, mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """Apply a GroupNorm to x (N, C, ...) with a given mean and variance (groups,)."""
    per_group = norm.num_channels // norm.num_groups
    mean, variance = (value.repeat_interleave(per_group) for value in (mean, variance))
    return F.batch_norm(x, mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)
