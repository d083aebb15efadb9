"""Decode a canvas of latents and encode images, whole or in slices, flat or around a ring."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd
from typing import Any

import numpy as np
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


@dataclass(frozen=True, eq=False)
class Coder:
    """One half of a VAE, from latents to images or back.

    Attributes:
        vae: AutoencoderKL, or AutoencoderTiny to decode.
        network: its decoder or encoder.
        code: from (N, C, H, W) to (N, C', H', W'), float32.
        source: values of the input along an axis per latent cell.
        target: values of the result along an axis per latent cell.
        channels: of the result.
    """

    vae: Any
    network: nn.Module
    code: Callable[[Any, Tensor], Tensor]
    source: int
    target: int
    channels: int


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
    coder = Coder(vae, vae.decoder, decode, 1, factor_of(vae), 3)
    image = code_canvas(coder, latents, closed, extended, max_cells)
    require_finite(image, "the decoded image is")
    return image.clamp_(-1, 1)


@torch.no_grad()
def encode_canvas(
    vae: Any, image: Tensor, closed: Axis = "", *, max_cells: int = MAX_CELLS
) -> Tensor:
    """Encode an image, the inverse of `decode_canvas`.

    Args:
        vae: AutoencoderKL.
        image: (1, 3, H, W) in [-1, 1], with sides that are multiples of the VAE's factor f.
        closed: the axis that closes, on which the encoder's convolutions wrap.
        max_cells: see `decode_canvas`.

    Returns:
        The latents (1, C, H / f, W / f), float32: the mean of their distribution.
    """
    coder = Coder(vae, vae.encoder, encode, factor_of(vae), 1, vae.config.latent_channels)
    return code_canvas(coder, image, closed, "", max_cells)


def code_canvas(
    coder: Coder, canvas: Tensor, closed: Axis, extended: str, max_cells: int
) -> Tensor:
    """Decode or encode a canvas, in slices where that takes too much memory."""
    height, width = (side // coder.source for side in canvas.shape[-2:])
    length, across = max(height, width), min(height, width)
    size = length
    if height * width > max_cells:
        size = min(length, max(max_cells // across, MIN_SLICE))
    while True:
        try:
            return code_slices(coder, canvas, closed, size, extended)
        except torch.OutOfMemoryError:
            if size <= MIN_SLICE:
                raise
            failed, size = size, max(size // 2, MIN_SLICE)
            logger.warning(
                "not enough memory for %d latent cells of the VAE at once: continuing with %d",
                failed,
                size,
            )


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (1, 3, H, W) in [0, 1] to 8 bits, rounded to the nearest level."""
    levels = (image[0] * 255).round_().to(torch.uint8)  # (3, H, W)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """Convert an RGB image of 8 bits to (1, 3, H, W) in [0, 1], the inverse of `to_pil`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def resize(image: Tensor, size: tuple[int, int], closed: Axis = "") -> Tensor:
    """Resample an image (N, C, H, W) to (height, width), bicubic and around the closed axis."""
    if image.shape[-2:] == size:
        return image
    (height, width), (old_height, old_width) = size, image.shape[-2:]
    above, top = margins(old_height, height) if closed == "y" else (0, 0)
    beside, left = margins(old_width, width) if closed == "x" else (0, 0)
    padded = F.pad(image, (beside, beside, above, above), mode="circular")
    whole = height + 2 * top, width + 2 * left
    resized = F.interpolate(padded, whole, mode="bicubic", antialias=True)
    return resized[..., top : top + height, left : left + width].clamp(0, 1)


def margins(old: int, new: int) -> tuple[int, int]:
    """Return how much of the opposite edge to resample with a side that closes.

    Returns:
        The pixels before and after resampling, at least as many as the filter reaches. Their ratio
        is exactly that of the sides, so that nothing is shifted. If the sides have no common
        divisor, this is the whole side.
    """
    divisor = gcd(old, new)
    reach = 2 * ceil(old / new) + 1  # of a bicubic filter
    steps = ceil(reach * divisor / old)
    return steps * old // divisor, steps * new // divisor


def factor_of(vae: Any) -> int:
    """Return the pixels per latent cell of a VAE."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (N, C, H, W) to images (N, 3, H * f, W * f), about [-1, 1], float32."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    images: Tensor = vae.decode(scaled).sample
    return images.float()


def encode(vae: Any, images: Tensor) -> Tensor:
    """Encode images (N, 3, H * f, W * f) in [-1, 1] to latents (N, C, H, W), float32."""
    means: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.mode()
    latents: Tensor = means.float() * vae.config.scaling_factor
    return latents


def code_slices(
    coder: Coder, canvas: Tensor, closed: Axis, size: int, extended: str = ""
) -> Tensor:
    """Decode or encode slices of `size` cells along the longer axis of a canvas, blended."""
    height, width = (side // coder.source for side in canvas.shape[-2:])
    axis, dim = ("x", -1) if width >= height else ("y", -2)
    length = max(height, width)
    if size == length:
        with circular(coder.vae, axes=closed, extended=extended):
            return coder.code(coder.vae, canvas)
    stride = size - size // 4
    starts = (
        even_starts(length, ceil(length / stride))
        if closed == axis
        else flat_starts(length, size, stride)
    )
    weight = slice_weight(size * coder.target, canvas.device).view(-1, *([1] * (-1 - dim)))
    sides = height * coder.target, width * coder.target
    total = canvas.new_zeros([1, coder.channels, *sides], dtype=torch.float32)
    weights = canvas.new_zeros([length * coder.target, *weight.shape[1:]], dtype=torch.float32)

    def places(start: int, scale: int) -> Tensor:
        """Return the rows or columns of a slice, which may lie beyond the end of a ring."""
        inside = torch.arange(start * scale, (start + size) * scale, device=canvas.device)
        return inside % (length * scale)

    with (
        circular(coder.vae, axes="" if closed == axis else closed, extended=extended),
        shared_statistics(coder, torch.cat(blocks(canvas, dim, size, coder.source))),
    ):
        for start in starts:
            found = coder.code(coder.vae, canvas.index_select(dim, places(start, coder.source)))
            place = places(start, coder.target)
            total.index_add_(dim, place, found * weight)
            weights.index_add_(0, place, weight)
    return total.div_(weights)


def slice_weight(size: int, device: torch.device) -> Tensor:
    """Return the weights (size,) of a slice's pixels: ramps over its outer quarters.

    The outermost sixteenths see the padding at the slice's ends. They count only where there is no
    other slice, at the edges of a flat canvas.
    """
    return ((edge_distance(size, device) - 1 / 16) * 8).clamp(1e-6, 1)


def blocks(canvas: Tensor, dim: int, size: int, scale: int) -> list[Tensor]:
    """Take four blocks spread evenly along a dimension, together `size` cells long."""
    length, block = canvas.shape[dim] // scale, size // 4
    starts = ((length - block) * k // 3 for k in range(4))
    return [canvas.narrow(dim, start * scale, block * scale) for start in starts]


@contextmanager
def shared_statistics(coder: Coder, samples: Tensor) -> Iterator[None]:
    """Make every GroupNorm of a coder use its statistics over samples (N, C, h, w).

    Slices that were each normalised by themselves would differ in tint and contrast.
    """
    norms = [m for m in coder.network.modules() if isinstance(m, nn.GroupNorm)]
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
        coder.code(coder.vae, samples)
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
