"""Train the second model's text encoders and UNet on the latents of whole spheres.

Convolutions pad with zeros, as SDXL's did in training: at inference `circular` closes an image,
not the weights.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from weights.train import dataset, rooms, scenes
from weights.train.diffusion import (
    DROPPED,
    SCHEDULE,
    build_scheduler,
    denoising_loss,
    draw_rng,
    encode,
    tokenize,
)
from weights.train.fit import Plan, fit

PLAN = Plan("sdxl-360", steps=4800, learning_rate=1e-3, average=0.999)
FINISH = Plan("sdxl-360-finish", steps=800, learning_rate=5e-4, average=0.99, warmup=50)
BATCH, FINISH_BATCH = 8, 16
HIDDEN = 128  # of either text encoder
SIZE_CHANNELS = 16  # for each of the six numbers of an image's sizes
SIDES = (128, 1024)  # pixels of the sizes that are only declared
FACTOR = 8  # pixels a latent cell
KEEP = 0.8  # share of attributes that captions name
PREFIX = "hdri view, "

Subject = rooms.Room | scenes.Scene
CAPTIONS: Mapping[type, Callable[..., str]] = {
    rooms.Room: rooms.caption,
    scenes.Scene: scenes.caption,
}
OFTEN: Mapping[type, int] = {rooms.Room: 3, scenes.Scene: 1}
"""The copies of an image that the finish sees: furniture takes longer to learn than landscapes."""
SUBJECTS: Mapping[str, type[Subject]] = {"outdoors": scenes.Scene, "rooms": rooms.Room}


def build_text_encoder(
    kind: type[CLIPTextModel | CLIPTextModelWithProjection], tokenizer: CLIPTokenizer
) -> nn.Module:
    """Build two small layers; the UNet sees the penultimate one's output, as in SDXL."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            projection_dim=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Build a UNet of 6.5 M parameters, like the first model's but for the conditions.

    It is trained on whole spheres of 32 x 64 latents. Windows are squares of their height.
    """
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * HIDDEN,
        attention_head_dim=(2, 3, 4),  # diffusers means the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_CHANNELS,
        projection_class_embeddings_input_dim=HIDDEN + 6 * SIZE_CHANNELS,
    )


def build_inference_scheduler() -> EulerDiscreteScheduler:
    """Build SDXL base's scheduler, with the noise schedule of the training."""
    return EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading")


def warm_start(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy every weight whose name and shape the model has too."""
    own = model.state_dict()
    same = {k: w for k, w in state.items() if k in own and own[k].shape == w.shape}
    model.load_state_dict(own | same)


@dataclass(frozen=True)
class Captions:
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


def subjects(work: Path, count: int | None = None) -> list[Subject]:
    """Return the subjects of the first training images of each kind, or of all, kind after kind."""
    return [
        subject(**attributes)
        for kind, subject in SUBJECTS.items()
        for attributes in dataset.load(work, kind, "train").attributes[:count]
    ]


def encode_kinds(
    work: Path,
    vae: AutoencoderKL,
    style: str = "",
    restyle: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda image: image,
    count: int | None = None,
) -> Tensor:
    """Return the latents (N, 4, h, w) of training images, kind after kind.

    Args:
        work: the folder that keeps them.
        vae: the autoencoder.
        style: the name of the style of `restyle`.
        restyle: changes an image (H, W, 3) in [0, 255] before it is encoded.
        count: the number of each kind, from the first on; None for all.
    """

    def changed(kind: str) -> Iterable[NDArray[np.uint8]]:
        return map(restyle, dataset.load(work, kind, "train").rgb[:count])

    names = {kind: f"{kind}-{style}" if style else kind for kind in SUBJECTS}
    return torch.cat([encode(work, vae, names[kind], changed(kind)) for kind in SUBJECTS])


def caption(subject: Subject, rng: np.random.Generator) -> str:
    """Describe an image, half of the time after `PREFIX`; may be empty."""
    text = CAPTIONS[type(subject)](subject, rng, KEEP)
    return f"{PREFIX}{text}" if text and rng.random() < 0.5 else text


@dataclass(frozen=True)
class Spheres:
    """The training images as latents, drawn in batches."""

    latents: Tensor  # (N, 4, h, w)
    subjects: list[Subject]  # N of them
    tokenizer: CLIPTokenizer
    batch: int = BATCH

    def draw(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Draw numbers of images, and the cells to roll each by."""
        index = torch.randint(len(self.latents), (self.batch,), generator=generator)
        shift = torch.randint(self.latents.shape[-1], (self.batch,), generator=generator)
        return index.tolist(), shift.tolist()

    def rolled(self, index: list[int], shift: list[int]) -> Tensor:
        """Return latents (N, 4, h, w), rolled: a rolled sphere is a sphere again."""
        pairs = zip(index, shift, strict=True)
        return torch.stack([self.latents[i].roll(cells, -1) for i, cells in pairs])

    def captions(
        self, index: list[int], generator: torch.Generator, dropped: float, prefix: str = ""
    ) -> Captions:
        """Describe images, with a share of the captions left out.

        Half of the images are declared to be of another size, so that sizes outside of the
        training do not change the image.
        """
        rng = draw_rng(generator)
        texts = [prefix + caption(self.subjects[i], rng) for i in index]
        height, width = (FACTOR * side for side in self.latents.shape[-2:])
        said = rng.integers(*SIDES, (len(index), 2), endpoint=True)
        said[rng.random(len(index)) < 0.5] = height, width
        return Captions(
            tokenize(self.tokenizer, texts),
            torch.from_numpy(rng.random(len(index)) >= dropped),
            time_ids(torch.from_numpy(said)),
        )


def time_ids(sizes: Tensor) -> Tensor:
    """Return SDXL's sizes (N, 6) of images of sizes (N, 2), neither resized nor cut."""
    return torch.cat([sizes, torch.zeros_like(sizes), sizes], 1).float()


def train(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, first: UNet2DConditionModel
) -> TextToSphere:
    """Train on whole spheres, rolled at random.

    The UNet starts from the first model's, except for its attention to words, which read the states
    of another encoder.
    """
    torch.manual_seed(4)
    model = TextToSphere(
        build_text_encoder(CLIPTextModel, tokenizer),
        build_text_encoder(CLIPTextModelWithProjection, tokenizer),
        build_unet(),
    )
    warm_start(model.unet, first.state_dict())
    spheres = Spheres(encode_kinds(work, vae), subjects(work), tokenizer)
    trained = fit(model, text_loss(model, spheres), PLAN, work)
    assert isinstance(trained, TextToSphere)
    return trained


def finish(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: TextToSphere
) -> TextToSphere:
    """Train the base further, on larger batches with more rooms in them."""
    shown = subjects(work)
    index = [i for i, subject in enumerate(shown) for _ in range(OFTEN[type(subject)])]
    latents = encode_kinds(work, vae)[index]
    spheres = Spheres(latents, [shown[i] for i in index], tokenizer, FINISH_BATCH)
    trained = fit(base, text_loss(base, spheres), FINISH, work)
    assert isinstance(trained, TextToSphere)
    return trained


def text_loss(
    model: TextToSphere, spheres: Spheres, prefix: str = "", dropped: float = DROPPED
) -> Callable[[torch.Generator], Tensor]:
    """Return the loss for `fit`: the error of the noise predicted under captions with a prefix.

    A share of the captions is left out.
    """
    scheduler = build_scheduler()

    def loss(generator: torch.Generator) -> Tensor:
        index, shift = spheres.draw(generator)
        captions = spheres.captions(index, generator, dropped, prefix)
        x0 = spheres.rolled(index, shift)
        return denoising_loss(lambda x, t: model(x, t, captions), x0, scheduler, generator)

    return loss
