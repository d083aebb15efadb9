"""Train the second model's text encoders and UNet on spheres of two sizes and windows of them.

Convolutions pad with zeros, as SDXL's did in training: at inference `circular` closes an image,
not the weights.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from weights.train import dataset, diffusion
from weights.train.autoencoder import FACTOR, HALVED, Version, encode
from weights.train.dataset import KINDS, SETS, Subject
from weights.train.device import batch_size, device, on_device
from weights.train.diffusion import DROPPED, HIDDEN, Noisy, add_noise
from weights.train.fit import Batch, Draw, Loss, Plan, Work, fit
from weights.train.views import look
from weights.train.windows import crop, draw_number, draw_numbers

PLAN = Plan("sdxl", steps=14000, learning_rate=1e-3, average=0.999)
SIZE_CHANNELS = 16  # for each of the six numbers of an image's sizes
SIDES = (128, 1024)  # pixels of the sizes that are only declared
KEEP = 0.8  # share of attributes that captions name
PREFIX = "hdri view, "
SIDE = 32  # cells; the height of all that is cut, and the width of a window


@dataclass(frozen=True)
class Cut:
    """A cut of the latents of spheres, SIDE cells high, for a batch."""

    share: float  # of the batches
    large: bool  # of the spheres of 64 x 128 cells; otherwise of those of 32 x 64
    tops: tuple[int, int]  # the first and the last top row, cells
    width: int  # cells
    size: tuple[int, int]  # height and width of what it is declared to be a part of, pixels
    count: int  # of a batch


SPHERE = Cut(0.40, large=False, tops=(0, 0), width=64, size=(256, 512), count=8)
WINDOW = Cut(0.14, large=False, tops=(0, 0), width=SIDE, size=(256, 512), count=16)
CUTS = (
    SPHERE,
    WINDOW,
    Cut(0.20, large=True, tops=(0, SIDE), width=SIDE, size=(512, 1024), count=16),
    Cut(0.10, large=True, tops=(0, SIDE), width=2 * SIDE, size=(512, 1024), count=8),
    Cut(
        0.16, large=True, tops=(diffusion.STRIP.start,) * 2, width=SIDE, size=(256, 1024), count=16
    ),
)
"""Spheres, windows of them, windows and halves of larger ones, and windows of strips."""
SCHEDULER = EulerDiscreteScheduler(**diffusion.SCHEDULE, steps_offset=1, timestep_spacing="leading")
"""SDXL base's scheduler, with the noise schedule of the training."""
LOOKS = (
    Version("looking up", partial(look, up=True), count=500, wrap=0),
    Version("looking down", partial(look, up=False), count=500, wrap=0),
)
"""Views straight up and down, whose captions begin with their names."""
LOOK_SHARE = 0.06  # of the batches


def build_unet() -> UNet2DConditionModel:
    """Build a UNet of 6.5 M parameters, like the first model's but for the conditions.

    It sees the penultimate states of both text encoders, and SDXL's sizes. It is trained on whole
    spheres of 32 x 64 latents. Windows are squares of their height.
    """
    return diffusion.build_unet(
        2 * HIDDEN,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_CHANNELS,
        projection_class_embeddings_input_dim=HIDDEN + 6 * SIZE_CHANNELS,
    )


def warm_start(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy every weight whose name and shape the model has too."""
    own = model.state_dict()
    same = {k: w for k, w in state.items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(own | same)


class Captions(NamedTuple):
    """The captions of a batch of images."""

    ids: Tensor  # (N, L) tokens
    given: Tensor  # (N,) bool; the others are left out, for guidance
    sizes: Tensor  # (N, 6) height and width before resizing, crop's top and left, height, width


class TextToSphere(nn.Module):
    """The trained networks: both text encoders and the UNet."""

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        unet: UNet2DConditionModel,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.unet = unet

    def conditions(self, captions: Captions) -> dict[str, Any]:
        """Return the arguments of UNet and ControlNet, as `StableDiffusionXLPipeline` makes them.

        A caption that is left out becomes zeros, as there with `force_zeros_for_empty_prompt`.
        """
        first = self.text_encoder(captions.ids, output_hidden_states=True)
        second = self.text_encoder_2(captions.ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)  # (N, L, 2 D)
        given = captions.given[:, None].to(states.dtype)
        pooled = {"text_embeds": second.text_embeds * given, "time_ids": captions.sizes}
        return {"encoder_hidden_states": states * given[..., None], "added_cond_kwargs": pooled}

    def forward(self, latents: Tensor, t: Tensor, captions: Captions) -> Tensor:
        """Predict the noise in latents (N, 4, h, w) at timesteps (N,) under captions."""
        return self.unet(latents, t, **self.conditions(captions)).sample


def caption(subject: Subject, rng: np.random.Generator) -> str:
    """Describe an image, half of the time after `PREFIX`; may be empty."""
    text = subject.caption(rng, KEEP)
    return f"{PREFIX}{text}" if text and rng.random() < 0.5 else text


@dataclass(frozen=True)
class Cuts:
    """Cuts of the spheres of one batch."""

    x0: Tensor  # (N, 4, h, w) latents
    index: Tensor  # (N,) numbers of images
    cut: Cut
    top: Tensor  # (N,) cells
    left: Tensor  # (N,) cells


@dataclass(frozen=True)
class Spheres:
    """The training images as latents, kind after kind, drawn in batches on the device."""

    small: Tensor  # (N, 4, 32, 64)
    large: Tensor | None  # (N, 4, 64, 128)
    kinds: tuple[int, ...]  # the number of images of each kind, N in all
    ids: Tensor  # (N, V, L) tokens of V captions of each
    cuts: tuple[Cut, ...] = CUTS

    def draw(self, generator: torch.Generator) -> Cuts:
        """Draw cuts at any place, also across the wrap: a rolled sphere is a sphere again."""
        shares = torch.tensor([cut.share for cut in self.cuts])
        cut = self.cuts[int(torch.multinomial(shares, 1, generator=generator))]
        latents = self.large if cut.large else self.small
        generator, count = on_device(generator), batch_size(cut.count)
        index = self.draw_index(count, generator)
        top = cut.tops[0] + draw_numbers(cut.tops[1] - cut.tops[0] + 1, count, generator)
        left = draw_numbers(latents.shape[-1], count, generator)
        return Cuts(crop(latents, index, top, left, (SIDE, cut.width)), index, cut, top, left)

    def lesson(
        self, dropped: float, generator: torch.Generator, draws: int = 1
    ) -> tuple[Cuts, Batch]:
        """Draw cuts, and a batch of them with noise and with captions, a share of them left out."""
        cuts = self.draw(generator)
        generator = on_device(generator)
        sizes = time_ids(cuts, generator)
        captions = self.captions(cuts.index, sizes, dropped, generator)
        return cuts, (*add_noise(cuts.x0, generator, draws), *captions)

    def draw_index(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw numbers (N,) of images, as many of each kind on average."""
        place = generator.device
        kind = draw_numbers(len(self.kinds), count, generator)
        sizes = torch.tensor(self.kinds, device=place)
        share = torch.rand(count, generator=generator, device=place, dtype=torch.float64)
        return (sizes.cumsum(0) - sizes)[kind] + (share * sizes[kind]).long()

    def captions(
        self, index: Tensor, sizes: Tensor, dropped: float, generator: torch.Generator
    ) -> Captions:
        """Describe images of numbers (N,) and sizes (N, 6); a share of captions is left out."""
        variants = draw_numbers(self.ids.shape[1], len(index), generator)
        given = torch.rand(len(index), generator=generator, device=index.device) >= dropped
        return Captions(self.ids[index, variants], given, sizes.float())


def time_ids(batch: Cuts, generator: torch.Generator) -> Tensor:
    """Return SDXL's micro-conditioning (N, 6): original size, crop's top and left, target size.

    Half of the whole spheres are declared to be of a random size, so that the model learns to
    ignore the size. The column at which a cut begins is arbitrary. Half of the time it is declared
    as 0, as it is where a panorama closes.
    """
    cut, count, place = batch.cut, len(batch.index), batch.top.device
    whole = torch.tensor(cut.size, device=place).expand(count, -1)
    part = torch.tensor((FACTOR * SIDE, FACTOR * cut.width), device=place).expand(count, -1)
    other = torch.rand(count, 1, generator=generator, device=place) < 0.5
    if cut is SPHERE:
        sides = torch.randint(SIDES[0], SIDES[1] + 1, (count, 2), generator=generator, device=place)
        whole = part = torch.where(other, sides, whole)
    top = batch.top if cut.tops[0] < cut.tops[1] else torch.zeros_like(batch.top)
    left = batch.left * other[:, 0] * (cut is not SPHERE)
    return torch.cat([whole, FACTOR * torch.stack([top, left], 1), part], 1)


def train(
    work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer, first: UNet2DConditionModel
) -> TextToSphere:
    """Train on everything that CUTS and views straight up and down show.

    The UNet starts from the first model's, except for its attention to words, which read the states
    of another encoder.
    """
    torch.manual_seed(4)
    model = TextToSphere(
        diffusion.build_text_encoder(CLIPTextModel, tokenizer),
        diffusion.build_text_encoder(CLIPTextModelWithProjection, tokenizer),
        build_unet(),
    )
    warm_start(model.unet, first.state_dict())
    draw_plain, loss = text_lesson(model, load_sizes(work, vae, tokenizer))
    looks = [load_spheres(work, vae, tokenizer, version, f"{version.name} ") for version in LOOKS]

    def draw(generator: torch.Generator) -> Batch:
        if float(torch.rand((), generator=generator)) >= LOOK_SHARE:
            return draw_plain(generator)
        seen = looks[draw_number(2, generator)]
        generator = on_device(generator)
        index = seen.draw_index(batch_size(WINDOW.count), generator)
        sizes = torch.tensor([[256, 256, 0, 0, 256, 256]], device=device()).expand(len(index), -1)
        captions = seen.captions(index, sizes, DROPPED, generator)
        return *add_noise(seen.small[index], generator), *captions

    return fit(model, draw, loss, PLAN, work)


def load_sizes(
    work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer, kinds: Collection[str] = tuple(KINDS)
) -> Spheres:
    """Return every training image of some kinds at both sizes, with captions."""
    large = torch.cat([encode(work, vae, kind) for kind in kinds]).to(device())
    return replace(load_spheres(work, vae, tokenizer, HALVED, kinds=kinds), large=large)


def load_spheres(
    work: Work,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    version: Version,
    words: str = "",
    kinds: Collection[str] = tuple(KINDS),
) -> Spheres:
    """Return a version of the training images of some kinds; captions begin with words."""
    latents = [encode(work, vae, kind, version) for kind in kinds]
    subjects = [
        SETS[kind].subject(**attributes)
        for kind in kinds
        for attributes in dataset.load(work.folder, kind, "train").attributes[: version.count]
    ]
    ids = diffusion.draw_captions(subjects, lambda *drawn: words + caption(*drawn), tokenizer)
    return Spheres(torch.cat(latents).to(device()), None, tuple(map(len, latents)), ids)


def text_lesson(
    model: TextToSphere, spheres: Spheres, dropped: float = DROPPED
) -> tuple[Draw, Loss]:
    """Return the lesson of predicting noise under captions, a share of which is left out."""

    def draw(generator: torch.Generator) -> Batch:
        return spheres.lesson(dropped, generator)[1]

    def loss(*batch: Tensor) -> Tensor:
        noisy, captions = Noisy(*batch[:4]), Captions(*batch[4:])
        return noisy.error(model(noisy.latents, noisy.t, captions).float())

    return draw, loss
