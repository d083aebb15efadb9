"""Presets: named combinations of sampling settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from panorama.sampling.views import Disjoint, Layout, Sliding, Spanning


@dataclass(frozen=True)
class Preset:
    """A trade of time for fidelity to the paper. A request may choose other steps or schedulers."""

    layout: Callable[[int], Layout]  # built from a stride in latent cells
    num_inference_steps: int = 50
    scheduler: str | None = None  # a name in `solver.SCHEDULERS`; None for the model's own
    takes_stride: bool = False  # the layout depends on the stride
    through_unet: bool = False  # see `SyncSettings`
    pooling: int = 1  # see `SyncSettings`


EXACT = Preset(Sliding, takes_stride=True, through_unet=True)
"""As the SyncDiffusion paper describes it."""

FAST = Preset(lambda stride: Disjoint(), num_inference_steps=20, scheduler="dpm++", pooling=2)
"""Several times cheaper: fewer windows, fewer steps, no gradient through the UNet."""

WHOLE = Preset(lambda stride: Spanning())
"""The whole canvas as one view."""

WINDOWED: Mapping[str, Preset] = {"exact": EXACT, "fast": FAST}
"""The presets that lay windows, by the value of the input `speed`."""
