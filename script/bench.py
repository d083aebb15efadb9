"""Speed of the sampler on the embedded family, as ratios within one run.

overhead: the share of `sample()` spent outside the UNet, the VAE, the perceptual network and
their gradients. speed-up: the plain per-window loop's time over `sample()`'s, same picture.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from panorama.decode import decode
from panorama.gradient import frozen
from panorama.models import Models, load
from panorama.sampler import sample
from panorama.syncdiffusion import SyncDiffusionPipeline
from panorama.synchronize import Synchronizer, SyncSchedule
from tests.plain_loop import plain_loop


@dataclass(frozen=True)
class Setting:
    """A canvas one window high."""

    width: int  # pixels
    stride: int
    sync_steps: int  # of all the steps, the first so many


SETTINGS = {
    "512 x 256, no sync": Setting(512, 16, 0),
    "512 x 256, sync": Setting(512, 16, 3),
    "1024 x 256, no sync": Setting(1024, 16, 0),
    "1024 x 256, sync": Setting(1024, 16, 3),
    "1024 x 256, stride 8, sync": Setting(1024, 8, 3),
}
STEPS = 8


class TimedNetworks:
    """The pipeline's networks, with the seconds spent in them."""

    def __init__(self, pipe: SyncDiffusionPipeline, prompt: str, guidance_scale: float) -> None:
        self.seconds = 0.0
        embeds = pipe.encode_prompt(prompt)
        self.predict_noise = self.timed(pipe._guided(*embeds, guidance_scale))
        self.decode = self.timed(lambda x: decode(pipe.vae, x))
        self.embed = self.timed(pipe.perceptual.embed)
        self.distance = self.timed(pipe.perceptual.distance)

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added to `seconds`."""

        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return run


@dataclass(frozen=True)
class Result:
    """Seconds of both loops on one setting, and how far apart they end."""

    ours: float
    networks: float  # of ours, spent in networks and their gradients
    plain: float
    difference: float  # largest, in standard deviations of the latents


def clocked(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    value = run()
    return time.perf_counter() - started, value


def compare(models: Models, setting: Setting, seed: int = 0) -> Result:
    """Runs `sample()` and the plain loop from the same noise."""
    pipe = models.pipelines["syncdiffusion"]
    guidance_scale = models.settings("syncdiffusion").guidance_scale
    networks = TimedNetworks(pipe, "sunset over snowy mountains", guidance_scale)
    side = pipe.window * pipe.vae_scale_factor
    views = pipe._views(side, setting.width, setting.stride, "")
    noise = pipe._latents(side, setting.width, torch.Generator().manual_seed(seed), None)
    schedule = SyncSchedule(20.0 if setting.sync_steps else 0.0, threshold=setting.sync_steps)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    synchronizer = Synchronizer(
        networks.predict_noise, networks.decode, networks, scheduler.alphas_cumprod
    )

    def fused() -> Tensor:
        return sample(
            noise,
            views,
            networks.predict_noise,
            copy.deepcopy(scheduler),
            synchronizer=synchronizer,
            schedule=schedule,
        )

    gradient = torch.autograd.grad
    torch.autograd.grad = networks.timed(gradient)
    try:
        with frozen(pipe.unet, pipe.vae, pipe.perceptual):
            ours, latents = clocked(fused)
            inside = networks.seconds
            plain, expected = clocked(
                lambda: plain_loop(noise, views, networks, scheduler, schedule)
            )
    finally:
        torch.autograd.grad = gradient
    difference = float((latents - expected).abs().max() / expected.std())
    return Result(ours, inside, plain, difference)


def main() -> None:
    """Prints a line for every setting, each from the best of a few alternating runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    models = load("tiny")
    print(f"{'setting':28} {'overhead':>8} {'speed-up':>8} {'difference':>10}")
    for name, setting in SETTINGS.items():
        results = [compare(models, setting) for _ in range(arguments.repeats)]
        overhead = min(1 - result.networks / result.ours for result in results)
        speed_up = min(r.plain for r in results) / min(r.ours for r in results)
        print(
            f"{name:28} {overhead:8.1%} {speed_up:8.2f} {results[0].difference:10.1e}", flush=True
        )


if __name__ == "__main__":
    main()
