"""A small random model of the shape of SDXL base 1.0 with its ControlNet, and a LoRA for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from panorama.base_model import BaseModel, own_lora
from panorama.conditioning.lora import load_tokens
from panorama.conditioning.prompts import TextEncoder
from panorama.sampling.perceptual import LPIPS
from tests.small import small_tiny_vae

HIDDEN = (16, 24)  # of the text encoders
TOKENIZER = Path(__file__).parents[1] / "weights" / "tiny" / "sd2" / "tokenizer"


def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer to change, without trigger tokens; contexts of 32."""
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def text_encoder(kind: type[nn.Module], tokenizer: Any, hidden: int) -> nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=32,
            projection_dim=hidden,  # which only the second encoder has
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def small_perceptual() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS(channels=((4,), (8,), (8,)))


def build() -> BaseModel:
    """Return the classes and the wiring of SDXL base 1.0 and its ControlNet, small; no LoRA.

    Windows of 16 x 16 latents, factor 8, sizes that are multiples of 32 pixels.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=1,
        cross_attention_dim=sum(HIDDEN),
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=HIDDEN[1] + 6 * 8,
    )
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.3)  # they begin as zeros
    nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.3)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    return assemble(unet, controlnet, vae, HIDDEN)


def assemble(
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    vae: AutoencoderKL,
    hidden: tuple[int, int],
) -> BaseModel:
    """Put models together with small text encoders of some hidden sizes, ready to run."""
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    tokenizers = [tokenizer() for _ in kinds]
    models = map(text_encoder, kinds, tokenizers, hidden)
    base = BaseModel(
        unet=unet,
        vae=vae,
        text_encoders=tuple(map(TextEncoder, tokenizers, models)),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        controlnet=controlnet,
        perceptual=small_perceptual(),
        tiny_vae=small_tiny_vae(len(vae.config.block_out_channels)),
    )
    for network in base.networks():
        network.eval()
    return base


def components(base: BaseModel) -> dict[str, Any]:
    """Return the parts of a base model by the names that diffusers' pipelines have for them."""
    parts = {"unet": base.unet, "vae": base.vae, "scheduler": base.scheduler}
    for suffix, encoder in zip(("", "_2"), base.text_encoders, strict=False):
        parts |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
    return parts | ({"controlnet": base.controlnet} if base.controlnet else {})


def save(base: BaseModel, folder: Path) -> dict[str, Path]:
    """Write a base model but for LPIPS; return its components, as `load_base_model` reads them."""
    parts = components(base) | {"tiny_vae": base.tiny_vae}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return {name: folder / name for name in parts}


def cog_sdxl(base: BaseModel, path: Path, prefix: str = "") -> Path:
    """Write a LoRA on the UNet's attention, with the keys of cog-sdxl."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, module in base.unet.named_modules():
        attention, _, layer = name.rpartition(".to_")
        if attention and isinstance(module, nn.Linear):
            key = f"{prefix}{attention}.processor.to_{layer.removesuffix('.0')}_lora"
            sides = {"down": (2, module.in_features), "up": (module.out_features, 2)}
            for side, shape in sides.items():
                weights[f"{key}.{side}.weight"] = torch.randn(shape, generator=generator)
    assert any(".processor.to_out_lora.up.weight" in key for key in weights)
    save_file(weights, path)
    return path


def pivotal(path: Path) -> Path:
    """Write embeddings of two tokens for both text encoders."""
    generator = torch.Generator().manual_seed(6)
    shapes = {f"text_encoders_{k}": (2, hidden) for k, hidden in enumerate(HIDDEN)}
    save_file({key: torch.randn(s, generator=generator) for key, s in shapes.items()}, path)
    return path


def add_lora(base: BaseModel, folder: Path) -> BaseModel:
    """Give a base model a LoRA and its tokens, by way of files in a folder."""
    lora = own_lora(base, cog_sdxl(base, folder / "lora.safetensors"))
    tokens = load_tokens(base.text_encoders, pivotal(folder / "embeddings.safetensors"))
    return replace(base, lora=lora, tokens=tokens)


def save_family(folder: Path, modes: Sequence[str] = ("sdxl-360",), **defaults: Any) -> None:
    """Write a family of SDXL's modes, with a LoRA; every mode has the same defaults."""
    base = build()
    save(base, folder / "sdxl")
    cog_sdxl(base, folder / "sdxl" / "lora.safetensors")
    pivotal(folder / "sdxl" / "embeddings.safetensors")
    base.perceptual.save_pretrained(folder / "perceptual")
    lines = [f"{name} = {value}" for name, value in defaults.items()]
    text = "\n".join(line for mode in modes for line in (f"[{mode}]", *lines))
    (folder / "family.toml").write_text(text)
