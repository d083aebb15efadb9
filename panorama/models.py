"""The model families and their modes: what is loaded, and how a request runs on it."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from panorama.request import ModeSettings, ResolvedRequest
from panorama.syncdiffusion import SyncDiffusionPipeline

DEFAULT_FAMILY = "tiny"
WEIGHTS = Path(__file__).parent.parent / "weights"

OnStep = Callable[[int, int], None]
"""Called after every step with its number, from 1, and how many there are."""


@dataclass(frozen=True)
class Mode:
    """A way to make a panorama."""

    load: Callable[[Path, torch.device], Any]
    run: Callable[[Any, ResolvedRequest, OnStep], Image]
    settings: Callable[[Any, Mapping[str, Any]], ModeSettings]


def load_syncdiffusion(folder: Path, device: torch.device) -> SyncDiffusionPipeline:
    """Reads the pipeline from its folder: half precision on a GPU, single on a CPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe: SyncDiffusionPipeline = SyncDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return pipe


def run_syncdiffusion(
    pipe: SyncDiffusionPipeline, request: ResolvedRequest, on_step: OnStep
) -> Image:
    """Makes the panorama that is asked for."""

    def callback(
        _: SyncDiffusionPipeline, step: int, __: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        on_step(step + 1, request.num_inference_steps)
        return state

    inputs = request.inputs()
    own = {name: value for name, value in inputs.items() if name not in ("mode", "seed")}
    image: Image = pipe(
        **own,
        generator=torch.Generator().manual_seed(request.seed),
        callback_on_step_end=callback,
    ).images[0]
    return image


def settings_syncdiffusion(
    pipe: SyncDiffusionPipeline, defaults: Mapping[str, Any]
) -> ModeSettings:
    """What the family's file says, and what the model itself knows."""
    return ModeSettings(**defaults, multiple=pipe.vae_scale_factor, window=pipe.window)


MODES: Mapping[str, Mode] = {
    "syncdiffusion": Mode(load_syncdiffusion, run_syncdiffusion, settings_syncdiffusion),
}


class Models:
    """A family, loaded: `generate` turns a request into a picture.

    Attributes:
        family: its name.
        device: where it runs.
        pipelines: mode name to pipeline.
    """

    def __init__(
        self,
        family: str,
        device: torch.device,
        pipelines: Mapping[str, Any],
        defaults: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.family = family
        self.device = device
        self.pipelines = pipelines
        self._defaults = defaults

    def settings(self, mode: str) -> ModeSettings:
        """What a mode asks and offers in this family; ValueError if it was not loaded."""
        if mode not in self.pipelines:
            raise ValueError(
                f"mode={mode!r}: must be one of those loaded, {', '.join(self.pipelines)}"
            )
        return MODES[mode].settings(self.pipelines[mode], self._defaults[mode])

    def generate(self, request: ResolvedRequest, on_step: OnStep | None = None) -> Image:
        """Makes a picture.

        Args:
            request: what to make, resolved with this family's settings.
            on_step: called after every step; an exception that it raises ends the run and leaves
                the models as they were.
        """
        pipe = self.pipelines[request.mode]
        return MODES[request.mode].run(pipe, request, on_step or (lambda step, steps: None))


def load(
    family: str = DEFAULT_FAMILY,
    *,
    modes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> Models:
    """Loads a family.

    Args:
        family: the name of a folder in `weights/`.
        modes: those to load; None for all.
        device: None for the GPU if there is one.

    Raises:
        FileNotFoundError: there is no such family.
        ValueError: there is no such mode.
    """
    folder = WEIGHTS / family
    if not (folder / "family.toml").is_file():
        families = ", ".join(sorted(path.parent.name for path in WEIGHTS.glob("*/family.toml")))
        raise FileNotFoundError(f"no model family {family!r} in {WEIGHTS}; there is {families}")
    modes = tuple(MODES) if modes is None else modes
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    defaults = tomllib.loads((folder / "family.toml").read_text())
    pipelines = {mode: MODES[mode].load(folder / mode, place) for mode in modes}
    return Models(family, place, pipelines, defaults)
