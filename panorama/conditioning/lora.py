"""LoRAs for SDXL in the formats that people have, and their trigger tokens."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from panorama.conditioning.prompts import TextEncoder
from panorama.errors import shorten

LEGAL = "a LoRA for SDXL of kohya, diffusers, PEFT or cog-sdxl, as .safetensors"

OTHER_FILES: Mapping[bytes, str] = {
    rb"version https://git-lfs": "a Git LFS pointer, which stands for a file that was not fetched",
    rb"\s*<": "a web page, such as a login form",
    rb"\s*\{": "JSON, such as an error message",
    rb"PK|\x80": "a pickle",
    rb"$": "an empty file",
}
"""Names of files other than safetensors, by a pattern of their first bytes."""

OTHER_KEYS: Mapping[str, str] = {
    r"hada_": "a LoHa",
    r"lokr_": "a LoKr",
    r"oft_|boft_": "an OFT",
    r"lora_mid": "a LoCon in Tucker form",
    r"dora_scale": "a DoRA in the format of kohya (PEFT's works)",
    r"diff(_b)?$": "a file of whole weights",
    r"lora_controlnet": "a Control-LoRA",
    r"base_model\.model\.": "a PEFT adapter whose strength stands in another file (save it with "
    "diffusers' save_lora_weights)",
    r"double_blocks|single_transformer|lora_transformer|^(transformer|diffusion_model)\.": "a LoRA "
    "for another base model, such as FLUX",
    r"first_stage_model|conditioner|^model\.": "a whole checkpoint",
}
"""Names of files without a LoRA for SDXL, by a pattern of any of their keys."""

BASES: Mapping[int, str] = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Base models by the channels of the text that their UNets attend to."""

KEY = re.compile(
    r"(?P<layer>.+?)\.((?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?|"
    r"(lora_A\.weight\.)?(?P<alpha>alpha))"
)
"""A key as PEFT spells it, or that of an alpha."""


class LoraError(ValueError):
    """A file holds no LoRA that fits; the message is a noun phrase that says what it is instead."""


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one layer's weight (out, in) or (out, in, kh, kw)."""

    down: Tensor  # (r, in) or (r, in, kh, kw)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    strength: float  # alpha / r
    magnitude: Tensor | None = None  # of a DoRA: `out` norms, of the changed weight's rows

    def fits(self, weight: Tensor) -> bool:
        """Return True if the change has the shape of a weight."""
        rows, columns = weight.flatten(1).shape
        rank = len(self.down)
        factors = self.up.flatten(1).shape, self.down.flatten(1).shape
        fits_magnitude = self.magnitude is None or self.magnitude.numel() == rows
        return factors == ((rows, rank), (rank, columns)) and fits_magnitude

    @torch.no_grad()
    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        """Return a weight, changed at a scale; the sum is computed in float32."""
        parts = (self.up, self.down)
        up, down = (part.to(weight.device, torch.float32).flatten(1) for part in parts)
        changed = weight.float() + (scale * self.strength) * (up @ down).view_as(weight)
        if self.magnitude is not None:  # arXiv 2402.09353, equation 5
            rows = changed.flatten(1)
            norms = self.magnitude.to(rows).flatten() / rows.norm(dim=1)
            changed = (rows * norms[:, None]).view_as(weight)
        return changed.to(weight.dtype)


Changes = Mapping[str, Mapping[str, Change]]
"""By network, such as "unet", and by the name of its layer."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that was read and fits its networks."""

    changes: Changes
    sha256: str  # of its file


def read_lora(path: Path, networks: Mapping[str, Any]) -> Lora:
    """Read a LoRA.

    diffusers converts the keys. The strength of each layer is alpha / rank. Alphas stand beside the
    weights or in the file's metadata; without any, the strength is 1.

    Args:
        path: safetensors of kohya (with LoCon's convolutions), diffusers, PEFT (with DoRA) or
            cog-sdxl.
        networks: `unet`, and `text_encoder` and `text_encoder_2` if there are any.

    Raises:
        LoraError: the file is something else, or a weight has no place in the networks.
    """
    weights, metadata = read_file(path)
    changes = {
        name: build_changes(tensors, metadata_of(metadata, name))
        for name, tensors in convert(weights, networks).items()
    }
    check_fit(changes, networks)
    with path.open("rb") as file:
        return Lora(changes, hashlib.file_digest(file, "sha256").hexdigest())


def read_metadata(path: Path) -> Mapping[str, str]:
    """Read the metadata of safetensors; LoraError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        with path.open("rb") as binary:
            head = binary.read(64)
        kinds = (kind for pattern, kind in OTHER_FILES.items() if re.match(pattern, head))
        raise LoraError(next(kinds, "a file that is cut off or damaged")) from error


def read_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read a LoRA's tensors, and what diffusers wrote on their strength; refuse any other file."""
    metadata, weights = read_metadata(path), load_file(path)
    for pattern, kind in OTHER_KEYS.items():
        if any(re.search(pattern, key) for key in weights):
            raise LoraError(kind)
    if not any("lora" in key for key in weights):
        raise LoraError(f"a file of {len(weights)} tensors without a LoRA among them")
    if spoilt := next(
        (key for key, each in weights.items() if not each.float().isfinite().all()), None
    ):
        raise LoraError(f"a LoRA whose tensor {shorten(spoilt)} holds NaN or infinity")
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise LoraError("a LoRA whose metadata is damaged") from error
    return weights, config if isinstance(config, dict) else {}


def metadata_of(metadata: Mapping[str, Any], network: str) -> Mapping[str, Any]:
    """Return the configuration of one network, such as `lora_alpha`."""
    prefix = f"{network}."
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return {key: value for key, value in found.items() if value is not None}


def convert(
    weights: dict[str, Tensor], networks: Mapping[str, Any]
) -> Mapping[str, dict[str, Tensor]]:
    """Return all tensors, alphas included, by network and by their names in PEFT's format."""
    try:
        converted, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            dict(weights), unet_config=networks["unet"].config
        )
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise LoraError(f"a LoRA with keys of an unknown kind, {shorten(str(error))}") from error
    tensors = converted | {key: torch.tensor(alpha) for key, alpha in (alphas or {}).items()}
    if len(tensors) != len(weights):  # diffusers leaves out those of Stability among others
        raise LoraError("a LoRA with keys of two kinds, or with a tensor twice")
    if not any(key.startswith(("unet.", "text_encoder")) for key in tensors):
        tensors = {f"unet.{key}": tensor for key, tensor in tensors.items()}
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        network, _, rest = key.partition(".")
        groups[network][rest] = tensor
    if unknown := set(groups) - set(networks):
        names = ", ".join(sorted(unknown))
        raise LoraError(f"a LoRA with weights for {shorten(names)}, which this model does not have")
    return {name: rename(networks[name], group) for name, group in groups.items()}


def rename(network: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of one network from any format of diffusers to PEFT's."""
    if not isinstance(network, UNet2DConditionModel):
        tensors = convert_state_dict_to_peft(tensors, StateDictType.DIFFUSERS_OLD)
    tensors = convert_unet_state_dict_to_peft(tensors)  # knows the text encoder's projection too
    if isinstance(network, UNet2DConditionModel) or hasattr(network, "text_model"):
        return tensors
    return {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}


def build_changes(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Change]:
    """Build the change of every layer.

    Args:
        tensors: by keys of PEFT.
        config: fields of PEFT's LoraConfig that decide the strength where there are no alphas.
    """
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise LoraError(f"a LoRA with a tensor of an unknown kind, {shorten(key)}")
        layers[match["layer"]][match["part"] or match["alpha"]] = tensor
    changes = {}
    for name, parts in layers.items():
        if not parts.keys() >= {"lora_A", "lora_B"}:
            raise LoraError(f"a LoRA that lacks a half of {shorten(name)}")
        sizes = (parts["lora_A"].numel(), parts["lora_B"].numel())
        if not all(sizes) or min(parts["lora_A"].dim(), parts["lora_B"].dim()) < 2:
            raise LoraError(f"a LoRA with halves of {shorten(name)} that are no matrices")
        rank = parts["lora_A"].shape[0]
        alpha = parts["alpha"].max().item() if "alpha" in parts else configured_alpha(config, name)
        strength = (alpha or rank) / (sqrt(rank) if config.get("use_rslora") else rank)
        magnitude = parts.get("lora_magnitude_vector")
        changes[name] = Change(parts["lora_A"], parts["lora_B"], strength, magnitude)
    return changes


def configured_alpha(config: Mapping[str, Any], layer: str) -> float | None:
    """Return the alpha of a layer in a configuration of PEFT, or None.

    A pattern must be the end of a layer's name. PEFT accepts regular expressions, but one from a
    stranger's file could take forever to match.
    """
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern", {})
    if not isinstance(patterns, Mapping):
        raise LoraError("a LoRA whose metadata is damaged")
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removeprefix("text_model.")
        if not re.fullmatch(r"[\w.]+", name):
            raise LoraError(f"a LoRA whose alphas are by a pattern, {shorten(pattern)}")
        if f".{layer}".endswith(f".{name}"):
            alpha = value
    return None if alpha is None else finite(alpha)


def finite(alpha: Any) -> float:
    """Return an alpha of a file's metadata as a number."""
    with suppress(TypeError, ValueError, OverflowError):
        if isfinite(number := float(alpha)):
            return number
    raise LoraError(f"a LoRA whose alpha, {shorten(alpha)}, is not a finite number")


def check_fit(changes: Changes, networks: Mapping[str, Any]) -> None:
    """Raise LoraError unless every change has a layer of its shape."""
    layers = {name: dict(network.named_modules()) for name, network in networks.items()}
    every = [(layers[n].get(k), k, c) for n, group in changes.items() for k, c in group.items()]
    wrong = [
        (key, change)
        for layer, key, change in every
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not change.fits(layer.weight)
    ]
    if not wrong:
        return
    widths = [c.down[0].numel() for _, key, c in every if key.endswith("attn2.to_k")]
    base = BASES.get(widths[0], "another base model") if widths else "another base model"
    raise LoraError(
        f"a LoRA for {base}: {len(wrong)} of its {len(every)} layers have no place in this model, "
        f"such as {shorten(wrong[0][0])}"
    )


def load_tokens(encoders: Sequence[TextEncoder], path: Path) -> tuple[str, ...]:
    """Teach text encoders the trigger tokens of pivotal tuning.

    Args:
        encoders: both of SDXL's.
        path: safetensors with the embeddings of N tokens, (N, D) and (N, D'), under the names of
            cog-sdxl, `text_encoders_0` and `text_encoders_1`, or `clip_l` and `clip_g`.

    Returns:
        The tokens, `<s0>` to `<sN-1>`; texts may spell them in capitals.

    Raises:
        ValueError: a key is missing, or an embedding does not fit its encoder.
    """
    embeddings = load_file(path)
    names = (
        ("clip_l", "clip_g") if "clip_l" in embeddings else ("text_encoders_0", "text_encoders_1")
    )
    rows = max((len(embedding) for embedding in embeddings.values()), default=1)
    tokens = tuple(f"<s{i}>" for i in range(rows))
    for key, encoder in zip(names, encoders, strict=True):
        shape = (rows, encoder.model.config.hidden_size)
        if key not in embeddings or embeddings[key].shape != shape:
            found = tuple(embeddings[key].shape) if key in embeddings else None
            raise ValueError(f"{path.name}: {key} has shape {found}; must be {shape}")
    for key, encoder in zip(names, encoders, strict=True):
        encoder.tokenizer.add_tokens(list(tokens))
        encoder.model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
        ids = encoder.tokenizer.convert_tokens_to_ids(list(tokens))
        table = encoder.model.get_input_embeddings().weight
        with torch.no_grad():
            table[ids] = embeddings[key].to(table)
    return tokens


@contextmanager
def lora_applied(networks: Mapping[str, Any], lora: Lora | None, scale: float) -> Iterator[None]:
    """Add `scale` times a LoRA to the weights of networks while the block runs.

    The weights are replaced, and the original ones are put back, so nothing of the LoRA remains.
    Every way to run a layer sees the change, wrapping convolutions included.

    Args:
        networks: by the names of `read_lora`; a network that is left out is not changed.
        lora: None for none.
        scale: 0 for none.
    """
    changes = lora.changes if lora and scale else {}
    with ExitStack() as stack:
        for name, network in networks.items():
            for layer, change in changes.get(name, {}).items():
                module = network.get_submodule(layer)
                stack.callback(setattr, module, "weight", module.weight)
                changed = change(module.weight, scale)
                module.weight = nn.Parameter(changed, requires_grad=False)
        yield
