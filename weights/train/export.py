"""Write the trained networks to `weights/tiny/`, in diffusers format and half precision."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from panorama.sampling.perceptual import LPIPS
from weights.train import sdxl
from weights.train.diffusion import SCHEDULER, TextToImage
from weights.train.fit import Network
from weights.train.sdxl import TextToSphere
from weights.train.style import lora_weights, token_embeddings

TINY = Path(__file__).parent.parent / "tiny"
SD2, SDXL = "sd2", "sdxl"  # folders of the family
JUDGES = Path(__file__).parent / "judges"
DISTANCE_SCALE = 0.5
"""The factor of the perceptual distance, which decides how strong the default sync_weight of 20 is.
Of 0.3, 0.5 and 1.7, it made windows most alike on the first seeds of `script/coherence`.
"""


def export_sd2(
    vae: AutoencoderKL, model: TextToImage, tokenizer: CLIPTokenizer, features: LPIPS
) -> None:
    """Write the first model, and the perceptual network of both."""
    features.register_to_config(distance_scale=DISTANCE_SCALE)
    save_components(TINY, perceptual=features)
    save_components(
        TINY / SD2,
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=SCHEDULER,
    )


def export_base(base: TextToSphere, tokenizer: CLIPTokenizer) -> None:
    """Write the second model's base; its autoencoder is a link to the first model's."""
    save_components(
        TINY / SDXL,
        text_encoder=base.text_encoder,
        text_encoder_2=base.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=base.unet,
        scheduler=sdxl.SCHEDULER,
    )
    share("vae")


def export_tiny_vae(vae: AutoencoderTiny) -> None:
    """Write the small decoder of both models."""
    save_components(TINY / SD2, tiny_vae=vae)
    # A copy of decoder_block_out_channels: diffusers writes it, and warns of it when it reads it.
    drop_entry(TINY / SD2 / "tiny_vae" / "config.json", "block_out_channels")
    share("tiny_vae")


def share(name: str) -> None:
    """Link a component of the first model into the second."""
    link = TINY / SDXL / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / SD2 / name)


def save_components(folder: Path, **components: Any) -> None:
    """Write each component to a folder of its name, networks in half precision."""
    for name, component in components.items():
        if isinstance(component, nn.Module):
            component.half()
        component.save_pretrained(folder / name)
        # The path that a network was read from.
        drop_entry(folder / name / "config.json", "_name_or_path")


def drop_entry(path: Path, name: str) -> None:
    """Remove what diffusers noted in a configuration under a name, if there is such a file."""
    if path.exists():
        config = json.loads(path.read_text())
        if config.pop(name, None):
            path.write_text(json.dumps(config, indent=2) + "\n")


def load_base() -> tuple[AutoencoderKL, CLIPTokenizer, TextToSphere]:
    """Read the files of `export_base` in single precision.

    A style or a ControlNet is trained on the same files that it is used with.
    """
    folder, single = TINY / SDXL, {"dtype": torch.float32}
    base = TextToSphere(
        CLIPTextModel.from_pretrained(folder / "text_encoder", **single),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **single),
        UNet2DConditionModel.from_pretrained(folder / "unet"),
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return AutoencoderKL.from_pretrained(folder / "vae"), tokenizer, base


def export_style(style: TextToSphere) -> None:
    """Write a LoRA of the second model and the embeddings of its tokens."""
    save_half(lora_weights(style.unet), TINY / SDXL / "lora.safetensors")
    save_half(token_embeddings(style), TINY / SDXL / "embeddings.safetensors")


def export_judge(judge: nn.Module, name: str) -> None:
    """Write a judge, so that a fresh clone can measure."""
    JUDGES.mkdir(exist_ok=True)
    save_half(judge.state_dict(), JUDGES / f"{name}.safetensors")


def save_half(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights in half precision."""
    save_file({key: value.half().contiguous() for key, value in weights.items()}, path)


def load_judge(network: Network, name: str) -> Network:
    """Read a judge that `export_judge` wrote into a network of its class, to measure with."""
    state = load_file(JUDGES / f"{name}.safetensors")
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval().requires_grad_(False)
