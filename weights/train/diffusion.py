"""Train the first model's text encoder and UNet on windows of the strips' latents."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from weights.train import dataset, rooms, scenes
from weights.train.autoencoder import FACTOR, encode
from weights.train.device import batch_size, device, on_device
from weights.train.fit import Batch, Plan, Work, fit
from weights.train.windows import crop, draw_numbers

T = TypeVar("T")
Encoder = TypeVar("Encoder", bound=nn.Module)

PLAN = Plan("diffusion", steps=14000, learning_rate=1e-3, average=0.999)
BATCH, WINDOW = 16, 32
VARIANTS = 16  # captions drawn of each image
CONTEXT = 32  # tokens
HIDDEN = 128  # of a text encoder
DROPPED = 0.1  # share of captions left out, for guidance
STRIP = slice(scenes.STRIP.start // FACTOR, scenes.STRIP.stop // FACTOR)  # rows of latents
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
"""The noise schedule of SD 2 base; `add_noise` moves its tables to the device that trains."""


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer of a few hundred words; its bytes spell any other text."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    endings = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=letters,
        # Declared from the start. Otherwise they are numbered in hash order, which decides between
        # equally frequent pairs, and the vocabulary would differ from run to run.
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = letters + endings
    pieces += [a + b for a, b in merges if a + b not in pieces]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces + special))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in merges],
        model_max_length=CONTEXT,
        pad_token="<|endoftext|>",
    )


def words() -> Iterator[str]:
    """Yield the words of every caption, rooms included: both models share the vocabulary."""
    for table in (scenes.TIME_WORDS, scenes.LAND_WORDS):
        for synonyms in table.values():
            yield from dict.fromkeys(synonyms)
    yield from scenes.FRAMES
    yield from ("over at with trees under clouds", "hdri view in the color of")
    yield from ("looking up looking down at", "room")
    yield from rooms.KINDS
    yield from rooms.COLORS
    yield from ("seamless panorama", "low quality, blurry, dark, people, text, watermark")


def build_text_encoder(kind: type[Encoder], tokenizer: CLIPTokenizer) -> Encoder:
    """Build two small layers, to be trained together with the UNet."""
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


def build_unet(cross_attention_dim: int = HIDDEN, **conditions: Any) -> UNet2DConditionModel:
    """Build a UNet of 6 M parameters for windows of 32 x 32 latents; sdxl adds conditions."""
    return UNet2DConditionModel(
        sample_size=WINDOW,
        block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 3, 4),  # diffusers means the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
        **conditions,
    )


class TextToImage(nn.Module):
    """The trained networks: the text encoder and the UNet."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predict the noise in latents (N, 4, h, w) at timesteps (N,) under captions (N, L)."""
        states = self.text_encoder(ids).last_hidden_state  # (N, L, D)
        return self.unet(latents, t, encoder_hidden_states=states).sample


def uneven_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw noise (N, C, h, w) with somewhat more low frequencies than white noise.

    At its last timestep the schedule leaves a little signal, enough to read the colours of large
    areas through white noise. Generation starts from pure noise, where these colours have to come
    from the caption. This noise ("offset noise") hides them in training too.
    """
    place = generator.device
    noise = torch.randn(shape, generator=generator, device=place)
    for cells, strength in ((1, 0.15), (4, 0.12)):
        coarse = torch.randn(*shape[:2], cells, cells, generator=generator, device=place)
        noise = noise + strength * F.interpolate(coarse, shape[2:], mode="bicubic")
    return noise


class Noisy(NamedTuple):
    """Latents with noise added."""

    latents: Tensor  # (N, C, h, w)
    noise: Tensor  # (N, C, h, w), the noise in them
    t: Tensor  # (N,)
    alpha_bar: Tensor  # (N, 1, 1, 1)

    def error(self, noise_pred: Tensor) -> Tensor:
        """Return the error of the predicted noise: that of x0, weighted by SNR clamped to [0.2, 5].

        The upper bound is that of Min-SNR (arXiv 2303.09556). The lower bound gives weight to the
        noisiest timesteps: the colours of large areas are decided there, but even a wrong x0 hardly
        shows in the error of the noise.
        """
        error = F.mse_loss(noise_pred, self.noise, reduction="none").mean((1, 2, 3))
        snr = (self.alpha_bar / (1 - self.alpha_bar)).flatten()
        return (error * (snr.clamp(0.2, 5.0) / snr)).mean()

    def x0(self, noise_pred: Tensor) -> Tensor:
        """Return the clean latents (N, C, h, w) that the predicted noise leaves."""
        return (self.latents - (1 - self.alpha_bar).sqrt() * noise_pred) / self.alpha_bar.sqrt()


def add_noise(x0: Tensor, generator: torch.Generator, draws: int = 1) -> Noisy:
    """Add noise to latents x0 (N, C, h, w), at the largest of `draws` random timesteps for each.

    The generator must be on their device.
    """
    steps = SCHEDULER.config.num_train_timesteps
    t = torch.randint(steps, (draws, len(x0)), generator=generator, device=x0.device).amax(0)
    noise = uneven_noise(x0.shape, generator)
    latents = SCHEDULER.add_noise(x0, noise, t)  # moves alphas_cumprod to the device of x0
    return Noisy(latents, noise, t, SCHEDULER.alphas_cumprod[t].view(-1, 1, 1, 1))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Turn captions into tokens (N, CONTEXT) on the device."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device())


def draw_captions(
    subjects: Sequence[T],
    caption: Callable[[T, np.random.Generator], str],
    tokenizer: CLIPTokenizer,
) -> Tensor:
    """Draw captions of images, VARIANTS of each, and return their tokens (N, VARIANTS, CONTEXT)."""
    rng = np.random.default_rng(0)
    texts = [caption(subject, rng) for subject in subjects for _ in range(VARIANTS)]
    return tokenize(tokenizer, texts).unflatten(0, (-1, VARIANTS))


def train(work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> TextToImage:
    """Train on windows of the strips at any place, also across the wrap."""
    torch.manual_seed(3)
    model = TextToImage(build_text_encoder(CLIPTextModel, tokenizer), build_unet())
    latents = encode(work, vae, "outdoors")[:, :, STRIP].to(device())
    facts = dataset.load(work.folder, "outdoors", "train").attributes
    subjects = [scenes.Scene(**attributes) for attributes in facts]
    captions = draw_captions(subjects, scenes.Scene.caption, tokenizer)
    empty = tokenize(tokenizer, [""])
    count = batch_size(BATCH)

    def draw(generator: torch.Generator) -> Batch:
        generator = on_device(generator)
        index = draw_numbers(len(latents), count, generator)
        left = draw_numbers(latents.shape[-1], count, generator)
        x0 = crop(latents, index, torch.zeros_like(left), left, (WINDOW, WINDOW))
        ids = captions[index, draw_numbers(VARIANTS, count, generator)]
        given = torch.rand(count, 1, generator=generator, device=device()) >= DROPPED
        return *add_noise(x0, generator), torch.where(given, ids, empty)

    def loss(*batch: Tensor) -> Tensor:
        *parts, ids = batch
        noisy = Noisy(*parts)
        return noisy.error(model(noisy.latents, noisy.t, ids).float())

    return fit(model, draw, loss, PLAN, work)
