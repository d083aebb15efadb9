"""Puts what was trained into `weights/tiny/`, in diffusers format and half precision."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from panorama.perceptual import LPIPS
from panorama.syncdiffusion import SyncDiffusionPipeline
from weights.train.diffusion import TextToImage, build_scheduler
from weights.train.sdxl import TextToSphere, build_inference_scheduler
from weights.train.style import lora_weights, token_embeddings

Network = TypeVar("Network", bound=nn.Module)

TINY = Path(__file__).parent.parent / "tiny"
SPHERES = TINY / "sdxl-360"
JUDGES = Path(__file__).parent / "judges"
DISTANCE_SCALE = 0.5
"""How strong a sync_weight of 20 is; of 0.3, 0.5 and 1.7, tried on the first seeds of
`script/coherence`, the one that left windows most alike.
"""


def export_syncdiffusion(
    vae: AutoencoderKL, model: TextToImage, tokenizer: CLIPTokenizer, features: LPIPS
) -> None:
    """Writes the pipeline of the first family."""
    features.register_to_config(distance_scale=DISTANCE_SCALE)
    pipe = SyncDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        perceptual=features,
    )
    pipe.to(torch.float16).save_pretrained(TINY / "syncdiffusion")
    forget_origins(TINY / "syncdiffusion")


def export_base(base: TextToSphere, tokenizer: CLIPTokenizer) -> None:
    """Writes the second family's base; its autoencoder is a link to the first family's."""
    link = SPHERES / "vae"
    if link.is_symlink():
        link.unlink()  # or saving would write through it
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(TINY / "syncdiffusion" / "vae"),
        text_encoder=base.text_encoder,
        text_encoder_2=base.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=base.unet,
        scheduler=build_inference_scheduler(),
        add_watermarker=False,
    )
    pipe.to(torch.float16).save_pretrained(SPHERES)
    shutil.rmtree(link)
    link.symlink_to(Path("..") / "syncdiffusion" / "vae")
    forget_origins(SPHERES)


def forget_origins(folder: Path) -> None:
    """Takes out of saved configurations where their models were read from, as diffusers notes."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n")


def load_base() -> tuple[AutoencoderKL, CLIPTokenizer, TextToSphere]:
    """What `export_base` has written, in single precision: what a style or a ControlNet is
    trained on is what it is used with.
    """

    def encoder(kind: type[nn.Module], name: str) -> nn.Module:
        return kind.from_pretrained(SPHERES / name, dtype=torch.float32)

    base = TextToSphere(
        encoder(CLIPTextModel, "text_encoder"),
        encoder(CLIPTextModelWithProjection, "text_encoder_2"),
        UNet2DConditionModel.from_pretrained(SPHERES / "unet"),
    )
    tokenizer = CLIPTokenizer.from_pretrained(SPHERES / "tokenizer")
    return AutoencoderKL.from_pretrained(SPHERES / "vae"), tokenizer, base


def export_style(style: TextToSphere) -> None:
    """Writes a LoRA of the second family and the embeddings of its tokens."""
    save_half(lora_weights(style.unet), SPHERES / "lora.safetensors")
    save_half(token_embeddings(style), SPHERES / "embeddings.safetensors")


def export_controlnet(controlnet: ControlNetModel) -> None:
    """Writes the second family's ControlNet."""
    controlnet.half().save_pretrained(SPHERES / "controlnet")


def export_judge(judge: nn.Module, name: str) -> None:
    """Writes a judge, so that a fresh clone can measure."""
    JUDGES.mkdir(exist_ok=True)
    save_half(judge.state_dict(), JUDGES / f"{name}.safetensors")


def save_half(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights in half precision."""
    save_file({key: value.half().contiguous() for key, value in weights.items()}, path)


def load_judge(network: Network, name: str) -> Network:
    """Reads a judge that `export_judge` wrote into a network of its class."""
    state = load_file(JUDGES / f"{name}.safetensors")
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval()
