"""Puts what was trained into `weights/tiny/`, in diffusers format and half precision."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from panorama.perceptual import LPIPS
from panorama.syncdiffusion import SyncDiffusionPipeline
from weights.train.diffusion import TextToImage, build_scheduler
from weights.train.sdxl import TextToSphere, build_inference_scheduler
from weights.train.style import lora_weights, token_embeddings

Network = TypeVar("Network", bound=nn.Module)

TINY = Path(__file__).parent.parent / "tiny"
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


def export_sdxl_360(
    vae: AutoencoderKL,
    model: TextToSphere,
    tokenizer: CLIPTokenizer,
    controlnet: ControlNetModel,
    style: TextToSphere,
) -> None:
    """Writes the second family's models; its autoencoder is a link to the first family's.

    Raises:
        ValueError: the first family has been written with another autoencoder.
    """
    shared = TINY / "syncdiffusion" / "vae"
    if not same_half(vae, AutoencoderKL.from_pretrained(shared)):
        raise ValueError(
            f"vae: must be the autoencoder in {shared.relative_to(TINY.parent)}, which both "
            "families share; that of the stage syncdiffusion, exported first, would do"
        )
    folder = TINY / "sdxl-360"
    link = folder / "vae"
    if link.is_symlink():
        link.unlink()  # or saving would write through it
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=build_inference_scheduler(),
        add_watermarker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    shutil.rmtree(link)
    link.symlink_to(Path("..") / "syncdiffusion" / "vae")
    controlnet.half().save_pretrained(folder / "controlnet")
    save_half(lora_weights(style.unet), folder / "lora.safetensors")
    save_half(token_embeddings(style), folder / "embeddings.safetensors")


def same_half(network: nn.Module, other: nn.Module) -> bool:
    """Whether networks have the same weights in half precision."""
    weights, others = network.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(weight.half(), others[name].half()) for name, weight in weights.items()
    )


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
