"""Train the autoencoder of both models, and encode the images they are trained on."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from panorama.images import vae as coder
from weights.train import dataset
from weights.train.device import batch_size, device, mixed_precision, on_device
from weights.train.fit import Batch, Plan, Work, fit, save
from weights.train.views import Change, Pixels, channels_first, halve, to_range, to_tensor
from weights.train.windows import crop, draw_number, draw_numbers, mirror

FACTOR = 8  # pixels a latent cell
LATENT_CHANNELS = 4
LEVEL = 1 / 127.5  # one of 256, in [-1, 1]
SHARES = {"outdoors": 0.6, "rooms": 0.4}  # of a batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A part of the training: its crops and the weights of its loss."""

    plan: Plan
    crops: tuple[tuple[int, int, int], ...]  # height, width, count; one is drawn for each batch
    squared: float  # weight of the squared error
    smooth: float  # weight of the gradients' relative error
    even: float = 0.0  # weight of the error of `cell_profile`


SMALL = Stage(
    Plan("autoencoder", steps=4500, learning_rate=1.5e-3, average=0.998),
    crops=((96, 96, 12), (128, 128, 6)),
    squared=2.0,
    smooth=0.02,
)
LARGE = Stage(
    Plan("autoencoder-large", steps=2000, learning_rate=6e-4, average=0.99),
    crops=((256, 256, 2), (192, 320, 2)),
    squared=30.0,
    smooth=0.1,
    even=0.2,
)


def build() -> AutoencoderKL:
    """Build the autoencoder: factor 8, 4 latent channels, 3 M parameters."""
    channels = (16, 48, 96, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=256,
        mid_block_add_attention=False,
    )


def draw_crops(
    images: Tensor, size: Sequence[int], count: int, generator: torch.Generator
) -> Tensor:
    """Draw crops (N, 3, h, w) in [-1, 1] of spheres (M, 3, H, W) in [0, 255], across the wrap too.

    Half of the time they are shown at half their scale, and half of the crops are mirrored. Most
    lie around the horizon, where there is most to see.
    """
    scale = 1 + draw_number(2, generator)
    generator = on_device(generator)
    height, width = (scale * side for side in size)
    places = draw_places(images, height, count, generator)
    crops = to_range(crop(images, *places, (height, width)))
    return mirror(F.avg_pool2d(crops, scale), generator)


def draw_places(
    maps: Tensor, height: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the indices, top rows and left columns (N,) of crops of maps (M, C, H, W).

    Most lie around the middle row.
    """
    free = maps.shape[2] - height + 1
    index = draw_numbers(len(maps), count, generator)
    top = (draw_numbers(free, count, generator) + draw_numbers(free, count, generator)) // 2
    return index, top, draw_numbers(maps.shape[3], count, generator)


def reconstruction_loss(image: Tensor, target: Tensor, stage: Stage) -> Tensor:
    """Add up L1, L1 of the gradients, half L1 at two lower resolutions, and the stage's own terms.

    The relative error of the gradients weighs a step of one level in a smooth sky as much as one
    of many levels among trees: without it the edges of the latents' cells show in the sky. The
    last term removes what remains of them: steps must be as strong at the cells' edges as inside.
    """
    loss = F.l1_loss(image, target) + stage.squared * F.mse_loss(image, target)
    for axis in (-1, -2):
        gradient, true = image.diff(dim=axis), target.diff(dim=axis)
        error = (gradient - true).abs()
        loss = loss + error.mean() + stage.smooth * (error / (true.abs() + LEVEL)).mean()
        loss = loss + stage.even * F.l1_loss(cell_profile(gradient, axis), cell_profile(true, axis))
    for factor in (4, 16):
        loss = loss + 0.5 * F.l1_loss(F.avg_pool2d(image, factor), F.avg_pool2d(target, factor))
    return loss


def cell_profile(gradient: Tensor, axis: int) -> Tensor:
    """Return the log of the mean step at each place within a cell, (N, FACTOR), along an axis."""
    steps = gradient.abs().movedim(axis, -1).mean((1, 2))  # (N, steps)
    steps = steps[:, : steps.shape[1] // FACTOR * FACTOR].unflatten(1, (-1, FACTOR))
    return (steps.mean(1) + LEVEL / 10).log()


def draw_kinds(count: int, generator: torch.Generator) -> dict[int, int]:
    """Draw how many of a batch are of each kind, by `SHARES`; kinds without any are left out."""
    shares = torch.tensor(list(SHARES.values()))
    return dict(Counter(torch.multinomial(shares, count, True, generator=generator).tolist()))


def train(work: Work) -> AutoencoderKL:
    """Train on small crops, then on large ones.

    GroupNorm sees whole images when the model is used; small crops alone leave large areas in
    wrong colours.
    """
    torch.manual_seed(0)
    model = build()
    images = {kind: dataset.load(work.folder, kind, "train").rgb for kind in SHARES}
    spheres = [channels_first(rgb) for rgb in images.values()]

    def draw(stage: Stage, generator: torch.Generator) -> Batch:
        *size, count = stage.crops[draw_number(len(stage.crops), generator)]
        kinds = draw_kinds(batch_size(count), generator)
        target = torch.cat([draw_crops(spheres[k], size, n, generator) for k, n in kinds.items()])
        shape = (len(target), LATENT_CHANNELS, *(side // FACTOR for side in size))
        return target, torch.randn(shape, generator=on_device(generator), device=device())

    def loss(stage: Stage, target: Tensor, noise: Tensor) -> Tensor:
        posterior = model.encode(target).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        image = model.decode(mean + std * noise).sample
        kl = 0.5 * (mean**2 + std**2 - 2 * std.log() - 1)
        return reconstruction_loss(image.float(), target, stage) + 1e-3 * kl.mean()

    for stage in (SMALL, LARGE):
        fitted = fit(model, partial(draw, stage), partial(loss, stage), stage.plan, work)
        model.load_state_dict(fitted.state_dict())
    some = images["outdoors"][:: max(1, len(images["outdoors"]) // 64)]
    with torch.no_grad():
        tensors = (to_tensor(image[None]).to(device()) for image in some)
        latents = [model.encode(tensor).latent_dist.mean for tensor in tensors]
    model.register_to_config(scaling_factor=1 / float(torch.stack(latents).std()))
    # Rounded as in the files, so that all later stages see the same latents.
    return model.half().float().eval()


@dataclass(frozen=True)
class Version:
    """A version of the training images, made before they are encoded."""

    name: str = ""  # part of the names of the files that keep the latents
    change: Change = np.asarray
    count: int | None = None  # the first images of a kind; None for all
    wrap: int = 64  # pixels of the other side that are seen beyond either edge, 0 for no sphere


HALVED = Version("small", halve)


@torch.no_grad()
def encode(work: Work, vae: AutoencoderKL, kind: str, version: Version = Version()) -> Tensor:
    """Encode the training images of a kind; a file in the work folder keeps the latents.

    The file's name has a hash of the encoder's weights and the number of images. If either changes,
    the images are encoded again.

    Returns:
        The scaled latents, (N, 4, H / 8, W / 8), on the CPU.
    """
    encoder = torch.nn.ModuleList([vae.encoder, vae.quant_conv])
    weights = torch.cat([p.flatten().cpu() for p in encoder.parameters()]).numpy().tobytes()
    images = dataset.load(work.folder, kind, "train").rgb[: version.count]
    name = "-".join(filter(None, (kind, version.name, str(len(images)))))
    path = work.folder / "latents" / f"{name}-{sha256(weights).hexdigest()[:16]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    vae.to(device())
    latents, count, wrap = [], batch_size(2), version.wrap
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(images), count):
            changed = np.stack(list(pool.map(version.change, images[first : first + count])))
            wide = np.pad(changed, ((0, 0), (0, 0), (wrap, wrap), (0, 0)), mode="wrap")
            with mixed_precision():
                means = coder.encode(vae, to_tensor(wide).to(device()))
            latents.append(means[..., wrap // FACTOR : means.shape[-1] - wrap // FACTOR].cpu())
    logger.info("latents of %s: %d", name, len(images))
    save(torch.cat(latents), path)
    return torch.cat(latents)


DECODER = replace(
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


def draw_encoded(
    images: Tensor, latents: Tensor, size: Sequence[int], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw crops (N, 3, h, w) in [-1, 1], across the wrap too, with latents (N, 4, h / 8, w / 8).

    The latents are cut out of those of whole spheres, images (M, 3, H, W) in [0, 255], which may
    have been reduced before they were encoded.
    """
    height, width = (side // FACTOR for side in size)
    index, top, left = draw_places(latents, height, count, generator)
    cell = images.shape[-1] // latents.shape[-1]
    pixels = crop(images, index, cell * top, cell * left, (cell * height, cell * width))
    latents = crop(latents, index, top, left, (height, width))
    return F.avg_pool2d(to_range(pixels), cell // FACTOR), latents


def train_decoder(work: Work, model: AutoencoderKL) -> AutoencoderKL:
    """Train the decoder on latents like those that a UNet makes; the encoder does not change.

    A UNet's latents look like crops of a whole sphere's latents, with a little noise left in them.
    A decoder trained only on crops that were encoded on their own draws a border around such
    latents, and turns the noise into stains. So half of the batches are crops of whole spheres'
    latents with noise added. The other half are crops encoded on their own, without noise.
    """
    model.requires_grad_(False).to(device())
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)
    images = {kind: channels_first(dataset.load(work.folder, kind, "train").rgb) for kind in SHARES}
    sets = [
        [(images[kind], encode(work, model, kind, version).to(device())) for kind in SHARES]
        for version in (Version(), HALVED)
    ]

    def draw(generator: torch.Generator) -> Batch:
        *size, count = DECODER.crops[draw_number(len(DECODER.crops), generator)]
        versions = sets[draw_number(len(sets), generator)]
        [kind] = draw_kinds(1, generator)
        alone = draw_number(2, generator)
        generator = on_device(generator)
        target, latents = draw_encoded(*versions[kind], size, batch_size(count), generator)
        if alone:
            with torch.no_grad(), mixed_precision():
                return target, coder.encode(model, target)
        strength = torch.rand(len(latents), 1, 1, 1, generator=generator, device=device())
        noise = torch.randn(latents.shape, generator=generator, device=device())
        return target, latents + NOISE * strength * noise

    def loss(target: Tensor, latents: Tensor) -> Tensor:
        return reconstruction_loss(coder.decode(model, latents), target, DECODER)

    return fit(model, draw, loss, DECODER.plan, work).half().float()


@torch.no_grad()
def psnr(model: AutoencoderKL, images: Sequence[Pixels]) -> float:
    """Return the mean peak signal-to-noise ratio of decode(encode(image)), in dB."""
    values = []
    for image in images:
        target = to_tensor(image[None])
        decoded = model.decode(model.encode(target).latent_dist.mode()).sample
        levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        error = (levels - (target + 1) * 127.5).square().mean()
        values.append(10 * torch.log10(255**2 / error))
    return float(torch.stack(values).mean())
