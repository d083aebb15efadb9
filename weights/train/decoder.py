"""Train the autoencoder's decoder on latents as a UNet makes them: parts of spheres, and noisy.

Latents of an image tell where it ends, and GroupNorm sees all of it. A decoder that has seen no
others frames every window with a border, and shows a UNet's errors as stains. The encoder stays as
it is, so a UNet can be trained before.
"""

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from panorama.images import vae
from weights.train import dataset
from weights.train.autoencoder import (
    FACTOR,
    HALVED,
    LARGE,
    SHARES,
    Version,
    draw_kinds,
    draw_places,
    encode,
    reconstruction_loss,
)
from weights.train.device import batch_size, device, mixed_precision, on_device
from weights.train.fit import Batch, Lesson, Plan, Work, fit
from weights.train.views import channels_first, to_range
from weights.train.windows import crop, draw_number

STAGE = replace(
    LARGE,
    plan=Plan("decoder", steps=2400, learning_rate=6e-4, average=0.99),
    crops=((256, 256, 2), (256, 512, 1)),
)
NOISE = 0.12
"""The largest standard deviation of the noise in scaled latents.

A decoder trained without it showed it as grain: 0.1 in the latents of renders raised their Frechet
distance from .05 to .11, and 0.2 to .21. That of a UNet's windows was .18.
"""
SCALES = {1: Version(), 2: HALVED}
"""How many times larger the images are than those that are encoded."""


@dataclass(frozen=True)
class Encoded:
    """Spheres, and the latents of all of them reduced by a scale."""

    images: Tensor  # (M, 3, H, W) in [0, 255]
    latents: Tensor  # (M, 4, H / (8 scale), W / (8 scale)), scaled
    scale: int

    def cut(
        self, size: tuple[int, int], count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw parts (N, 3, h, w) in [-1, 1] and their latents, across the wrap too."""
        height, width = (side // FACTOR for side in size)
        index, top, left = draw_places(self.latents, height, count, generator)
        cell = FACTOR * self.scale
        pixels = crop(self.images, index, cell * top, cell * left, (cell * height, cell * width))
        latents = crop(self.latents, index, top, left, (height, width))
        return F.avg_pool2d(to_range(pixels), self.scale), latents


def train(work: Work, model: AutoencoderKL) -> AutoencoderKL:
    """Train on parts of spheres. Half of the batches are encoded alone, and not noisy."""
    model.requires_grad_(False).to(device())
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    sets = [[load(work, model, kind, scale) for kind in SHARES] for scale in SCALES]

    def draw(generator: torch.Generator) -> Batch:
        height, width, count = STAGE.crops[draw_number(len(STAGE.crops), generator)]
        scaled = sets[draw_number(len(sets), generator)]
        [kind] = draw_kinds(1, generator)
        alone = draw_number(2, generator)
        generator = on_device(generator)
        target, latents = scaled[kind].cut((height, width), batch_size(count), generator)
        if alone:
            with torch.no_grad(), mixed_precision():
                return target, vae.encode(model, target)
        strength = torch.rand(len(latents), 1, 1, 1, generator=generator, device=device())
        noise = torch.randn(latents.shape, generator=generator, device=device())
        return target, latents + NOISE * strength * noise

    def loss(target: Tensor, latents: Tensor) -> Tensor:
        return reconstruction_loss(vae.decode(model, latents), target, STAGE)

    return fit(model, Lesson(draw, loss), STAGE.plan, work).half().float()


def load(work: Work, model: AutoencoderKL, kind: str, scale: int) -> Encoded:
    """Load the training images of a kind and encode them."""
    images = channels_first(dataset.load(work.folder, kind, "train").rgb)
    return Encoded(images, encode(work, model, kind, SCALES[scale]).to(device()), scale)
