"""One sync step of an anchor and another window at Stable Diffusion 2 base's true size."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.activations import Activations, weights_of
from benchmarks.operations import FACTOR, published
from benchmarks.plain_loop import StableDiffusion, plain_loop
from panorama.base_model import BaseModel
from panorama.pipeline import Pipeline, Settings
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.gradient import frozen
from panorama.sampling.operations import TOKENS
from panorama.sampling.perceptual import LPIPS
from panorama.sampling.presets import EXACT, FAST, Preset
from panorama.sampling.views import Fixed


class TrueSize:
    """Networks of the published sizes with random weights, and ways to take the step.

    Attributes:
        base: the networks; their weights need no gradient, as published.
        conditioning: random embeddings of prompts.
        noise: of a canvas two windows wide.
    """

    def __init__(self, dtype: torch.dtype, fake: bool = False) -> None:
        """Build the networks, of torch's fake tensors if asked to."""
        scheduler = DDIMScheduler.from_config(published("scheduler"))  # its values are read
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            unet, vae = build_networks(dtype)
            states = torch.randn(2, 1, TOKENS, unet.config.cross_attention_dim).to(dtype)
            self.base = BaseModel(unet, vae, (), scheduler, perceptual=LPIPS().eval())
            self.noise = torch.randn(1, 4, self.base.window, 2 * self.base.window)
        for network in self.base.networks():
            network.requires_grad_(False)
        self.conditioning = Conditioning(states, None, guidance_scale=7.5)

    def ways(self) -> Mapping[str, Callable[[], object]]:
        """Return the ways to take the step."""
        return {
            "published loop": self.published_loop,
            "exact": lambda: self.ours(EXACT),
            "exact, checkpointing": lambda: self.ours(EXACT, checkpointing=True),
            "fast": lambda: self.ours(FAST),
        }

    def published_loop(self) -> Tensor:
        """Take the step by the published loop."""
        settings, networks = self.settings(EXACT), StableDiffusion(self.base, self.conditioning)
        views = settings.layout(Pipeline(self.base).canvas(settings), self.base.window, 1)
        self.base.scheduler.set_timesteps(1)
        assert settings.sync
        published = replace(settings.sync, threshold=1, means=0)
        return plain_loop(self.noise, views, networks, self.base.scheduler, published)

    def ours(self, preset: Preset, checkpointing: bool = False) -> Tensor:
        """Take the step by the pipeline."""
        pipeline = Pipeline(self.base, checkpointing=checkpointing)
        return pipeline.denoise(self.settings(preset), self.conditioning, self.noise)

    def settings(self, preset: Preset) -> Settings:
        """Return the settings of the step: two windows side by side, the gradient of a preset."""
        height, width = (FACTOR * side for side in self.noise.shape[-2:])
        return Settings(
            prompt="",
            height=height,
            width=width,
            num_inference_steps=1,
            layout=Fixed(self.base.window),
            sync=preset.sync(1),
        )


def build_networks(dtype: torch.dtype) -> tuple[Any, Any]:
    """Build UNet and VAE without a copy in single precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet = UNet2DConditionModel.from_config(published("unet")).eval()
        return unet, AutoencoderKL.from_config(published("vae")).eval()
    finally:
        torch.set_default_dtype(default)


def activations(dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return the most bytes of tensors alive at once beside the weights, by the way of the step.

    The step runs on torch's fake tensors, which have a size and a device and no values. With true
    ones on a CPU the published loop was within 1 % of this.
    """
    networks = TrueSize(dtype, fake=True)
    most = {}
    # There are no values to check.
    with patch.object(Tensor, "isfinite", lambda x: torch.ones(1)):
        for name, run in networks.ways().items():
            with Activations(weights_of(networks.base)) as found:
                run()
            most[name] = found.most
    return most


def kept_by_unet(dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return the bytes that the UNet keeps for the gradient of one window.

    Returns:
        By the way it is run: with weights that need no gradient, as published, then inside of
        `frozen`, without and with checkpointing.
    """
    networks = TrueSize(dtype, fake=True)
    base = networks.base
    predict = StableDiffusion(base, networks.conditioning).predict_noise
    ways = {
        "published": nullcontext(),
        "frozen": frozen(base.unet),
        "checkpointing": frozen(base.unet, checkpointing=True),
    }
    kept = {}
    for name, context in ways.items():
        x = networks.noise[..., : base.window].clone().requires_grad_()
        with context, Activations(weights_of(base)) as found:
            noise_pred = predict(x, torch.tensor(1))
        kept[name] = found.bytes
        del noise_pred
    return kept
