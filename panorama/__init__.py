"""Seamless, coherent panoramas from a prompt.

    from panorama import Request, load, save

    models = load("tiny")
    request = Request(prompt="sunset over snowy mountains", loop_closure=True)
    request = request.resolve(models.settings(request.mode))
    save(models.generate(request), "sunset.png", request, models.family)

Names are imported when they are first used, so `import panorama` alone loads neither torch
nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from panorama.__version__ import __version__

if TYPE_CHECKING:
    from panorama.models import Models, load
    from panorama.picture import read_metadata, save
    from panorama.request import ModeSettings, Request, ResolvedRequest
    from panorama.safety import PictureWithheldError
    from panorama.sdxl import SDXL360
    from panorama.syncdiffusion import SyncDiffusionPipeline

__all__ = [
    "SDXL360",
    "ModeSettings",
    "Models",
    "PictureWithheldError",
    "Request",
    "ResolvedRequest",
    "SyncDiffusionPipeline",
    "__version__",
    "load",
    "read_metadata",
    "save",
]

_HOMES = {
    "ModeSettings": "panorama.request",
    "Models": "panorama.models",
    "PictureWithheldError": "panorama.safety",
    "Request": "panorama.request",
    "ResolvedRequest": "panorama.request",
    "SDXL360": "panorama.sdxl",
    "SyncDiffusionPipeline": "panorama.syncdiffusion",
    "load": "panorama.models",
    "read_metadata": "panorama.picture",
    "save": "panorama.picture",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
