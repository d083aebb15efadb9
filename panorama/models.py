"""The model families and their modes: what is loaded, and how a request runs on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL.Image import Image

from panorama import depth, weights
from panorama.request import INPUTS, SPEEDS, ModeSettings, ResolvedRequest, Speed
from panorama.safety import SafetyChecker
from panorama.sdxl import LEAST_GUIDANCE, SDXL360
from panorama.share import ALONE, Share
from panorama.syncdiffusion import SyncDiffusionPipeline

DEFAULT_FAMILY = "tiny"

NOT_THE_PIPELINES = ("mode", "seed", "disable_safety_checker")
"""The inputs that say what is done around a pipeline, which it is not called with."""

OnStep = Callable[[int, int], None]
"""Called after every step with its number, from 1, and how many there are."""


@dataclass(frozen=True)
class Mode:
    """A way to make a panorama."""

    load: Callable[[Path, torch.device], Any]
    run: Callable[[Any, ResolvedRequest, OnStep, Share], Image]
    settings: Callable[[Any, Mapping[str, Any]], ModeSettings]


def load_syncdiffusion(folder: Path, device: torch.device) -> SyncDiffusionPipeline:
    """Reads the pipeline from its folder."""
    pipe: SyncDiffusionPipeline = SyncDiffusionPipeline.from_pretrained(
        folder, dtype=precision(device), local_files_only=True, use_safetensors=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return pipe


def run_syncdiffusion(
    pipe: SyncDiffusionPipeline, request: ResolvedRequest, on_step: OnStep, share: Share
) -> Image:
    """Makes the panorama that is asked for, or a share of it."""
    inputs = arguments(request, on_step)
    speed, name = SPEEDS[inputs.pop("speed")], inputs.pop("scheduler")
    image: Image = pipe(**inputs, **levers(pipe, speed, name), share=share).images[0]
    return image


def levers(pipe: SyncDiffusionPipeline, speed: Speed, scheduler: str | None) -> dict[str, Any]:
    """What the pipeline is called with to save time as a speed does, by a solver of this name."""
    return {
        "scheduler": build_scheduler(scheduler, pipe.scheduler) if scheduler else None,
        "disjoint": speed.disjoint,
        "sync_on_x0": speed.sync_on_x0,
        "sync_pooling": speed.sync_pooling,
    }


SCHEDULERS: Mapping[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
"""The solvers that the input `scheduler` names, see `sampler.require_fusable`."""


def build_scheduler(name: str, own: Any) -> Any:
    """A solver by its name, for what a model's own one is configured for."""
    return SCHEDULERS[name].from_config(own.config)


def settings_syncdiffusion(
    pipe: SyncDiffusionPipeline, defaults: Mapping[str, Any]
) -> ModeSettings:
    """What the family's file says, and what the model itself knows."""
    factor = pipe.vae_scale_factor
    return ModeSettings(
        **defaults, multiple=factor, smallest=pipe.window * factor, window=pipe.window
    )


def load_sdxl_360(folder: Path, device: torch.device) -> SDXL360:
    """Reads the pipelines from their folder."""
    pipe = SDXL360.from_pretrained(folder, precision(device))
    pipe.to(device)
    return pipe


def run_sdxl_360(pipe: SDXL360, request: ResolvedRequest, on_step: OnStep, share: Share) -> Image:
    """Makes the picture that is asked for, all of it: it has no windows to share."""
    assert share.ranks == 1
    inputs = arguments(request, on_step)
    path = inputs.pop("depth_image")
    followed = path is not None and request.controlnet_conditioning_scale > 0
    image: Image = pipe(**inputs, depth=depth_tensor(path, request) if followed else None)[0]
    return image


def depth_tensor(path: Path, request: ResolvedRequest) -> torch.Tensor:
    """The depth image in the picture's size, (height, width) in [0, 1]."""
    values = depth.read(path)
    depth.warn_of_step(values)
    return torch.from_numpy(depth.resize(values, request.height, request.width))


def settings_sdxl_360(pipe: SDXL360, defaults: Mapping[str, Any]) -> ModeSettings:
    """What the family's file says, and what the models themselves know."""
    return ModeSettings(
        **defaults,
        multiple=pipe.multiple,
        smallest=pipe.multiple,
        largest=pipe.largest,
        least_guidance=LEAST_GUIDANCE,
        tokens=pipe.tokens,
    )


def precision(device: torch.device) -> torch.dtype:
    """Half on a GPU, single on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


def arguments(request: ResolvedRequest, on_step: OnStep) -> dict[str, Any]:
    """What a pipeline is called with: the mode's inputs, the seed's generator, a callback."""

    def callback(
        _: Any, step: int, __: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        on_step(step + 1, request.num_inference_steps)
        return state

    inputs = request.mode_inputs()
    own = {name: value for name, value in inputs.items() if name not in NOT_THE_PIPELINES}
    generator = torch.Generator().manual_seed(request.seed)
    own["prompt"] = request.full_prompt
    return {**own, "generator": generator, "callback_on_step_end": callback}


MODES: Mapping[str, Mode] = {
    "syncdiffusion": Mode(load_syncdiffusion, run_syncdiffusion, settings_syncdiffusion),
    "sdxl-360": Mode(load_sdxl_360, run_sdxl_360, settings_sdxl_360),
}


class Models:
    """A family, loaded: `generate` turns a request into a picture.

    Attributes:
        family: its name.
        device: where it runs.
        pipelines: mode name to pipeline.
        checker: what every picture has to pass; None for nothing.
    """

    def __init__(
        self,
        family: str,
        device: torch.device,
        pipelines: Mapping[str, Any],
        defaults: Mapping[str, Mapping[str, Any]],
        checker: SafetyChecker | None = None,
    ) -> None:
        self.family = family
        self.device = device
        self.pipelines = pipelines
        self.checker = checker
        self._defaults = defaults

    def settings(self, mode: str) -> ModeSettings:
        """What a mode asks and offers in this family; ValueError if it was not loaded."""
        check_mode(mode, self.family, self.pipelines)
        return MODES[mode].settings(self.pipelines[mode], self._defaults[mode])

    def generate(
        self, request: ResolvedRequest, on_step: OnStep | None = None, share: Share = ALONE
    ) -> Image:
        """Makes a picture.

        Args:
            request: what to make, resolved with this family's settings.
            on_step: called after every step; an exception that it raises ends the run and leaves
                the models as they were.
            share: this process's share of the windows, in mode syncdiffusion.

        Raises:
            PictureWithheldError: the family has a safety checker, and it flagged the picture.
        """
        pipe = self.pipelines[request.mode]
        image = MODES[request.mode].run(pipe, request, on_step or (lambda step, steps: None), share)
        if self.checker and not request.disable_safety_checker:
            self.checker.check(image, request.closed_axis)
        return image


def load(
    family: str = DEFAULT_FAMILY,
    *,
    modes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Models:
    """Loads a family from its folder, without a network.

    Modes are loaded one after the other: while transformers and diffusers build a model they set
    torch's default dtype, which is that of all threads.

    Args:
        family: the name of a folder in the weights folder, `weights/` or PANORAMA_WEIGHTS.
        modes: those to load; None for all that the family offers: those its file has a section
            for.
        device: None for the GPU if there is one.

    Raises:
        FileNotFoundError: there is no such family.
        ValueError: the family offers no such mode.
        WeightsError: a file of its weights is missing.
    """
    defaults = weights.describe(family)
    modes = tuple(defaults) if modes is None else modes
    for mode in modes:
        check_mode(mode, family, defaults)
    weights.require(family, modes)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = weights.home(family)
    pipelines = {mode: MODES[mode].load(folder / mode, place) for mode in modes}
    return Models(family, place, pipelines, defaults, load_checker(family, place))


def load_checker(family: str, device: torch.device) -> SafetyChecker | None:
    """The safety checker of a family; None if it has none, here or in this repository."""
    folder = weights.find(f"{family}/safety_checker")
    if folder is None:
        return None
    checker = SafetyChecker.from_pretrained(folder, precision(device))
    checker.model.to(device)
    return checker


def check_mode(mode: str, family: str, offered: Mapping[str, Any]) -> None:
    """Raises ValueError for a mode that a family does not offer."""
    if mode not in offered:
        rule = f"be one that the family {family} offers, {', '.join(offered)}"
        raise INPUTS["mode"].refuse(mode, rule, next(iter(offered)))
