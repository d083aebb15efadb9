"""Puts what was trained into `weights/tiny/`, in diffusers format and half precision."""

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from panorama.perceptual import LPIPS
from panorama.syncdiffusion import SyncDiffusionPipeline
from weights.train.diffusion import TextToImage, build_scheduler

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


def export_judge(judge: nn.Module, name: str) -> None:
    """Writes a judge, so that a fresh clone can measure."""
    JUDGES.mkdir(exist_ok=True)
    state = {key: value.half().contiguous() for key, value in judge.state_dict().items()}
    save_file(state, JUDGES / f"{name}.safetensors")


def load_judge(network: Network, name: str) -> Network:
    """Reads a judge that `export_judge` wrote into a network of its class."""
    state = load_file(JUDGES / f"{name}.safetensors")
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval()
