"""A small random model of the shape of Stable Diffusion 2."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from transformers import CLIPTextModel

from panorama.base_model import BaseModel
from panorama.conditioning.prompts import TextEncoder
from panorama.request import EVERY_MODE
from tests import small_sdxl
from tests.small import small_tiny_vae, small_unet, small_vae
from tests.small_sdxl import small_perceptual, text_encoder, tokenizer


def build() -> BaseModel:
    """Windows of 16 x 16 latents, factor 4, sizes that are multiples of 8 pixels if they wrap."""
    words, unet = tokenizer(), small_unet()
    torch.manual_seed(0)
    base = BaseModel(
        unet=unet,
        vae=small_vae(),
        text_encoders=(
            TextEncoder(words, text_encoder(CLIPTextModel, words, unet.config.cross_attention_dim)),
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        perceptual=small_perceptual(),
        tiny_vae=small_tiny_vae(3),
    )
    for network in base.networks():
        network.eval()
    return base


def save_family(folder: Path, **defaults: Any) -> str:
    """Write a family of every mode, which have the same defaults; SDXL's have a LoRA."""
    small_sdxl.save_family(folder, modes=EVERY_MODE, **defaults)
    small_sdxl.save(build(), folder / "sd2")
    return str(folder)
