"""Train the first model's text encoder and UNet on the latents of the strips."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from weights.train import dataset, rooms, scenes
from weights.train.autoencoder import to_tensor
from weights.train.fit import Plan, fit, mixed_precision

PLAN = Plan("diffusion", steps=10500, learning_rate=1e-3, average=0.9990, warmup=200)
BATCH, WINDOW = 16, 32
CONTEXT = 32  # tokens
DROPPED = 0.1  # share of captions left out, for guidance
WRAP = 64  # pixels of the other side that the encoder sees beyond either edge
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

logger = logging.getLogger(__name__)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build a CLIP tokenizer of a few hundred words; its bytes spell any other text."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    endings = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=letters,
        # Known from the start, or they are numbered as a hash table has it: that decides between
        # pairs as frequent as each other, and the vocabulary would not be the same every time.
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = letters + endings
    pieces += [a + b for a, b in merges if a + b not in pieces]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces + special))}
    folder.mkdir(parents=True, exist_ok=True)
    clip = CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in merges],
        model_max_length=CONTEXT,
        pad_token="<|endoftext|>",
    )
    clip.save_pretrained(folder)
    return clip


def words() -> Iterator[str]:
    """Yield the words of every caption, rooms included: both models share the vocabulary."""
    for table in (scenes.TIME_WORDS, scenes.LAND_WORDS):
        for synonyms in table.values():
            yield from dict.fromkeys(synonyms)
    yield from scenes.FRAMES
    yield from ("over at with trees under clouds", "hdri view in the color of")
    yield from rooms.KINDS
    yield from rooms.COLORS
    yield from ("seamless panorama", "low quality, blurry, dark, people, text, watermark")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build two small layers, to be trained together with the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Build a UNet of 6 M parameters for windows of 32 x 32 latents."""
    return UNet2DConditionModel(
        sample_size=WINDOW,
        block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 4),  # diffusers means the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Build a scheduler with the noise schedule of SD 2 base."""
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


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


@torch.no_grad()
def encode(
    work: Path, vae: AutoencoderKL, name: str, images: Iterable[NDArray[np.uint8]]
) -> Tensor:
    """Encode images that wrap around horizontally; a file in the work folder keeps the latents.

    Args:
        work: the folder.
        vae: the autoencoder; a change of its encoder's weights gives another file.
        name: the name of the set of images.
        images: the images, (H, W, 3) in [0, 255] each; read only if the file is missing.

    Returns:
        The scaled latents, (N, 4, H / 8, W / 8).
    """
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    weights = torch.cat([p.flatten() for p in encoder.parameters()]).numpy().tobytes()
    path = work / "latents" / f"{name}-{sha256(weights).hexdigest()[:16]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    latents = []
    for index, image in enumerate(images):
        around = np.concatenate([image[:, -WRAP:], image, image[:, :WRAP]], 1)
        with mixed_precision():
            mean = vae.encode(to_tensor(around[None])).latent_dist.mean.float()
        latents.append(mean[..., WRAP // 8 : -WRAP // 8] * vae.config.scaling_factor)
        if index % 400 == 0:
            logger.info("latents of %s: %d", name, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(latents), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    return torch.cat(latents)


def uneven_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw noise (N, C, h, w) with somewhat more low frequencies than white noise.

    The schedule ends with a little signal left, enough to read an image's large areas off white
    noise. Images begin with no signal at all, so their colours have to come from the caption:
    this noise hides them in training too ("offset noise").
    """
    noise = torch.randn(shape, generator=generator)
    for cells, strength in ((1, 0.15), (4, 0.12)):
        coarse = torch.randn(*shape[:2], cells, cells, generator=generator)
        noise = noise + strength * F.interpolate(coarse, shape[2:], mode="bicubic")
    return noise


def loss_weight(alpha_bar: Tensor, low: float = 0.2, high: float = 5.0) -> Tensor:
    """Return the loss's weight at alpha_bar (N,), for x0's error: SNR clamped to [low, high].

    The upper bound is that of Min-SNR (arXiv 2303.09556). The lower one makes up for how little
    the error of the noise says about x0 where there is next to nothing but noise, which is where
    the colours of large areas are decided.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(low, high) / snr


@dataclass(frozen=True)
class Noisy:
    """Latents with noise added."""

    latents: Tensor  # (N, C, h, w)
    noise: Tensor  # (N, C, h, w), the noise in them
    t: Tensor  # (N,)
    alpha_bar: Tensor  # (N, 1, 1, 1)

    def error(self, noise_pred: Tensor) -> Tensor:
        """Return the weighted error of the predicted noise."""
        error = F.mse_loss(noise_pred, self.noise, reduction="none").mean((1, 2, 3))
        return (error * loss_weight(self.alpha_bar.flatten())).mean()

    def x0(self, noise_pred: Tensor) -> Tensor:
        """Return the clean latents (N, C, h, w) that the predicted noise leaves."""
        return (self.latents - (1 - self.alpha_bar).sqrt() * noise_pred) / self.alpha_bar.sqrt()


def add_noise(x0: Tensor, scheduler: DDIMScheduler, generator: torch.Generator) -> Noisy:
    """Draw timesteps and noise for latents x0 (N, C, h, w)."""
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), generator=generator)
    noise = uneven_noise(x0.shape, generator)
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return Noisy(scheduler.add_noise(x0, noise, t), noise, t, alpha_bar)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    scheduler: DDIMScheduler,
    generator: torch.Generator,
) -> Tensor:
    """Return the weighted error of the noise that a model predicts.

    Args:
        predict: maps noisy latents (N, C, h, w) and timesteps (N,) to the noise in them.
        x0: the clean latents (N, C, h, w).
        scheduler: the noise schedule.
        generator: draws timesteps and noise.
    """
    noisy = add_noise(x0, scheduler, generator)
    with mixed_precision():
        noise_pred = predict(noisy.latents, noisy.t)
    return noisy.error(noise_pred.float())


def draw_rng(generator: torch.Generator) -> np.random.Generator:
    """Derive a NumPy generator from one of PyTorch's."""
    return np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Turn captions into tokens (N, CONTEXT)."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train(work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> TextToImage:
    """Train on windows of the strips at any place, also across the wrap."""
    torch.manual_seed(3)
    model = TextToImage(build_text_encoder(tokenizer), build_unet())
    scheduler = build_scheduler()
    images = dataset.load(work, "strips", "train")
    latents, attributes = encode(work, vae, "strips", images.rgb), images.attributes
    width = latents.shape[-1]

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        left = torch.randint(width, (BATCH,), generator=generator)
        columns = (left[:, None] + torch.arange(WINDOW)) % width  # (N, w)
        rows = torch.arange(latents.shape[-2])
        x0 = latents[index[:, None, None], :, rows[:, None], columns[:, None]]  # (N, h, w, C)
        x0 = x0.permute(0, 3, 1, 2)  # (N, C, h, w)
        rng = draw_rng(generator)
        captions = [
            "" if rng.random() < DROPPED else scenes.caption(scenes.Scene(**attributes[i]), rng)
            for i in index.tolist()
        ]
        ids = tokenize(tokenizer, captions)
        return denoising_loss(lambda x, t: model(x, t, ids), x0, scheduler, generator)

    trained = fit(model, loss, PLAN, work)
    assert isinstance(trained, TextToImage)
    return trained
