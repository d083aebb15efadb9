"""A small random model of the shape of SDXL base 1.0 with its ControlNet, and a LoRA for it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from panorama.sdxl import SDXL360
from weights.train.diffusion import build_tokenizer

HIDDEN = (16, 24)  # of the text encoders


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


def build(folder: Path) -> SDXL360:
    """The classes and the wiring of SDXL base 1.0 and its ControlNet, small."""
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
    return assemble(folder, unet, controlnet, vae, HIDDEN)


def assemble(
    folder: Path,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel,
    vae: AutoencoderKL,
    hidden: tuple[int, int],
) -> SDXL360:
    """Puts models together with small text encoders of some hidden sizes."""
    tokenizers = [build_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    text = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder(CLIPTextModel, tokenizers[0], hidden[0]),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, tokenizers[1], hidden[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    return SDXL360(text, controlnet)


def cog_sdxl(pipe: SDXL360, path: Path, prefix: str = "") -> Path:
    """Writes a LoRA on the UNet's attention, with the keys of cog-sdxl."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, module in pipe.text.unet.named_modules():
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
    """Writes embeddings of two tokens for both text encoders."""
    generator = torch.Generator().manual_seed(6)
    shapes = {f"text_encoders_{k}": (2, hidden) for k, hidden in enumerate(HIDDEN)}
    save_file({key: torch.randn(s, generator=generator) for key, s in shapes.items()}, path)
    return path


def save_family(folder: Path, **mode: Any) -> None:
    """Writes a family of the mode sdxl-360 alone, with a LoRA."""
    own = folder / "sdxl-360"
    pipe = build(folder / "tokenizers")
    pipe.text.save_pretrained(own)
    pipe.depth.controlnet.save_pretrained(own / "controlnet")
    cog_sdxl(pipe, own / "lora.safetensors")
    pivotal(own / "embeddings.safetensors")
    lines = [f"{name} = {value}" for name, value in mode.items()]
    (folder / "family.toml").write_text("\n".join(["[sdxl-360]", *lines]))
