"""The networks of a base model, such as Stable Diffusion 2 or SDXL, in one shape."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from panorama.conditioning.lora import LEGAL, Lora, LoraError, load_tokens, read_lora
from panorama.conditioning.prompts import TextEncoder
from panorama.images.vae import factor_of
from panorama.sampling.operations import Prices, count_prices
from panorama.sampling.perceptual import LPIPS

MODELS: Mapping[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "tiny_vae": AutoencoderTiny,
    "controlnet": ControlNetModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "perceptual": LPIPS,
}
"""The class that reads each network from its folder."""


@dataclass(frozen=True)
class BaseModel:
    """Hold the networks that a pipeline runs on, and the scheduler that fits them."""

    unet: Any  # UNet2DConditionModel that predicts noise; its `sample_size` is a window's side
    vae: Any  # AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]  # one for SD 2, two for SDXL
    scheduler: Any  # with the noise schedule that the UNet was trained on
    tiny_vae: Any = None  # AutoencoderTiny, which decodes the VAE's latents at far less cost
    controlnet: Any = None  # ControlNetModel for depth
    perceptual: Any = None  # LPIPS; for `Pipeline`, any module with its `embed` and `distance`
    lora: Lora | None = None  # its own, see `lora_applied`
    tokens: tuple[str, ...] = ()  # its trigger tokens, if it has any

    @property
    def embed_type(self) -> str | None:
        """The UNet's additional conditioning: "text_time" for SDXL, None for SD 2."""
        kind: str | None = self.unet.config.addition_embed_type
        return kind

    @property
    def factor(self) -> int:
        """Pixels per latent cell."""
        return factor_of(self.vae)

    @property
    def window(self) -> int:
        """Side of a window, latent cells."""
        return int(self.unet.config.sample_size)

    @property
    def divisor(self) -> int:
        """Divisor of a view's sides in latent cells, so that every level has whole cells."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @cached_property
    def prices(self) -> Prices:
        """The cost of its networks, counted on first use."""
        return count_prices(self.unet, self.vae, self.perceptual)

    @property
    def text_networks(self) -> Mapping[str, Any]:
        """The networks of the text encoders, by the names that a LoRA has for them."""
        models = [encoder.model for encoder in self.text_encoders]
        return dict(zip(("text_encoder", "text_encoder_2"), models, strict=False))

    @property
    def lora_networks(self) -> Mapping[str, Any]:
        """The networks that a LoRA may change, by the names that it has for them."""
        return {"unet": self.unet, **self.text_networks}

    def to(self, device: torch.device | str) -> None:
        """Move every network to a device."""
        for network in self.networks():
            network.to(device)

    def networks(self) -> list[Any]:
        """Return the networks that there are."""
        found = [self.unet, self.vae, self.tiny_vae, self.controlnet, self.perceptual]
        found += [encoder.model for encoder in self.text_encoders]
        return [network for network in found if network is not None]


def load_base_model(components: Mapping[str, Path], dtype: torch.dtype) -> BaseModel:
    """Read a base model from local files.

    Args:
        components: folders of `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler` and, where
            the model has them, `text_encoder_2`, `tokenizer_2`, `tiny_vae`, `controlnet`,
            `perceptual`; the file `lora.safetensors` of a LoRA and `embeddings.safetensors` of its
            tokens; `vgg16.pth` in place of `perceptual`.
        dtype: of the weights. LPIPS stays in float32, and so does a VAE of SDXL that overflows in
            half precision (`force_upcast`).
    """
    models = {
        name: load_model(kind, components[name], dtype)
        for name, kind in MODELS.items()
        if name in components
    }
    encoders = tuple(
        TextEncoder(
            CLIPTokenizer.from_pretrained(components[f"tokenizer{suffix}"], local_files_only=True),
            models.pop(f"text_encoder{suffix}"),
        )
        for suffix in ("", "_2")
        if f"text_encoder{suffix}" in components
    )
    scheduler = load_scheduler(components["scheduler"])
    if vgg16 := components.get("vgg16.pth"):
        models["perceptual"] = LPIPS.from_vgg16(vgg16)
    base = BaseModel(**models, text_encoders=encoders, scheduler=scheduler)
    # SD 2's VAE does not overflow, though its configuration leaves force_upcast at its default.
    if base.embed_type == "text_time" and base.vae.config.force_upcast and dtype != torch.float32:
        base = replace(base, vae=load_model(AutoencoderKL, components["vae"], torch.float32))
    if lora := components.get("lora.safetensors"):
        base = replace(base, lora=own_lora(base, lora))
    if embeddings := components.get("embeddings.safetensors"):
        base = replace(base, tokens=load_tokens(base.text_encoders, embeddings))
    return base


def own_lora(base: BaseModel, path: Path) -> Lora:
    """Read the LoRA that belongs to a base model; ValueError if it does not fit."""
    try:
        return read_lora(path, base.lora_networks)
    except LoraError as error:
        raise ValueError(f"{path.name}: must be {LEGAL}, not {error}") from error


def weight_not_finite(network: Any) -> str:
    """Return the name of the first weight that holds NaN or infinity, "" for none."""
    weights = {n: w for n, w in network.state_dict().items() if w.is_floating_point() and w.numel()}
    # Twenty times as fast as isfinite. All are read from the device at once.
    extremes = torch.stack([torch.stack(w.aminmax()).float() for w in weights.values()])  # (N, 2)
    finite = dict(zip(weights, extremes.isfinite().all(1).tolist(), strict=True))
    return next((name for name in finite if not finite[name]), "")


def load_model(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Read a network from its folder, from half-precision files if there are any."""
    half = any(folder.glob("*.fp16.safetensors"))
    options = {"local_files_only": True, "use_safetensors": True}
    return kind.from_pretrained(folder, dtype=dtype, variant="fp16" if half else None, **options)


def load_scheduler(folder: Path) -> Any:
    """Read a scheduler of any class of diffusers."""
    config = diffusers.DDIMScheduler.load_config(folder, local_files_only=True)
    return getattr(diffusers, config["_class_name"]).from_config(config)
