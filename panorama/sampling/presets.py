"""Presets: named combinations of sampling settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from panorama.sampling.views import Layout, Sliding, Spanning


@dataclass(frozen=True)
class Preset:
    """A trade of time for fidelity to the paper. A request may choose other steps or schedulers."""

    layout: Callable[[int], Layout]  # built from a stride in latent cells
    num_inference_steps: int = 50
    scheduler: str | None = None  # a name in `solver.SCHEDULERS`; None for the model's own
    sync_threshold: int = 5  # see `SyncSettings`
    takes_stride: bool = False  # the layout depends on the stride
    gradient: bool = False  # see `SyncSettings`


EXACT = Preset(Sliding, takes_stride=True, gradient=True)
"""The gradient of the SyncDiffusion paper, on windows that move and share their means."""

FAST = Preset(
    lambda stride: Sliding(None), num_inference_steps=20, scheduler="dpm++", sync_threshold=8
)
"""Many times cheaper: fewer windows, fewer steps, shared means alone."""

WHOLE = Preset(lambda stride: Spanning())
"""The whole canvas as one view."""

WINDOWED: Mapping[str, Preset] = {"exact": EXACT, "fast": FAST}
"""The presets that lay windows, by the value of the input `speed`."""
