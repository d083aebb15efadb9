"""Distil a small decoder from the autoencoder's own, for previews and for cheaper gradients.

It learns what that decoder makes of windows of the images' latents, and of latents such as the
first steps of a run predict, because those are what the gradient sees.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from panorama.images.vae import decode
from weights.train import dataset
from weights.train.autoencoder import KINDS, Stage, reconstruction_loss
from weights.train.diffusion import WINDOW, encode
from weights.train.fit import Plan, fit, mixed_precision

STAGE = Stage(
    Plan("tiny-vae", steps=2000, learning_rate=2e-3, average=0.99, warmup=50),
    crops=(),
    squared=2.0,
    smooth=0.1,
)
BATCH = 4  # windows, half of them early
CHANNELS = 16
BLOCKS = (3, 3, 1, 0)  # of the decoder, from the latents' resolution to the image's
BLUR = 4.0  # cells; the largest standard deviation
GUIDANCE = 3.0  # the largest step away from another image


def build() -> AutoencoderTiny:
    """Build a decoder of 57,000 parameters, and an encoder of one channel that is all zeros."""
    model = AutoencoderTiny(
        encoder_block_out_channels=(1,) * len(BLOCKS),
        num_encoder_blocks=(0,) * len(BLOCKS),
        decoder_block_out_channels=(CHANNELS,) * len(BLOCKS),
        num_decoder_blocks=BLOCKS,
    )
    for weight in model.encoder.parameters():
        nn.init.zeros_(weight)
    return model


def blur(latents: Tensor, sigma: float) -> Tensor:
    """Blur latents (N, C, h, w) with a Gaussian of a standard deviation in cells."""
    radius = int(3 * sigma) + 1
    places = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (places / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum()).expand(latents.shape[1], 1, 1, -1)  # (C, 1, 1, 2 r + 1)
    padded = F.pad(latents, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=latents.shape[1])
    return F.conv2d(rows, kernel.mT, groups=latents.shape[1])


def imitate_early(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Turn latents (N, C, h, w) into such as early steps predict.

    These are blurred, since little is decided yet, and guidance takes them away from other images.
    """
    sigma, guidance = (torch.rand(2, generator=generator) * torch.tensor([BLUR, GUIDANCE])).tolist()
    blurred = blur(latents, sigma)
    return blurred + guidance * (blurred - blurred.roll(1, 0))


def draw_windows(sets: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Draw windows (N, C, WINDOW, WINDOW) of latents, across the wrap too, from sets by `KINDS`."""
    shares = torch.tensor(list(KINDS.values()))
    windows = []
    for kind in torch.multinomial(shares, count, replacement=True, generator=generator).tolist():
        latents = sets[kind]
        index = int(torch.randint(len(latents), (1,), generator=generator))
        left = int(torch.randint(latents.shape[-1], (1,), generator=generator))
        windows.append(latents[index].roll(-left, -1)[..., :WINDOW])
    return torch.stack(windows)


def train(work: Path, vae: AutoencoderKL) -> AutoencoderTiny:
    """Train the decoder on what the autoencoder's own makes of the same latents."""
    torch.manual_seed(7)
    model = build()
    sets = [encode(work, vae, kind, dataset.load(work, kind, "train").rgb) for kind in KINDS]

    def loss(generator: torch.Generator) -> Tensor:
        plain, early = draw_windows(sets, BATCH, generator).chunk(2)
        latents = torch.cat([plain, imitate_early(early, generator)])
        with torch.no_grad(), mixed_precision():
            target = decode(vae, latents)
        return reconstruction_loss(decode(model, latents), target, STAGE)

    trained = fit(model, loss, STAGE.plan, work)
    assert isinstance(trained, AutoencoderTiny)
    return trained
