"""Seamless, coherent panoramas from a prompt.

    from panorama import Request, load

    models = load("tiny")
    panorama = models.generate(Request(prompt="sunset over snowy mountains", loop_closure=True))
    panorama.save("sunset.png")

Names are imported when they are first used: `import panorama` loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from panorama.__version__ import __version__

if TYPE_CHECKING:
    from panorama.errors import NotFiniteError
    from panorama.images.files import Panorama, read_metadata
    from panorama.images.safety import ImageWithheldError
    from panorama.images.vae import to_pil
    from panorama.modes import Models, load
    from panorama.pipeline import Pipeline, Settings
    from panorama.request import ModeSettings, Request, ResolvedRequest
    from panorama.sampling.synchronize import SyncSettings
    from panorama.sampling.views import Disjoint, Sliding, Spanning

__all__ = [
    "Disjoint",
    "ImageWithheldError",
    "ModeSettings",
    "Models",
    "NotFiniteError",
    "Panorama",
    "Pipeline",
    "Request",
    "ResolvedRequest",
    "Settings",
    "Sliding",
    "Spanning",
    "SyncSettings",
    "__version__",
    "load",
    "read_metadata",
    "to_pil",
]

_NAMES = {
    "errors": ("NotFiniteError",),
    "images.files": ("Panorama", "read_metadata"),
    "images.safety": ("ImageWithheldError",),
    "images.vae": ("to_pil",),
    "modes": ("Models", "load"),
    "pipeline": ("Pipeline", "Settings"),
    "request": ("ModeSettings", "Request", "ResolvedRequest"),
    "sampling.synchronize": ("SyncSettings",),
    "sampling.views": ("Disjoint", "Sliding", "Spanning"),
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"panorama.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
