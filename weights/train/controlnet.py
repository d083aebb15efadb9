"""Train the ControlNet that follows depth images, on the frozen base."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from weights.train import dataset
from weights.train.depths import at_finest, build_head, cells, depth_image
from weights.train.diffusion import Noisy, add_noise, build_scheduler
from weights.train.fit import Plan, fit, mixed_precision
from weights.train.recognise import Block
from weights.train.sdxl import FACTOR, SUBJECTS, Spheres, TextToSphere, encode_kinds, subjects

PLAN = Plan("controlnet", steps=2600, learning_rate=1e-3, average=0.99, warmup=50)
READER_PLAN = Plan("latent-depth", steps=2000, learning_rate=2e-3, average=0.99, warmup=50)
DROPPED = 0.5  # share of captions left out, so that shapes are read off the depth (2302.05543)
SCALES = (0.5, 1.0)
"""The range of controlnet_conditioning_scale in training, so depth is followed throughout it."""


def build(base: TextToSphere) -> ControlNetModel:
    """Copy the base's first half, so that it changes nothing before it is trained.

    Its outputs start at zero, and the depth image's embedding at full strength: with diffusers' own
    initialisation, layers that each shrink it would leave next to nothing of it.
    """
    controlnet = ControlNetModel.from_unet(
        base.unet, conditioning_embedding_out_channels=(8, 16, 32, 64)
    )
    for module in controlnet.controlnet_cond_embedding.modules():
        if isinstance(module, nn.Conv2d):
            # The slope of SiLU at 0 is a half.
            nn.init.normal_(module.weight, std=2 / module.weight[0].numel() ** 0.5)
            nn.init.zeros_(module.bias)
    return controlnet


class LatentReader(nn.Module):
    """A small network that reads depth off latents.

    It teaches the ControlNet. Measurements use another network, `depths.DepthReader`, which has
    no part in making images.
    """

    def __init__(self, channels: tuple[int, ...] = (48, 64, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(channels))
        self.head = build_head(sum(channels))

    def forward(self, latents: Tensor) -> Tensor:
        """Read depth (N, h, w) in [0, 1] off latents (N, 4, h, w)."""
        features = [self.stem(latents)]
        for block in self.blocks:
            features.append(block(F.gelu(features[-1])))
        return self.head(F.gelu(at_finest(features))).sigmoid()[:, 0]


def depth_images(
    distances: Sequence[NDArray[np.float16]], index: list[int], shift: list[int]
) -> Tensor:
    """Return the depth images (N, 3, H, W) in [0, 1] of images, rolled by cells.

    Args:
        distances: (M, H, W) metres for each kind of image.
        index: the numbers of the images, counted kind after kind.
        shift: the number of cells to roll each by.
    """
    rolled = []
    for i, turn in zip(index, shift, strict=True):
        kind, number = dataset.locate(map(len, distances), i)
        depth = depth_image(distances[kind][number])
        rolled.append(np.roll(depth, turn * FACTOR, axis=1))
    return torch.from_numpy(np.stack(rolled))[:, None].expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Lessons:
    """The lessons of the reader and ControlNet: images with their depth, and the frozen base."""

    base: TextToSphere
    spheres: Spheres
    distances: list[NDArray[np.float16]]  # (M, H, W) metres for each kind of image
    scheduler: DDIMScheduler

    def draw(self, generator: torch.Generator) -> tuple[Noisy, Tensor, dict[str, Any]]:
        """Draw noisy latents, depth images (N, 3, H, W) in [0, 1], and the base's conditions."""
        index, shift = self.spheres.draw(generator)
        captions = self.spheres.captions(index, generator, DROPPED)
        noisy = add_noise(self.spheres.rolled(index, shift), self.scheduler, generator)
        return noisy, depth_images(self.distances, index, shift), self.base.conditions(captions)


def train_reader(work: Path, lessons: Lessons) -> nn.Module:
    """Train on the base's predictions from noisy latents, however vague they are."""

    def loss(generator: torch.Generator) -> Tensor:
        with mixed_precision():
            noisy, depth, conditions = lessons.draw(generator)
            with torch.no_grad():
                noise_pred = lessons.base.unet(noisy.latents, noisy.t, **conditions).sample
            seen = reader(noisy.x0(noise_pred.float()))
        return F.l1_loss(seen.float(), cells(depth[:, 0]))

    reader = LatentReader()
    return fit(reader, loss, READER_PLAN, work)


def train(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: TextToSphere
) -> ControlNetModel:
    """Train on the rendered distances.

    The error of the noise alone says little about depth: after a thousand steps the ControlNet
    still followed none. A depth reader says more (ControlNet++, arXiv 2404.07987).
    """
    torch.manual_seed(5)
    base.requires_grad_(False)
    controlnet = build(base)
    spheres = Spheres(encode_kinds(work, vae), subjects(work), tokenizer)
    distances = [dataset.load(work, kind, "train").distance for kind in SUBJECTS]
    lessons = Lessons(base, spheres, distances, build_scheduler())
    reader = train_reader(work, lessons).requires_grad_(False)

    def loss(generator: torch.Generator) -> Tensor:
        scale = float(torch.empty(()).uniform_(*SCALES, generator=generator))
        with mixed_precision():
            noisy, depth, conditions = lessons.draw(generator)
            down, middle = controlnet(
                noisy.latents,
                noisy.t,
                controlnet_cond=depth,
                conditioning_scale=scale,
                return_dict=False,
                **conditions,
            )
            noise_pred = base.unet(
                noisy.latents,
                noisy.t,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                **conditions,
            ).sample.float()
            seen = reader(noisy.x0(noise_pred))
        error = F.l1_loss(seen.float(), cells(depth[:, 0]))
        return noisy.error(noise_pred) + error

    trained = fit(controlnet, loss, PLAN, work)
    assert isinstance(trained, ControlNetModel)
    return trained
