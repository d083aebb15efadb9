"""Train the ControlNet that follows depth images, on the frozen base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from panorama.request import INPUTS
from weights.train import dataset, style
from weights.train.autoencoder import FACTOR
from weights.train.depths import at_finest, build_head, cells, depth_images, error
from weights.train.device import device, on_device
from weights.train.diffusion import Noisy
from weights.train.fit import Batch, Draw, Loss, Plan, Work, fit
from weights.train.recognise import Block
from weights.train.sdxl import SIDE, Captions, Cuts, Spheres, TextToSphere, load_sizes
from weights.train.windows import crop

PLAN = Plan("controlnet", steps=3000, learning_rate=1e-3, average=0.99, warmup=50)
READER_PLAN = Plan("latent-depth", steps=2000, learning_rate=2e-3, average=0.99, warmup=50)
DRAWS = 2  # timesteps drawn per image, of which the noisiest is used: shapes are decided early on
SCALES = (0.5, 1.0)
"""The range of controlnet_conditioning_scale in training; most are near the first, the default."""
GUIDANCES = (1.0, 6.0)
"""The range of guidance_scale in training."""
VARIED = 0.5
"""The share of depth images that `vary` changes."""


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


def vary(depth: Tensor, generator: torch.Generator) -> Tensor:
    """Give a share of depth images (N, 3, H, W) in [0, 1] another curve, and more contrast.

    `depth_image` takes the root of inverse distances. Depth estimators such as MiDaS (arXiv
    1907.01341) do not, and stretch them until the farthest is black and the nearest is white.
    """
    drawn = torch.rand(4, len(depth), 1, 1, 1, generator=generator, device=depth.device)
    curved = depth ** (0.7 + 1.8 * drawn[0])
    black = drawn[1] * curved.amin((1, 2, 3), keepdim=True)
    white = 1 - drawn[2] * (1 - black) / 2
    stretched = ((curved - black) / (white - black)).clamp(max=1)
    return torch.where(drawn[3] < VARIED, stretched, depth)


def twice(batch: Tensor) -> Tensor:
    """Repeat a batch (N, ...) after itself."""
    return torch.cat([batch, batch])


def guide(noise_pred: Tensor, guidance: Tensor) -> Tensor:
    """Guide the noise (2 N, C, h, w) predicted with captions, then without (arXiv 2207.12598)."""
    given, left_out = noise_pred.chunk(2)
    return left_out + guidance * (given - left_out)


@dataclass(frozen=True)
class Lessons:
    """The lessons of the reader and ControlNet: images with their depth, and the frozen base."""

    base: TextToSphere
    spheres: Spheres
    depths: Tensor  # (N, 1, H, W) depth images of the spheres, half as high as the large ones

    def draw(self, generator: torch.Generator) -> Batch:
        """Draw noisy latents, captions, guidance, and depth images (N, 3, H, W) in [0, 1]."""
        cuts, lesson = self.spheres.lesson(0.0, generator, DRAWS)
        guidance = torch.empty(len(cuts.index), 1, 1, 1).uniform_(*GUIDANCES, generator=generator)
        return *lesson, guidance.to(device()), self.depth(cuts)

    def unpack(self, batch: Batch) -> tuple[Noisy, dict[str, Any], Tensor, Tensor]:
        """Return the parts of a batch.

        Returns:
            The noisy latents, the UNet's arguments for them with their captions and then without,
            guidance and the depth images.
        """
        noisy, captions, (guidance, depth) = Noisy(*batch[:4]), Captions(*batch[4:7]), batch[7:]
        given = torch.cat([captions.given, torch.zeros_like(captions.given)])
        both = Captions(twice(captions.ids), given, twice(captions.sizes))
        conditions = self.base.conditions(both)
        inputs = {"sample": twice(noisy.latents), "timestep": twice(noisy.t), **conditions}
        return noisy, inputs, guidance, depth

    def depth(self, cuts: Cuts) -> Tensor:
        """Return the depth images (N, 3, H, W) in [0, 1] of cuts."""
        finer = dataset.COARSER if cuts.cut.large else 1
        cell = FACTOR // finer
        size = (cell * SIDE, cell * cuts.cut.width)
        depth = crop(self.depths, cuts.index, cell * cuts.top, cell * cuts.left, size)
        return F.interpolate(depth.float(), scale_factor=finer).expand(-1, 3, -1, -1)


def load_lessons(
    work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: TextToSphere
) -> tuple[Lessons, Lessons]:
    """Return the lessons of the base, and those of the base in the style of its LoRA.

    The style is read from its checkpoint, or trained first.
    """
    distances = [dataset.load(work.folder, kind, "train").distance for kind in dataset.SETS]
    depths = [depth_images(metres) for metres in distances]
    spheres = load_sizes(work, vae, tokenizer, dataset.SETS)
    outdoors, *indoors = spheres.kinds  # rooms are one kind, with or without furniture
    plain = replace(spheres, kinds=(outdoors, sum(indoors)))
    styled = style.train(work, vae, tokenizer, base).requires_grad_(False)
    styled.unet.set_adapters(style.LORA, INPUTS["lora_scale"].default)
    crisp = style.load_crisp(work, vae, tokenizer)
    first = [one[:count] for one, count in zip(depths, crisp.kinds, strict=False)]
    return Lessons(base, plain, torch.cat(depths)), Lessons(styled, crisp, torch.cat(first))


def each(
    lessons: Sequence[Lessons],
    draw_one: Callable[[Lessons, torch.Generator], Batch],
    loss_one: Callable[[Lessons, Batch], Tensor],
) -> tuple[Draw, Loss]:
    """Combine lessons: draw a batch of each, and return the mean of their losses."""

    def draw(generator: torch.Generator) -> Batch:
        return tuple(part for one in lessons for part in draw_one(one, generator))

    def loss(*batch: Tensor) -> Tensor:
        size = len(batch) // len(lessons)
        losses = [loss_one(one, batch[k * size : (k + 1) * size]) for k, one in enumerate(lessons)]
        return torch.stack(losses).mean()

    return draw, loss


def train_reader(work: Work, lessons: Sequence[Lessons]) -> nn.Module:
    """Train on clean latents, and on the base's predictions from noisy ones, however vague."""

    def loss(one: Lessons, batch: Batch) -> Tensor:
        noisy, inputs, guidance, depth = one.unpack(batch)
        with torch.no_grad():
            noise_pred = one.base.unet(**inputs).sample.float()
        clean, vague = noisy.x0(noisy.noise), noisy.x0(guide(noise_pred, guidance))
        half = len(clean) // 2
        seen = reader(torch.cat([clean[:half], vague[half:]]))
        return error(seen.float(), cells(depth[:, 0]))

    reader = LatentReader()
    return fit(reader, *each(lessons, Lessons.draw, loss), READER_PLAN, work)


def train(
    work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: TextToSphere
) -> ControlNetModel:
    """Train on the rendered distances, with as many images in the style of the LoRA as without.

    The error of the predicted noise alone says little about depth: after a thousand steps the
    ControlNet still ignored the depth image. So a network also reads depth off the predicted x0
    (ControlNet++, arXiv 2404.07987). It reads the guided prediction, because guidance amplifies
    what the caption says and not the depth image. The error of the guided noise counts as much as
    that of each of its parts. Without it, trees that followed a depth image were darker.
    """
    torch.manual_seed(5)
    base.requires_grad_(False).to(device())
    controlnet = build(base)
    lessons = load_lessons(work, vae, tokenizer, base)
    reader = train_reader(work, lessons).requires_grad_(False)

    def draw(one: Lessons, generator: torch.Generator) -> Batch:
        low, high = SCALES
        scale = low + (high - low) * torch.rand((), generator=generator).square().to(device())
        *rest, depth = one.draw(generator)
        return *rest, depth, vary(depth, on_device(generator)), scale

    def loss(one: Lessons, batch: Batch) -> Tensor:
        *rest, shown, scale = batch
        noisy, inputs, guidance, depth = one.unpack(tuple(rest))
        down, middle = controlnet(
            controlnet_cond=twice(shown), conditioning_scale=scale, return_dict=False, **inputs
        )
        noise_pred = one.base.unet(
            down_block_additional_residuals=down, mid_block_additional_residual=middle, **inputs
        ).sample.float()
        guided = guide(noise_pred, guidance)
        errors = [noisy.error(noise) for noise in (*noise_pred.chunk(2), guided)]
        seen = reader(noisy.x0(guided))
        return torch.stack(errors).mean() + error(seen.float(), cells(depth[:, 0]))

    return fit(controlnet, *each(lessons, draw, loss), PLAN, work)
