"""A model family, loaded: what each mode is made of, and how a request runs on it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from panorama import weights
from panorama.__version__ import __version__
from panorama.base_model import BaseModel, load_base_model
from panorama.conditioning import depth as depth_images
from panorama.conditioning.lora import LEGAL, Lora, LoraError, read_lora
from panorama.conditioning.prompts import check_lengths
from panorama.images.files import Panorama
from panorama.images.safety import SafetyChecker
from panorama.images.vae import MAX_CELLS, to_pil
from panorama.limits import Limits
from panorama.loras import Fetcher, FetchError
from panorama.pipeline import Pipeline, Settings
from panorama.request import INPUTS, ModeSettings, Request, ResolvedRequest, SpeedSettings
from panorama.sampling.presets import WHOLE, WINDOWED, Preset

DEFAULT_FAMILY = "tiny"

logger = logging.getLogger(__name__)

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

    def settings(self) -> Settings:
        """Return the settings of the pipeline."""
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
            height=request.height,
            width=request.width,
            closed=request.closed_axis,
            negative_prompt=request.negative_prompt,
            guidance_scale=request.guidance_scale,
            num_inference_steps=request.num_inference_steps,
            scheduler=request.scheduler,
            layout=preset.layout(request.stride),
            sync=sync if mode.synchronised else None,
            depth=self._depth(),
            controlnet_conditioning_scale=request.controlnet_conditioning_scale,
            lora=self.lora,
            lora_scale=request.lora_scale,
        )

    def metadata(self, family: str, device: torch.device) -> dict[str, Any]:
        """Return the metadata to store with the panorama, in the thread that makes it."""
        inputs = self.request.mode_inputs()
        if self.depth is not None:
            inputs["depth_image"] = f"sha256:{self.depth.sha256}"
        if self.lora is not None:
            inputs["lora"] = f"sha256:{self.lora.sha256}"
        versions = {name: version(name) for name in ("torch", "diffusers")}
        return {
            "inputs": inputs,
            "tokens": self.request.tokens,
            "family": Path(family).name,  # a family given by its path may lie anywhere
            "versions": {"panorama": __version__, **versions},
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }

    def _depth(self) -> Tensor | None:
        """Return the depth image in the panorama's size, if it is followed."""
        request = self.request
        if self.depth is None or not request.controlnet_conditioning_scale:
            return None
        depth_images.warn_of_open_edges(self.depth.values, request.closed_axis)
        size = request.height, request.width
        return torch.from_numpy(depth_images.resize(self.depth.values, *size, request.closed_axis))


@dataclass(frozen=True)
class Models:
    """A family, loaded. `generate` turns a request into a panorama.

    One panorama is made at a time: calls from several threads wait for each other, since the
    networks are changed while they run.
    """

    family: str  # its name, or the path of its folder
    device: torch.device
    bases: Mapping[str, BaseModel]  # by mode
    defaults: Mapping[str, Mapping[str, Any]]  # inputs by mode
    checker: SafetyChecker | None = None  # every image must pass it
    fetcher: Fetcher = field(default_factory=Fetcher)  # of LoRAs that users name
    limits: Limits | None = None  # requests beyond them are logged
    _lock: AbstractContextManager[Any] = field(default_factory=threading.Lock, repr=False)

    def settings(self, mode: str) -> ModeSettings:
        """Return the defaults and limits of a mode in this family.

        Raises:
            ValueError: the mode was not loaded.
        """
        check_mode(mode, self.family, self.bases)
        base, spec = self.bases[mode], MODES[mode]
        spans = all(preset.layout(1).wraps for preset in spec.presets.values())
        multiple = base.factor * (base.divisor if spans else 1)
        return ModeSettings(
            **self.defaults[mode],
            multiple=multiple,
            smallest=multiple if spans else base.window * base.factor,
            # A larger ring would be decoded in slices, which are not exact.
            largest=MAX_CELLS * base.factor**2 if spans else inf,
            window=0 if spans else base.window,
            has_lora=base.lora is not None,
            tokens=base.tokens,
            speed=spec.speed,
            speeds={
                name: SpeedSettings(
                    p.num_inference_steps, p.scheduler, p.sync_threshold, p.takes_stride
                )
                for name, p in spec.presets.items()
            },
        )

    def prepare(self, request: Request) -> Job:
        """Read and check everything that a request needs, before any work.

        Raises:
            ValueError: an input is not legal in this family.
        """
        settings = self.settings(request.mode)
        if request.depth_image and self.bases[request.mode].controlnet is None:
            rule = "not be set with a model family without a ControlNet"
            raise INPUTS["depth_image"].refuse(request.depth_image, rule, None)
        path, kind = request.depth_image, request.depth_kind
        image = depth_images.read(path, kind) if path else None
        resolved = request.resolve(settings, image.size if image else None)
        texts = {"prompt": resolved.parts, "negative_prompt": (resolved.negative_prompt,)}
        check_lengths(self.bases[request.mode].text_encoders, texts)
        if self.limits:
            for sentence in self.limits.exceeded(resolved):
                logger.warning("%s; see %s", sentence, self.limits.card)
        return Job(resolved, image, self._lora(request))

    def run(self, job: Job, on_step: Progress | None = None) -> Panorama:
        """Make the panorama of a job.

        Args:
            job: from `prepare`.
            on_step: called after every step; an exception that it raises ends the run and leaves
                the networks as they were. Previews have to pass the safety checker too.

        Raises:
            ImageWithheldError: the safety checker flagged the image.
            NotFiniteError: a weight holds NaN, or half precision overflowed.
        """
        pipeline, settings = Pipeline(self.bases[job.request.mode]), job.settings()
        generator = torch.Generator().manual_seed(job.request.seed)
        seconds: dict[str, float] = {}

        def report(step: int, steps: int, x0: Tensor) -> None:
            def preview() -> Image.Image:
                image = to_pil(pipeline.preview(settings, x0))
                self._check(image, job.request)
                return image

            if on_step:
                on_step(step, steps, preview)

        with self._lock:
            with timed(seconds, "denoise"):
                conditioning = pipeline.encode(settings)
                noise = pipeline.noise(settings, generator)
                latents = pipeline.denoise(settings, conditioning, noise, report)
            with timed(seconds, "decode"):
                image = to_pil(pipeline.decode(settings, latents))
            with timed(seconds, "check"):
                self._check(image, job.request)
        return Panorama(image, settings.closed, job.metadata(self.family, self.device), seconds)

    def generate(self, request: Request, on_step: Progress | None = None) -> Panorama:
        """Make the panorama of a request; see `prepare` and `run`."""
        return self.run(self.prepare(request), on_step)

    def _lora(self, request: Request) -> Lora | None:
        """Fetch and read the LoRA that a request names, if it names one."""
        if request.lora is None:
            return None
        rule, networks = INPUTS["lora"], self.bases[request.mode].lora_networks
        try:
            if isinstance(request.lora, str):
                return read_lora(self.fetcher.fetch(request.lora), networks)
            return read_lora(request.lora, networks)
        except LoraError as error:
            reason = f"be {LEGAL}, not {error}"
        except FetchError as error:
            reason = str(error)
        except FileNotFoundError:
            reason = "be a file that exists"
        raise rule.refuse(request.lora, reason, rule.example)

    def _check(self, image: Image.Image, request: ResolvedRequest) -> None:
        """Raise ImageWithheldError if the safety checker flags an image."""
        if self.checker and not request.disable_safety_checker:
            self.checker.check(image, request.closed_axis)


def load(
    family: str = DEFAULT_FAMILY,
    *,
    modes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Models:
    """Load a family from local files, without a network.

    Args:
        family: its name, or the path of its folder.
        modes: those to load; None for all that the family offers.
        device: None for the GPU if there is one.

    Raises:
        FileNotFoundError: there is no such family.
        ValueError: the family offers no such mode.
        WeightsError: a file of its weights is missing.
    """
    offered = weights.describe(family)
    modes = tuple(offered) if modes is None else tuple(modes)
    for mode in modes:
        check_mode(mode, family, offered)
    weights.require(family, modes)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Half precision on a GPU, single precision on a CPU, which is slower in half.
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    bases = load_bases(family, modes, dtype)
    for base in bases.values():
        base.to(place)
    folder = weights.safety_checker(family)
    checker = SafetyChecker.from_pretrained(folder, dtype) if folder else None
    if checker:
        checker.model.to(place)
    table = weights.limits(family)
    limits = Limits(**table) if table else None
    return Models(family, place, bases, offered, checker, limits=limits)


def load_bases(family: str, modes: Sequence[str], dtype: torch.dtype) -> dict[str, BaseModel]:
    """Load the base model of each mode. Modes of one base model share its networks.

    They are loaded one after another: transformers and diffusers set torch's default dtype while
    they build a model, and all threads share it.
    """
    specs = [MODES[mode] for mode in modes]
    loaded = {}
    for name in dict.fromkeys(spec.base for spec in specs):
        components = dict(weights.components(family, name))
        if any(spec.synchronised for spec in specs if spec.base == name):
            components |= weights.components(family, "perceptual")
        loaded[name] = load_base_model(components, dtype)
    return {mode: loaded[MODES[mode].base] for mode in modes}


def check_mode(mode: str, family: str, offered: Mapping[str, Any]) -> None:
    """Raise ValueError for a mode that a family does not offer."""
    if mode not in offered:
        rule = f"be one that the family {family} offers, {', '.join(offered)}"
        raise INPUTS["mode"].refuse(mode, rule, next(iter(offered)))


def device_name(device: torch.device) -> str:
    """Name a device by the model of its GPU, or else by its type, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record the seconds that a block takes."""
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
