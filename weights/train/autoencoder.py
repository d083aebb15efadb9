"""Train the autoencoder that both embedded models share."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from weights.train import dataset
from weights.train.fit import Plan, fit, mixed_precision

Crops = tuple[tuple[int, int, int], ...]
"""The height and width of crops, and their number in a batch."""

LARGE_CROPS: Crops = ((256, 128, 4), (256, 256, 2), (256, 512, 1))


@dataclass(frozen=True)
class Stage:
    """A part of the training: its crops and the weights of its loss."""

    plan: Plan
    crops: Crops  # one size is drawn for each batch
    squared: float  # weight of the squared error
    smooth: float  # weight of the gradients' relative error
    even: float = 0.0  # weight of the difference between the gradients' profiles over a cell
    encoder: bool = True  # train the encoder too


STAGES = (
    Stage(
        Plan("autoencoder", steps=4500, learning_rate=1.5e-3, average=0.998),
        crops=((96, 96, 12),),
        squared=2.0,
        smooth=0.0,
    ),
    Stage(
        Plan("autoencoder-refine", steps=3200, learning_rate=6e-4, average=0.99),
        crops=LARGE_CROPS,
        squared=8.0,
        smooth=0.1,
    ),
    Stage(
        Plan("autoencoder-decoder", steps=2000, learning_rate=6e-4, average=0.99),
        crops=LARGE_CROPS,
        squared=8.0,
        smooth=0.1,
        even=0.2,
        encoder=False,
    ),
)
LEVEL = 1 / 127.5  # one of 256, in [-1, 1]
CELL = 8  # pixels
KINDS = {"strips": 0.6, "outdoors": 0.15, "rooms": 0.25}  # shares of a batch


def build() -> AutoencoderKL:
    """Build the autoencoder: factor 8, 4 latent channels, 2.6 M parameters."""
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=256,
        mid_block_add_attention=False,
    )


def draw_crop(
    images: np.ndarray, height: int, width: int, generator: torch.Generator
) -> np.ndarray:
    """Draw a crop (height, width, 3), across the wrap too, mirrored half of the time."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    image = images[draw(len(images))]
    top, left = draw(image.shape[0] - height + 1), draw(image.shape[1])
    columns = (left + np.arange(width)) % image.shape[1]
    crop = image[top : top + height][:, columns]
    return crop[:, ::-1] if draw(2) else crop


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert images (N, H, W, 3) in [0, 255] to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(image: Tensor, target: Tensor, stage: Stage) -> Tensor:
    """Add up L1, L1 of the gradients, half L1 at two lower resolutions, and the stage's own terms.

    The relative error of the gradients weighs a step of one level in a smooth sky as much as one
    of many levels among trees: without it the edges of the latents' cells show in the sky. The
    last term removes what remains of them: steps must be as strong at the cells' edges as inside.
    """

    def l1(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean()

    loss = l1(image, target) + stage.squared * F.mse_loss(image, target)
    for axis in (-1, -2):
        gradient, true = image.diff(dim=axis), target.diff(dim=axis)
        error = (gradient - true).abs()
        loss = loss + error.mean() + stage.smooth * (error / (true.abs() + LEVEL)).mean()
        loss = loss + stage.even * l1(cell_profile(gradient, axis), cell_profile(true, axis))
    for factor in (4, 16):
        loss = loss + 0.5 * l1(F.avg_pool2d(image, factor), F.avg_pool2d(target, factor))
    return loss


def cell_profile(gradient: Tensor, axis: int) -> Tensor:
    """Return the logarithms (N, CELL) of a gradient's (N, 3, H, W) strength by place in a cell."""
    steps = gradient.abs().movedim(axis, -1).mean((1, 2))  # (N, steps)
    steps = steps[:, : steps.shape[1] // CELL * CELL].unflatten(1, (-1, CELL))
    return (steps.mean(1) + LEVEL / 10).log()


def train(work: Path) -> AutoencoderKL:
    """Train on small crops, then on large ones, then the decoder alone.

    GroupNorm sees whole images when the model is used; small crops alone leave large areas in
    wrong colours. The last stage leaves the latents as they are, so a UNet can be trained in
    parallel.
    """
    torch.manual_seed(0)
    model = build()
    images = {kind: dataset.load(work, kind, "train").rgb for kind in KINDS}

    def batch(sizes: Crops, generator: torch.Generator) -> Tensor:
        height, width, count = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
        shares = torch.tensor(list(KINDS.values()))
        chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
        names = [list(KINDS)[index] for index in chosen.tolist()]
        crops = [draw_crop(images[name], height, width, generator) for name in names]
        return to_tensor(np.stack(crops))

    def loss(stage: Stage, generator: torch.Generator) -> Tensor:
        target = batch(stage.crops, generator)
        with mixed_precision():
            with torch.set_grad_enabled(stage.encoder):
                posterior = model.encode(target).latent_dist
            image = model.decode(posterior.sample(generator)).sample
        mean, variance = posterior.mean.float(), posterior.var.float()
        kl = 0.5 * (mean**2 + variance - variance.log() - 1)
        return reconstruction_loss(image.float(), target, stage) + 1e-3 * kl.mean()

    for stage in STAGES:
        trained = fit(model, partial(loss, stage), stage.plan, work)
        model.load_state_dict(trained.state_dict())
    model.register_to_config(scaling_factor=1 / latent_std(model, images["strips"]))
    return model.eval()


@torch.no_grad()
def latent_std(model: AutoencoderKL, images: np.ndarray) -> float:
    """Return the standard deviation of the latents; its inverse is the scaling factor."""
    step = max(1, len(images) // 64)
    latents = [model.encode(to_tensor(image[None])).latent_dist.mean for image in images[::step]]
    return float(torch.stack(latents).std())


@torch.no_grad()
def psnr(model: AutoencoderKL, images: np.ndarray) -> float:
    """Return the mean peak signal-to-noise ratio of decode(encode(image)), in dB."""
    values = []
    for image in images:
        target = to_tensor(image[None])
        decoded = model.decode(model.encode(target).latent_dist.mode()).sample
        levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        error = (levels - (target + 1) * 127.5).square().mean()
        values.append(10 * torch.log10(255**2 / error))
    return float(torch.stack(values).mean())
