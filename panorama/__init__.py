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
    from panorama.errors import NotFiniteError as NotFiniteError
    from panorama.images.cubemap import export as export
    from panorama.images.files import Panorama as Panorama
    from panorama.images.files import read_metadata as read_metadata
    from panorama.images.safety import ImageWithheldError as ImageWithheldError
    from panorama.images.vae import to_pil as to_pil
    from panorama.images.viewer import view as view
    from panorama.modes import Models as Models
    from panorama.modes import load as load
    from panorama.pipeline import Pipeline as Pipeline
    from panorama.pipeline import Settings as Settings
    from panorama.request import ModeSettings as ModeSettings
    from panorama.request import Request as Request
    from panorama.request import ResolvedRequest as ResolvedRequest
    from panorama.sampling.synchronize import SyncSettings as SyncSettings
    from panorama.sampling.views import Fixed as Fixed
    from panorama.sampling.views import Sliding as Sliding
    from panorama.sampling.views import Spanning as Spanning

_NAMES = {
    "errors": ("NotFiniteError",),
    "images.cubemap": ("export",),
    "images.files": ("Panorama", "read_metadata"),
    "images.safety": ("ImageWithheldError",),
    "images.vae": ("to_pil",),
    "images.viewer": ("view",),
    "modes": ("Models", "load"),
    "pipeline": ("Pipeline", "Settings"),
    "request": ("ModeSettings", "Request", "ResolvedRequest"),
    "sampling.synchronize": ("SyncSettings",),
    "sampling.views": ("Fixed", "Sliding", "Spanning"),
}
__all__ = ["__version__", *(name for names in _NAMES.values() for name in names)]


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"panorama.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
