"""The networks that a report runs: of the published sizes on a GPU, tiny ones in a dry run."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.activations import weights_of
from panorama.base_model import BaseModel
from panorama.conditioning.prompts import TextEncoder
from panorama.modes import load_bases
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.operations import TOKENS
from panorama.sampling.perceptual import LPIPS, VGG16
from panorama.sampling.presets import Preset

Figures = Iterator[tuple[str, Any]]
"""What a row found: names and values, each as soon as it is known."""

PUBLISHED = Path(__file__).parents[2] / "tests" / "data"
"""Configurations of the published models."""

SMALL_UNET = {"norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 16}
SMALL_SDXL = SMALL_UNET | {
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": (2, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,  # 16 pooled channels and six sizes
}
SMALL_VAE = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "sd2/unet": SMALL_UNET
    | {"sample_size": 16, "block_out_channels": (8, 8, 16, 16), "attention_head_dim": (2,) * 4},
    "sd2/vae": SMALL_VAE,
    "sd2/text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "sdxl/unet": SMALL_SDXL | {"sample_size": 16},
    "sdxl/controlnet": SMALL_SDXL | {"conditioning_embedding_out_channels": (4, 8, 8, 8)},
    "sdxl/vae": SMALL_VAE,
}
"""What a dry run changes in the published configurations."""
SMALL_VGG = ((4,), (8,), (8,))

PATIENCE = 5.0
"""Seconds after which a call is not repeated once more."""


@dataclass(frozen=True)
class Cost:
    """What a call takes."""

    seconds: float  # median of its repeats
    gigabytes: float  # the peak of its networks and of all that it allocates, 0 on CPUs
    result: Any

    def of(self, part: int, whole: int) -> float:
        """Return the seconds of a whole number of steps, of which a part was taken."""
        return self.seconds * whole / part


@dataclass(frozen=True)
class Lab:
    """A device, and networks on it with random weights that need no gradient."""

    device: torch.device
    dry: bool  # tiny networks and few steps: everything runs, and no figure means anything
    dtype: torch.dtype = torch.float16

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"

    @cached_property
    def sd2(self) -> BaseModel:
        """Stable Diffusion 2 base in half precision, its LPIPS in single."""
        return self.build_sd2(self.dtype)

    @cached_property
    def sdxl(self) -> BaseModel:
        """SDXL base 1.0 and its ControlNet in half precision, without text encoders."""
        unet = self.build(UNet2DConditionModel.from_config, "sdxl/unet", self.dtype)
        controlnet = self.build(ControlNetModel.from_config, "sdxl/controlnet", self.dtype)
        # The family has a VAE that does not overflow in half precision.
        vae = self.build(AutoencoderKL.from_config, "sdxl/vae", self.dtype)
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        return BaseModel(unet, vae, (), scheduler, controlnet=controlnet)

    def build_sd2(self, dtype: torch.dtype) -> BaseModel:
        """Build Stable Diffusion 2 base with LPIPS."""
        unet = self.build(UNet2DConditionModel.from_config, "sd2/unet", dtype)
        vae = self.build(AutoencoderKL.from_config, "sd2/vae", dtype)
        text = self.build(build_text_encoder, "sd2/text_encoder", dtype)
        scheduler = DDIMScheduler.from_config(published("sd2/scheduler"))
        with self.device:
            perceptual = LPIPS(SMALL_VGG if self.dry else VGG16).eval().requires_grad_(False)
        return BaseModel(unet, vae, (TextEncoder(None, text),), scheduler, perceptual=perceptual)

    def build(self, kind: Callable[[dict[str, Any]], Any], name: str, dtype: torch.dtype) -> Any:
        """Build a published network on the device; it gets the same weights each time."""
        torch.manual_seed(0)
        with self.device:
            network = kind({**published(name), **(SMALL[name] if self.dry else {})})
        return network.to(dtype).eval().requires_grad_(False)

    def embedded(self, dtype: torch.dtype, device: str = "") -> BaseModel:
        """Load the networks of the tiny family."""
        base = load_bases("tiny", ["syncdiffusion"], dtype)["syncdiffusion"]
        base.to(device or self.device)
        return base

    def steps(self, count: int) -> int:
        """Return a number of steps, few in a dry run."""
        return min(count, 2) if self.dry else count

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Return the bytes of tensors on the device, 0 on CPUs."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def measure(self, base: BaseModel, call: Callable[[], Any], repeats: int = 3) -> Cost:
        """Measure a call that runs the networks of a base model."""
        times: list[float] = []
        before = self.allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        while len(times) < (1 if self.dry else repeats) and sum(times) < PATIENCE:
            self.synchronize()
            started = perf_counter()
            result = call()
            self.synchronize()
            times.append(perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if self.cuda else before
        used = peak - before + sum(weight.nbytes for weight in weights_of(base))
        return Cost(median(times), used / 1e9 if self.cuda else 0.0, result)

    def compare(self, base: BaseModel, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Cost]:
        """Measure calls in turns, after one of each, since the speed of a machine varies.

        Returns:
            The median cost of each call.
        """
        for call in calls.values():
            call()
        rounds = [
            {name: self.measure(base, call, repeats=1) for name, call in calls.items()}
            for _ in range(1 if self.dry else 3)
        ]
        ordered = {
            name: sorted((costs[name] for costs in rounds), key=lambda cost: cost.seconds)
            for name in calls
        }
        return {name: costs[len(rounds) // 2] for name, costs in ordered.items()}


@dataclass(frozen=True)
class Run:
    """An image of a base model with random embeddings of its prompts."""

    pipeline: Pipeline
    settings: Settings

    @cached_property
    def conditioning(self) -> Conditioning:
        """Random embeddings of a negative prompt and a prompt."""
        unet = self.pipeline.base.unet
        torch.manual_seed(0)
        normal = partial(torch.randn, device=unet.device, dtype=unet.dtype)
        pooled = None
        if unet.config.addition_embed_type:
            sizes = 6 * unet.config.addition_time_embed_dim
            channels = unet.config.projection_class_embeddings_input_dim - sizes
            pooled = normal(2, 1, channels)
        states = normal(2, 1, TOKENS, unet.config.cross_attention_dim)
        return Conditioning(states, pooled, self.settings.guidance_scale)

    @cached_property
    def noise(self) -> Tensor:
        """The noise that the image starts from."""
        return self.pipeline.noise(self.settings, torch.Generator().manual_seed(0))

    def denoise(self) -> Tensor:
        """Return the latents."""
        return self.pipeline.denoise(self.settings, self.conditioning, self.noise)

    def image(self) -> Tensor:
        """Return the image."""
        return self.pipeline.decode(self.settings, self.denoise())


def strip(
    lab: Lab,
    base: BaseModel,
    preset: Preset,
    *,
    steps: int | None = None,
    threshold: int | None = None,
    weight: float = 20.0,
    **options: Any,
) -> Run:
    """Return a run of a strip, 2048 x 512 for Stable Diffusion 2.

    Args:
        lab: where.
        base: the networks.
        preset: windows, scheduler, and the kind of synchronising.
        steps: None for the preset's.
        threshold: see `Preset.sync`; None for the preset's.
        weight: of synchronising, 0 for none.
        options: of the pipeline.
    """
    side = base.window * base.factor
    settings = Settings(
        prompt="",
        height=side,
        width=(2 if lab.dry else 4) * side,
        num_inference_steps=lab.steps(steps or preset.num_inference_steps),
        scheduler=preset.scheduler,
        layout=preset.layout(base.window // 4),
        sync=preset.sync(preset.sync_threshold if threshold is None else threshold, weight=weight),
    )
    return Run(Pipeline(base, **options), settings)


def published(name: str) -> dict[str, Any]:
    """Return the configuration of a published network."""
    config: dict[str, Any] = json.loads((PUBLISHED / f"{name}.json").read_text())
    return config


def build_text_encoder(config: dict[str, Any]) -> CLIPTextModel:
    """Build a text encoder."""
    return CLIPTextModel(CLIPTextConfig(**config))
