"""Train the decoder of the autoencoder on latents like those that a UNet makes.

A UNet makes latents as they are cut out of a sphere, with some noise left in them. A decoder that
was trained only on crops encoded on their own draws a border around such latents, and turns the
noise into stains. The encoder does not change, so this training fits UNets that exist already.
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

Decoders trained without noise turn it into grain. With one of them, a standard deviation of 0.1 in
the latents of renders raised their Frechet distance from .05 to .11, and 0.2 raised it to .21. That
of windows made by a UNet was .18.
"""
SCALES = {1: Version(), 2: HALVED}
"""The factors by which images are reduced before they are encoded."""


@dataclass(frozen=True)
class Encoded:
    """Spheres, and their latents after they were reduced by a factor."""

    images: Tensor  # (M, 3, H, W) in [0, 255]
    latents: Tensor  # (M, 4, H / (8 scale), W / (8 scale)), scaled
    scale: int

    def cut(
        self, size: tuple[int, int], count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw crops (N, 3, h, w) in [-1, 1] with their latents (N, 4, h / 8, w / 8).

        Crops may lie across the wrap. The latents are cut out of those of the whole sphere.
        """
        height, width = (side // FACTOR for side in size)
        index, top, left = draw_places(self.latents, height, count, generator)
        cell = FACTOR * self.scale
        pixels = crop(self.images, index, cell * top, cell * left, (cell * height, cell * width))
        latents = crop(self.latents, index, top, left, (height, width))
        return F.avg_pool2d(to_range(pixels), self.scale), latents


def train(work: Work, model: AutoencoderKL) -> AutoencoderKL:
    """Train on crops of spheres.

    Half of the batches have latents cut out of those of whole spheres, with noise. The crops of the
    other half are encoded on their own, without noise.
    """
    model.requires_grad_(False).to(device())
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    images = {kind: channels_first(dataset.load(work.folder, kind, "train").rgb) for kind in SHARES}
    sets = [
        [
            Encoded(images[kind], encode(work, model, kind, version).to(device()), scale)
            for kind in SHARES
        ]
        for scale, version in SCALES.items()
    ]

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
