"""Trains the ControlNet that follows depth images, on the frozen base."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from weights.train import dataset
from weights.train.depths import depth_image
from weights.train.diffusion import build_scheduler, denoising_loss
from weights.train.fit import Plan, fit
from weights.train.sdxl import FACTOR, SUBJECTS, Spheres, TextToSphere, encode_kinds, subjects

PLAN = Plan("controlnet", steps=2500, learning_rate=5e-4, average=0.99, warmup=100)
DROPPED = 0.5  # share of captions left out, so that shapes are read off the depth (2302.05543)
SCALES = (0.5, 1.0)
"""Between these lies controlnet_conditioning_scale in training: each of them is followed."""


def build(base: TextToSphere) -> ControlNetModel:
    """A copy of the base's first half, which changes nothing before it is trained."""
    return ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16, 32, 64))


def depth_images(
    distances: Sequence[NDArray[np.float16]], index: list[int], shift: list[int]
) -> Tensor:
    """The depth images (N, 3, H, W) in [0, 1] of pictures, rolled by cells.

    Args:
        distances: (M, H, W) metres for each kind of picture.
        index: numbers of pictures, kind after kind.
        shift: how far each is rolled, in latent cells.
    """
    rolled = []
    for i, cells in zip(index, shift, strict=True):
        kind, number = dataset.locate(map(len, distances), i)
        depth = depth_image(distances[kind][number])
        rolled.append(np.roll(depth, cells * FACTOR, axis=1))
    return torch.from_numpy(np.stack(rolled))[:, None].expand(-1, 3, -1, -1)


def train(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: TextToSphere
) -> ControlNetModel:
    """Trains on the rendered distances."""
    torch.manual_seed(5)
    base.requires_grad_(False)
    controlnet = build(base)
    spheres = Spheres(encode_kinds(work, vae), subjects(work), tokenizer)
    distances = [dataset.load(work, kind, "train").distance for kind in SUBJECTS]
    scheduler = build_scheduler()

    def loss(generator: torch.Generator) -> Tensor:
        index, shift = spheres.draw(generator)
        depth = depth_images(distances, index, shift)
        captions = spheres.captions(index, generator, DROPPED)
        scale = float(torch.empty(()).uniform_(*SCALES, generator=generator))

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            conditions = base.conditions(captions)
            down, middle = controlnet(
                latents,
                t,
                controlnet_cond=depth,
                conditioning_scale=scale,
                return_dict=False,
                **conditions,
            )
            return base.unet(
                latents,
                t,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                **conditions,
            ).sample

        return denoising_loss(predict, spheres.rolled(index, shift), scheduler, generator)

    trained = fit(controlnet, loss, PLAN, work)
    assert isinstance(trained, ControlNetModel)
    return trained
