"""A job: what a mode makes of a request, stage by stage."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from panorama.__version__ import __version__
from panorama.conditioning import depth as depth_images
from panorama.conditioning.lora import Lora
from panorama.images.source import SourceImage
from panorama.images.vae import resize
from panorama.pipeline import Pipeline, Settings
from panorama.request import ResolvedRequest
from panorama.sampling.denoiser import Conditioning
from panorama.sampling.presets import WHOLE, WINDOWED, Preset
from panorama.sampling.sampler import OnStep
from panorama.sampling.views import Feathered

Progress = Callable[[int, int, Callable[[], Image.Image]], None]
"""Called after every step with its number, from 1, the number of steps, and a function that returns
a preview: the image as the step predicts it."""


@dataclass(frozen=True)
class Mode:
    """A way to make a panorama."""

    base: str  # the base model, a folder of the family
    presets: Mapping[str, Preset]  # by the value of the input `speed`; one without that input
    speed: str  # the default among them
    synchronised: bool  # windows are kept coherent, which needs a perceptual network


MODES: Mapping[str, Mode] = {
    "syncdiffusion": Mode("sd2", WINDOWED, "exact", synchronised=True),
    "syncdiffusion-xl": Mode("sdxl", WINDOWED, "fast", synchronised=True),
    "sdxl-360": Mode("sdxl", {"exact": WHOLE}, "exact", synchronised=False),
}


@dataclass(frozen=True)
class Job:
    """A request with nothing left open, and the files that it names, already read."""

    request: ResolvedRequest
    depth: depth_images.DepthImage | None = None
    lora: Lora | None = None  # in place of the family's own
    image: SourceImage | None = None  # to start from
    cost: float = 0  # see `estimate`

    def settings(self, factor: int = 1) -> Settings:
        """Return the settings of the panorama, or of it enlarged by a factor."""
        request, mode = self.request, MODES[self.request.mode]
        preset = mode.presets[request.speed or mode.speed]
        sync = preset.sync(
            request.sync_threshold or 0,
            weight=request.sync_weight,
            decay_rate=request.sync_decay_rate,
            freq=request.sync_freq,
        )
        return Settings(
            prompt=request.parts,
            height=factor * request.height,
            width=factor * request.width,
            closed=request.closed_axis,
            negative_prompt=request.negative_prompt,
            guidance_scale=request.guidance_scale,
            num_inference_steps=request.num_inference_steps,
            strength=1.0 if request.strength is None else request.strength,
            scheduler=request.scheduler,
            layout=preset.layout(request.stride) if factor == 1 else Feathered(),
            sync=sync if mode.synchronised and factor == 1 else None,
            depth=self._depth(factor),
            controlnet_conditioning_scale=request.controlnet_conditioning_scale,
            lora=self.lora,
            lora_scale=request.lora_scale,
        )

    def poles(self) -> Mapping[bool, str]:
        """Return what the zenith (True) and the nadir (False) show; {} to leave them."""
        return dict(zip((True, False), self.request.poles, strict=False))

    def metadata(self, family: str, device: torch.device) -> dict[str, Any]:
        """Return the metadata to store with the panorama, in the thread that makes it."""
        inputs = self.request.mode_inputs()
        if self.depth is not None:
            inputs["depth_image"] = f"sha256:{self.depth.sha256}"
        if self.image is not None:
            inputs["image"] = f"sha256:{self.image.sha256}"
        if self.lora is not None:
            inputs["lora"] = f"sha256:{self.lora.sha256}"
        versions = {name: version(name) for name in ("torch", "diffusers")}
        return {
            "inputs": inputs,
            "closed": self.request.closed_axis,
            "tokens": self.request.tokens,
            "family": Path(family).name,  # a family given by its path may lie anywhere
            "versions": {"panorama": __version__, **versions},
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }

    def _depth(self, factor: int) -> Tensor | None:
        """Return the depth image in the size of the panorama, enlarged, if it is followed."""
        request = self.request
        if self.depth is None or not request.controlnet_conditioning_scale:
            return None
        size = factor * request.height, factor * request.width
        return torch.from_numpy(depth_images.resize(self.depth.values, *size, request.closed_axis))


@dataclass(frozen=True)
class Stage:
    """A pass over the whole panorama, and over its poles if they are to be fixed."""

    settings: Settings
    steps: int
    poles: Settings  # of each of their views
    pole_steps: int  # of all of them together


def stages_of(job: Job, pipeline: Pipeline) -> list[Stage]:
    """Return the stages of a job: the panorama at its own size, and every doubling."""
    stages = []
    for doubling in range(job.request.upscale.bit_length()):
        settings = job.settings(2**doubling)
        steps = settings.partial_steps
        if doubling == 0 and job.request.image is None:
            steps = settings.num_inference_steps
        elif doubling == 0 and job.request.only_enlarges:
            steps = 0
        pole = pipeline.pole_settings(settings)
        stages.append(Stage(settings, steps, pole, len(job.poles()) * pole.partial_steps))
    return stages


class Counter:
    """Count the steps of all stages, and report each."""

    def __init__(
        self,
        stages: Sequence[Stage],
        on_step: Progress | None,
        preview: Callable[[Settings, Tensor], Image.Image],
    ) -> None:
        self.done, self.total = 0, sum(stage.steps + stage.pole_steps for stage in stages)
        self.on_step, self.preview = on_step, preview

    def of(self, settings: Settings) -> OnStep:
        """Return what reports the steps of a stage."""

        def report(step: int, steps: int, x0: Tensor) -> None:
            self.done += 1
            if self.on_step:
                self.on_step(self.done, self.total, partial(self.preview, settings, x0))

        return report


@dataclass(frozen=True)
class Run:
    """Make the image of a job, stage by stage."""

    job: Job
    pipeline: Pipeline
    generator: torch.Generator
    counter: Counter
    seconds: dict[str, float]  # by what they were spent on

    def make(self, stages: Sequence[Stage]) -> Tensor:
        """Return the image (1, 3, H, W) in [0, 1]."""
        first, *doublings = stages
        with timed(self.seconds, "denoise"):
            conditioning = self.pipeline.encode(first.settings)
        image = self.fix_poles(first, self.draw(first.settings, conditioning))
        for stage in doublings:
            with timed(self.seconds, "upscale"):
                report = self.counter.of(stage.settings)
                image = self.pipeline.refine(
                    stage.settings, conditioning, image, self.generator, report
                )
            image = self.fix_poles(stage, image)
        return image

    def draw(self, settings: Settings, conditioning: Conditioning) -> Tensor:
        """Draw the image from noise, or from the job's image."""
        source, x0 = self.job.image, None
        if source is not None and self.job.request.only_enlarges:
            return resize(source.pixels, (settings.height, settings.width), settings.closed)
        with timed(self.seconds, "denoise"):
            if source is not None:
                x0 = self.pipeline.encode_image(settings, source.pixels)
            noise = self.pipeline.noise(settings, self.generator)
            report = self.counter.of(settings)
            latents = self.pipeline.denoise(settings, conditioning, noise, report, x0=x0)
        with timed(self.seconds, "decode"):
            return self.pipeline.decode(settings, latents)

    def fix_poles(self, stage: Stage, image: Tensor) -> Tensor:
        """Redraw the poles, if the job asks for that."""
        if not (prompts := self.job.poles()):
            return image
        with timed(self.seconds, "poles"):
            report = self.counter.of(stage.poles)
            return self.pipeline.fix_poles(stage.settings, image, prompts, self.generator, report)


def device_name(device: torch.device) -> str:
    """Name a device by the model of its GPU, or else by its type, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that a block takes to those of a stage."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
