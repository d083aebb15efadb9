"""Floating-point operations of a panorama on Stable Diffusion 2 base, counted and not estimated.

What a loop calls is tallied while it runs on a stand-in for the networks; what each call costs is
counted by torch on the published configurations, whose weights have a shape and no values.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from panorama.gradient import frozen
from panorama.models import SCHEDULERS
from panorama.perceptual import LPIPS
from panorama.request import SPEEDS, Speed
from panorama.sampler import sample
from panorama.synchronize import DirectSynchronizer, Synchronizer, SyncSchedule
from panorama.views import View, disjoint_views, step_views
from tests.plain_loop import plain_loop

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "sd2"
WINDOW, STRIDE, FACTOR = 64, 16, 8
TOKENS = 77

Call = tuple[str, int, bool]
"""The network, the side of the latents or the image that it sees, and whether with a gradient."""


def published(name: str) -> dict[str, Any]:
    """The configuration of one of Stable Diffusion 2 base's models."""
    config: dict[str, Any] = json.loads((PUBLISHED / f"{name}.json").read_text())
    return config


class Tally:
    """Stands in for the networks, and counts the windows that go through each."""

    def __init__(self) -> None:
        self.calls: Counter[Call] = Counter()

    def note(self, network: str, x: Tensor) -> None:
        """Counts a call with x (N, C, H, W)."""
        with_gradient = torch.is_grad_enabled() and x.requires_grad
        self.calls[network, x.shape[-1], with_gradient] += len(x)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided noise prediction."""
        self.note("guided UNet", x)
        return 0.1 * x

    def decode(self, x: Tensor) -> Tensor:
        """Latents to images."""
        self.note("decoder", x)
        return F.interpolate(x[:, :3], scale_factor=FACTOR)

    def embed(self, images: Tensor) -> list[Tensor]:
        """The features of images."""
        self.note("VGG16", images)
        return [images.mean((2, 3))]

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """The distances of images to embedded ones."""
        return (self.embed(images)[0] - features[0]).square().sum(1)


class Networks:
    """The published configurations without values, and what a call of each costs."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(published("unet"))
            self.vae = AutoencoderKL.from_config(published("vae"))
            self.lpips = LPIPS()
        self.cost = cache(self._cost)

    def guided(self, x: Tensor) -> Tensor:
        """Both halves of a guided UNet evaluation."""
        states = torch.empty(2 * len(x), TOKENS, self.unet.config.cross_attention_dim)
        t = torch.tensor(0)
        noise: Tensor = self.unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=states).sample
        return noise

    def decode(self, x: Tensor) -> Tensor:
        """Latents to images."""
        images: Tensor = self.vae.decode(x).sample
        return images

    def embed(self, images: Tensor) -> Tensor:
        """All features of images, as one number."""
        return torch.stack([f.sum() for f in self.lpips.embed(images)]).sum()

    def operations(self, calls: Counter[Call]) -> float:
        """Operations of all of some calls, in units of 10^12."""
        return sum(number * self.cost(call) for call, number in calls.items()) / 1e12

    def _cost(self, call: Call) -> int:
        """Operations of one window's call, and of its gradient with respect to what it sees."""
        name, side, with_gradient = call
        network, channels, run = {
            "guided UNet": (self.unet, 4, self.guided),
            "decoder": (self.vae, 4, self.decode),
            "VGG16": (self.lpips, 3, self.embed),
        }[name]
        with torch.device("meta"):
            return count(network, run, torch.empty(1, channels, side, side), with_gradient)


def count(network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, gradient: bool) -> int:
    """Operations of a call; two for a multiplication and the addition that goes with it."""
    with (
        FlopCounterMode(display=False) as counter,
        frozen(network),
        torch.set_grad_enabled(gradient),
    ):
        if gradient:
            run(x.requires_grad_()).sum().backward()
        else:
            run(x)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Setting:
    """A flat canvas one window high; what is not said is as published."""

    width: int = 2048  # pixels
    sync_threshold: int = 5


def views_of(setting: Setting, speed: Speed) -> tuple[tuple[View, ...], ...]:
    """The windows of each step."""
    cells = setting.width // FACTOR
    if speed.disjoint:
        return disjoint_views(WINDOW, cells, WINDOW, speed.num_inference_steps)
    return step_views(WINDOW, cells, WINDOW, STRIDE)


def calls_of(setting: Setting, speed: Speed | None) -> Counter[Call]:
    """What a loop calls: ours at a speed, or without one the published loop."""
    chosen = speed or SPEEDS["exact"]
    scheduler = SCHEDULERS[chosen.scheduler or "ddim"].from_config(published("scheduler"))
    scheduler.set_timesteps(chosen.num_inference_steps)
    tally, views = Tally(), views_of(setting, chosen)
    noise = torch.zeros(1, 4, WINDOW, setting.width // FACTOR)
    schedule = SyncSchedule(threshold=setting.sync_threshold)
    if speed is None:
        plain_loop(noise, views, tally, scheduler, schedule)
        return tally.calls
    kind = DirectSynchronizer if speed.sync_on_x0 else Synchronizer
    parts = (tally.predict_noise, tally.decode, tally, scheduler.alphas_cumprod)
    sample(
        noise,
        views,
        tally.predict_noise,
        scheduler,
        synchronizer=kind(*parts, speed.sync_pooling),
        schedule=schedule,
    )
    return tally.calls


def operations(setting: Setting, speed: Speed | None, networks: Networks) -> float:
    """Operations of all of a loop's calls, in units of 10^12."""
    return networks.operations(calls_of(setting, speed))
