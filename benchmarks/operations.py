"""Floating-point operations of a panorama on Stable Diffusion 2 base, counted and not estimated.

The calls of the published loop are tallied while it runs on a stand-in for the networks, those of
our sampler are counted beforehand. The cost of each call is counted by torch on the published
configurations, whose weights have a shape and no values.
"""

from collections import Counter
from dataclasses import replace
from functools import cache

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lab import published
from benchmarks.plain_loop import plain_loop
from panorama.sampling.canvas import Canvas
from panorama.sampling.operations import count_operations, count_work, guided
from panorama.sampling.perceptual import LPIPS
from panorama.sampling.presets import EXACT, Preset
from panorama.sampling.views import Fixed

PUBLISHED_LOOP = replace(EXACT, layout=Fixed, means=0)
WINDOW, STRIDE, FACTOR = 64, 16, 8

Call = tuple[str, int, bool]
"""A network, the side of the latents or the image that it gets, and True with a gradient."""


class Tally:
    """A stand-in for the networks that counts the windows that pass through each."""

    def __init__(self, decoder: str = "decoder") -> None:
        self.decoder = decoder
        self.calls: Counter[Call] = Counter()

    def note(self, network: str, x: Tensor) -> None:
        """Count a call with x (N, C, H, W)."""
        with_gradient = torch.is_grad_enabled() and x.requires_grad
        self.calls[network, x.shape[-1], with_gradient] += len(x)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise, with guidance."""
        self.note("guided UNet", x)
        return 0.1 * x

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents to images."""
        self.note(self.decoder, x)
        return F.interpolate(x[:, :3], scale_factor=FACTOR)

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the features of images."""
        self.note("VGG16", images)
        return [images.mean((2, 3))]

    def distance(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """Return the distances of images from embedded ones."""
        return (self.embed(images)[0] - features[0]).square().sum(1)


class Networks:
    """The published configurations without values, and the cost of a call of each."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(published("sd2/unet"))
            self.vae = AutoencoderKL.from_config(published("sd2/vae"))
            self.tiny_vae = AutoencoderTiny()  # its defaults are those of TAESD
            self.lpips = LPIPS()
        self.cost = cache(self._cost)

    def guided(self, x: Tensor) -> Tensor:
        """Run both halves of a guided UNet evaluation."""
        return guided(self.unet, x)

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents to images."""
        images: Tensor = self.vae.decode(x).sample
        return images

    def decode_tiny(self, x: Tensor) -> Tensor:
        """Decode latents to images by TAESD."""
        images: Tensor = self.tiny_vae.decode(x).sample
        return images

    def embed(self, images: Tensor) -> Tensor:
        """Return the sum of all features of images."""
        return torch.stack([f.sum() for f in self.lpips.embed(images)]).sum()

    def operations(self, calls: Counter[Call]) -> float:
        """Return the operations of calls, in units of 10^12."""
        return sum(number * self.cost(call) for call, number in calls.items()) / 1e12

    def _cost(self, call: Call) -> int:
        """Count the operations of one window's call, and of its gradient if it has one."""
        name, side, with_gradient = call
        network, channels, run = {
            "guided UNet": (self.unet, 4, self.guided),
            "decoder": (self.vae, 4, self.decode),
            "tiny decoder": (self.tiny_vae, 4, self.decode_tiny),
            "VGG16": (self.lpips, 3, self.embed),
        }[name]
        with torch.device("meta"):
            x = torch.empty(1, channels, side, side)
            return count_operations(network, run, x, gradient=with_gradient)


def calls_of(
    preset: Preset | None, sync_threshold: int = 5, *, tiny_decoder: bool = False
) -> Counter[Call]:
    """Count the calls for an image of 2048 x 512.

    Args:
        preset: of our sampler; None for the published loop.
        sync_threshold: see `Preset.sync`.
        tiny_decoder: see `SyncSettings.tiny_decoder`.
    """
    chosen = preset or PUBLISHED_LOOP
    canvas = Canvas(WINDOW, 4 * WINDOW)
    views = chosen.layout(STRIDE)(canvas, WINDOW, chosen.num_inference_steps)
    settings = chosen.sync(sync_threshold)
    decoder = "tiny decoder" if tiny_decoder else "decoder"
    if preset:
        work, image = count_work(views, settings), WINDOW * FACTOR
        return +Counter(
            {
                ("guided UNet", WINDOW, False): work.windows,
                ("guided UNet", WINDOW, True): work.gradients,
                (decoder, WINDOW, False): work.anchors,
                (decoder, WINDOW, True): work.gradients,
                ("VGG16", image, False): work.anchors,
                ("VGG16", image, True): work.gradients,
            }
        )
    scheduler = DDIMScheduler.from_config(published("sd2/scheduler"))
    scheduler.set_timesteps(chosen.num_inference_steps)
    tally = Tally(decoder)
    noise = torch.ones(1, 4, canvas.height, canvas.width)
    plain_loop(noise, views, tally, scheduler, settings)
    return tally.calls
