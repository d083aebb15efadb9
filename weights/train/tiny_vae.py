"""Distil a small decoder from the autoencoder's own, for previews and for cheaper gradients.

It learns what that decoder makes of windows of the images' latents, and of latents such as the
first steps of a run predict, because those are what the gradient sees.
"""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from panorama.images.vae import decode
from panorama.sampling.low_band import smooth
from weights.train.autoencoder import SHARES, Stage, draw_places, encode, reconstruction_loss
from weights.train.device import batch_size, device, mixed_precision, on_device
from weights.train.diffusion import WINDOW
from weights.train.fit import Batch, Plan, Work, fit
from weights.train.windows import crop

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


def imitate_early(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Turn latents (N, C, h, w) into such as early steps predict.

    These are blurred, since little is decided yet, and guidance takes them away from other images.
    """
    sigma, guidance = (torch.rand(2, generator=generator) * torch.tensor([BLUR, GUIDANCE])).tolist()
    blurred = smooth(latents, max(sigma, 1e-3))
    return blurred + guidance * (blurred - blurred.roll(1, 0))


def train(work: Work, vae: AutoencoderKL) -> AutoencoderTiny:
    """Train the decoder on what the autoencoder's own makes of the same latents."""
    torch.manual_seed(7)
    model = build()
    vae.to(device())
    all_latents = torch.cat([encode(work, vae, kind) for kind in SHARES]).to(device())

    def draw(generator: torch.Generator) -> Batch:
        places = draw_places(all_latents, WINDOW, batch_size(BATCH), on_device(generator))
        plain, early = crop(all_latents, *places, (WINDOW, WINDOW)).chunk(2)
        latents = torch.cat([plain, imitate_early(early, generator)])
        with torch.no_grad(), mixed_precision():
            return latents, decode(vae, latents)

    def loss(latents: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device().type, enabled=False):
            return reconstruction_loss(decode(model, latents), target, STAGE)

    return fit(model, draw, loss, STAGE.plan, work)
