"""Presets: named combinations of sampling settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from panorama.sampling.synchronize import SyncSettings
from panorama.sampling.views import Layout, Sliding, Spanning


@dataclass(frozen=True)
class Preset:
    """A trade of time for fidelity to the paper. A request may choose other steps or schedulers."""

    layout: Callable[[int], Layout]  # built from a stride in latent cells
    num_inference_steps: int = 50
    scheduler: str | None = None  # a name in `solver.SCHEDULERS`; None for the model's own
    takes_stride: bool = False  # the layout depends on the stride
    sync_threshold: int = 5  # a number of first steps
    gradient: bool = False  # move windows by the gradient in as many steps as sync_threshold says
    means: int = 1  # share means in means * sync_threshold steps

    def sync(self, threshold: int, **settings: Any) -> SyncSettings:
        """Return the settings of synchronising with a sync_threshold."""
        gradient = threshold if self.gradient else 0
        return SyncSettings(threshold=gradient, means=self.means * threshold, **settings)


EXACT = Preset(Sliding, takes_stride=True, gradient=True, means=8)
"""The gradient of the SyncDiffusion paper, on windows that move and share their means."""

FAST = Preset(
    lambda stride: Sliding(None), num_inference_steps=20, scheduler="dpm++", sync_threshold=8
)
"""Many times cheaper: fewer windows, fewer steps, shared means alone."""

WHOLE = Preset(lambda stride: Spanning())
"""The whole canvas as one view."""

WINDOWED: Mapping[str, Preset] = {"exact": EXACT, "fast": FAST}
"""The presets that lay windows, by the value of the input `speed`."""
