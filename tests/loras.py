"""LoRAs for the small model of SDXL, as each trainer writes them, and the changes that they mean.

The names are spelled out here, independently of diffusers' conversion.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from panorama.base_model import BaseModel

ATTENTION = r"\.to_(q|k|v|out\.0)$"
UNET = ATTENTION + r"|ff\.net\.(0\.proj|2)$|proj_(in|out)$"
CONVOLUTIONS = UNET + r"|^conv_(in|out)$|\.conv[12]$|shortcut$|(down|up)samplers\.0\.conv$"
RESNETS = CONVOLUTIONS + r"|time_emb_proj$"
TEXT = r"(q|k|v|out)_proj$|fc[12]$|^text_projection$"


@dataclass
class Layer:
    """A layer's LoRA."""

    weight: Tensor  # of the base
    down: Tensor
    up: Tensor
    alpha: float | None = None  # as the file has it
    strength: float = 1.0  # by which it counts
    magnitude: Tensor | None = None  # of DoRA

    def changed(self, scale: float) -> Tensor:
        """Return the weight that the LoRA means, computed with plain loops over matrices."""
        rank = len(self.down)
        change = (self.up.reshape(-1, rank) @ self.down.reshape(rank, -1)).reshape(
            self.weight.shape
        )
        result = self.weight + scale * self.strength * change
        if self.magnitude is not None:
            shape = (-1,) + (1,) * (result.dim() - 1)
            norms = result.reshape(len(result), -1).pow(2).sum(1).sqrt()
            result = result * (self.magnitude.flatten() / norms).reshape(shape)
        return result


Layers = dict[tuple[str, str], Layer]
"""By network and layer."""


def networks(base: BaseModel) -> dict[str, Any]:
    return {"unet": base.unet, **base.text_networks}


def draw(
    base: BaseModel, unet: str, text: str | None = None, ranks: tuple[int, ...] = (2,)
) -> Layers:
    """Draw a LoRA for the layers whose names match patterns, with ranks in turn."""
    generator, layers = torch.Generator().manual_seed(7), Layers()
    for network, module in networks(base).items():
        pattern = unet if network == "unet" else text
        for name, layer in module.named_modules():
            if pattern and re.search(pattern, name) and isinstance(layer, nn.Linear | nn.Conv2d):
                rank, weight = ranks[len(layers) % len(ranks)], layer.weight.detach().clone()
                down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
                ones = (1,) * (weight.dim() - 2)
                up = 0.3 * torch.randn(len(weight), rank, *ones, generator=generator)
                layers[network, name] = Layer(weight, down, up)
    assert layers
    return layers


def with_alphas(layers: Layers, alphas: tuple[float, ...]) -> Layers:
    """Give layers alphas in turn."""
    for i, layer in enumerate(layers.values()):
        layer.alpha = alphas[i % len(alphas)]
        layer.strength = layer.alpha / len(layer.down)
    return layers


def with_magnitudes(layers: Layers) -> Layers:
    """Make a DoRA of a LoRA."""
    generator = torch.Generator().manual_seed(8)
    for layer in layers.values():
        shape = (len(layer.weight),) if layer.weight.dim() == 2 else (1, len(layer.weight), 1, 1)
        layer.magnitude = torch.rand(shape, generator=generator) + 0.5
    return layers


def text_name(network: str, name: str) -> str:
    """Return the name of a text encoder's layer at the time when the trainers were written."""
    flat = network == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if flat else name


Spell = Callable[[str, str], tuple[str, str, str]]
"""From network and layer to the keys of down, up and alpha."""


def cog_sdxl(network: str, name: str) -> tuple[str, str, str]:
    attention, _, layer = name.rpartition(".to_")
    key = f"{network}.{attention}.processor.to_{layer.removesuffix('.0')}_lora"
    return f"{key}.down.weight", f"{key}.up.weight", ""


def diffusers(network: str, name: str) -> tuple[str, str, str]:
    if network == "unet":
        key = f"unet.{name}.lora"
    elif name == "text_projection":
        key = f"{network}.text_projection.lora"
    else:
        key = f"{network}.{text_name(network, name)}.lora_linear_layer"
    return f"{key}.down.weight", f"{key}.up.weight", ""


def peft(network: str, name: str) -> tuple[str, str, str]:
    key = f"{network}.{name if network == 'unet' else text_name(network, name)}"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight", f"{key}.alpha"


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya(network: str, name: str) -> tuple[str, str, str]:
    name = name if network == "unet" else text_name(network, name)
    key = KOHYA[network] + name.replace(".", "_")
    return f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"


SGM = {
    r"^conv_in$": "input_blocks.0.0",
    r"^conv_out$": "out.2",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
    r"(?<=\.)conv1$": "in_layers.2",
    r"(?<=\.)conv2$": "out_layers.3",
    r"time_emb_proj$": "emb_layers.1",
    r"conv_shortcut$": "skip_connection",
}


def kohya_sgm(network: str, name: str, layers: int = 1) -> tuple[str, str, str]:
    """Stability's own names: blocks are counted through; the small model has 1 layer a block."""
    if network != "unet":
        return kohya(network, name)
    for pattern, replacement in SGM.items():
        name = re.sub(pattern, replacement, name)
    if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)", name):
        side, block, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
        index = (layers + 1) * block + (layers if "samplers" in kind else layer)
        prefix = f"input_blocks.{1 + index}" if side == "down" else f"output_blocks.{index}"
        name = f"{prefix}.{inner}{name[match.end() :]}"
        if kind == "downsamplers":
            name = name.removesuffix("conv") + "op"
    return kohya(network, name)


def save(
    layers: Layers, path: Path, spell: Spell, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a LoRA; alphas are written unless there is metadata to hold them."""
    tensors = {}
    for (network, name), layer in layers.items():
        down, up, alpha = spell(network, name)
        tensors |= {down: layer.down, up: layer.up}
        if layer.alpha is not None and metadata is None:
            tensors[alpha] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            tensors[down.replace("lora_A.weight", "lora_magnitude_vector")] = layer.magnitude
    text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, path, text)
    return path
