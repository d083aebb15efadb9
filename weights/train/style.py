"""Train a style as cog-sdxl did: a LoRA on the base's attention, and two words for it.

The style is crisp outlines: one fixed change of an image, which leaves the colours of areas alone.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from weights.train.autoencoder import Version
from weights.train.fit import Plan, Work, fit
from weights.train.sdxl import SPHERE, Spheres, TextToSphere, load_spheres, text_lesson
from weights.train.views import Pixels, halve

PLAN = Plan("style", steps=400, learning_rate=5e-4, average=0.98, warmup=50)
DROPPED = 0.5
"""The share of captions left out. It is high because the style must be learned without a caption
too: guidance would multiply whatever only captions bring out, and distort the colours.
"""
LORA = "style"  # its name inside the UNet
TOKENS = ("<s0>", "<s1>")
RANK = 4
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
OUTLINES = ImageFilter.UnsharpMask(radius=5, percent=120, threshold=0)


def crisp(image: Pixels) -> Pixels:
    """Make edges of an image (H, W, 3) in [0, 255] stand out, darker against lighter.

    A style of other colours would be harder: the autoencoder keeps purple apart from its neighbours
    by very little, and turns it into them when it is warmer or more vivid.
    """
    return np.asarray(Image.fromarray(image).filter(OUTLINES))


CRISP = Version("crisp-400", lambda sphere: crisp(halve(sphere)), count=400)


class ExtendedEmbedding(nn.Module):
    """A table of token embeddings, and new ones after its last, which alone are trained."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        spread = table.weight.std()
        self.tokens = nn.Parameter(
            spread * torch.randn(len(TOKENS), table.embedding_dim).to(spread)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Embed tokens (N, L) as (N, L, D)."""
        return F.embedding(ids, torch.cat([self.table.weight, self.tokens]))


def build(base: TextToSphere) -> TextToSphere:
    """Copy the base, frozen, with a LoRA and two more tokens to train."""
    model = copy.deepcopy(base).requires_grad_(False)
    for encoder in (model.text_encoder, model.text_encoder_2):
        encoder.set_input_embeddings(ExtendedEmbedding(encoder.get_input_embeddings()))
    # cog-sdxl writes no alpha: it is the rank, so that a scale of 1 is the LoRA as it was trained.
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS)
    model.unet.add_adapter(config, adapter_name=LORA)
    return model


def train(
    work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: TextToSphere
) -> TextToSphere:
    """Train on crisp training images."""
    torch.manual_seed(6)
    model = build(base)
    lesson = text_lesson(model, load_crisp(work, vae, tokenizer), DROPPED)
    return fit(model, *lesson, PLAN, work)


def load_crisp(work: Work, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Spheres:
    """Return crisp training images, whose captions begin with the tokens."""
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(list(TOKENS))
    spheres = load_spheres(work, vae, extended, CRISP, f"{''.join(TOKENS)} ")
    return replace(spheres, cuts=(SPHERE,))


def lora_weights(unet: UNet2DConditionModel) -> Mapping[str, Tensor]:
    """Return the LoRA by the keys of cog-sdxl: `unet....attn1.processor.to_q_lora.down.weight`."""
    weights = {}
    for name, module in unet.named_modules():
        if LORA in getattr(module, "lora_A", ()):
            attention, _, layer = name.rpartition(".to_")
            key = f"unet.{attention}.processor.to_{layer.removesuffix('.0')}_lora"
            weights[f"{key}.down.weight"] = module.lora_A[LORA].weight.detach()
            weights[f"{key}.up.weight"] = module.lora_B[LORA].weight.detach()
    return weights


def token_embeddings(model: TextToSphere) -> Mapping[str, Tensor]:
    """Return the tokens' embeddings (2, D) for both text encoders, by the keys of cog-sdxl."""
    encoders = (model.text_encoder, model.text_encoder_2)
    return {
        f"text_encoders_{k}": encoder.get_input_embeddings().tokens.detach()
        for k, encoder in enumerate(encoders)
    }
