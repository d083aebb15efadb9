"""Joint denoising of one canvas through views of it."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from panorama.errors import not_finite
from panorama.sampling.canvas import Axis, Fusion, View, crop
from panorama.sampling.denoiser import Denoiser
from panorama.sampling.low_band import LowBand
from panorama.sampling.ranks import split_among_ranks
from panorama.sampling.solver import Solver
from panorama.sampling.synchronize import Synchronizer, SyncSettings, SyncStep, keep_memory

OnStep = Callable[[int, int, Tensor], None]
"""Called with the number of a step, from 1, the number of steps, and the x0 (1, C, H, W) that the
step predicted."""
Cut = Callable[[Sequence[View]], Tensor]
"""From N views to the latents in their windows, (N, C, h, w)."""
Update = Callable[[Tensor, Sequence[View]], tuple[Tensor, Tensor]]
"""From windows (N, C, h, w) and their views to the updated windows and the noise in them."""

BATCH_SIZE = 8
"""Windows that pass through the networks at once by default."""

logger = logging.getLogger(__name__)


@torch.no_grad()
def sample(
    latents: Tensor,
    views_per_step: Sequence[Sequence[View]],
    denoise: Denoiser,
    solver: Solver,
    *,
    closed: Axis = "",
    sync: Synchronizer | None = None,
    hold: LowBand | None = None,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise a canvas: MultiDiffusion (arXiv 2302.08113), synchronised as in SyncDiffusion.

    At each step the noise in windows is predicted. At a sync step windows are also moved towards an
    anchor, the middle one. Windows and noise are averaged over the canvas, and the solver makes one
    step for all of it. That equals one step per window because the step is affine in (latents,
    noise), and one history serves multistep solvers too. One view that spans the canvas is ordinary
    sampling.

    Args:
        latents: the canvas (1, C, H, W), as `solver.initial` scales noise.
        views_per_step: for each step, views of one size that cover the canvas.
        denoise: the guided noise prediction.
        solver: the solver of this run.
        closed: the axis of the canvas that closes.
        sync: moves windows; None, or a weight of 0, costs nothing.
        hold: keeps the composition of a smaller image.
        batch_size: windows that pass through the networks at once, half as many where gradients
            take memory. Halved again where the device runs out of memory.
        on_step: called after each step; an exception that it raises ends the run.

    Returns:
        The denoised latents (1, C, H, W).

    Raises:
        NotFiniteError: the latents stopped being finite.
        torch.OutOfMemoryError: there is too little memory for a single window.
    """
    plain = Batches(batch_size)
    synced = plain
    if sync and sync.gradient:
        synced = Batches(max(1, batch_size // 2), sync.gradient.save_memory)
    settings, parts = (sync.settings, sync.parts) if sync else (None, 1)
    synced_steps = sync_steps(settings, parts, views_per_step)
    solver.keep_moves(k for k, step in enumerate(synced_steps) if step)
    finite: list[Tensor] = []  # read after the last step, so that no step waits for the device
    steps = zip(solver.timesteps, views_per_step, synced_steps, strict=True)
    for k, (t, views, step) in enumerate(steps):
        views = tuple(views)
        fusion = Fusion(torch.cat([latents, latents], 1), views, closed)  # windows and their noise
        cut: Cut = partial(crop, latents, closed=closed)
        update: Update = partial(predict, denoise, t)
        batches = plain
        if sync and step:
            anchor_views, views = sync.split(views)
            found = plain.map(update, cut, anchor_views)  # (P, 2C, h, w)
            fusion.add(found, anchor_views)
            update = partial(sync.update, t, sync.anchors(t, step, *found.chunk(2, 1)), step)
            batches = synced if step.gradient else plain
        update_all = split_among_ranks(partial(batches.map, update, cut))
        fusion.add(update_all(views), views)  # (N, 2C, h, w) of all that are no anchors
        moved, noise_pred = fusion.mean().chunk(2, 1)  # (1, C, H, W) each
        if hold is not None:
            noise_pred = hold(solver, t, moved, noise_pred)
        latents = solver.step(noise_pred, t, moved)
        finite.append(latents.isfinite().all())
        if on_step is not None:
            on_step(k + 1, len(synced_steps), solver.x0(moved, noise_pred, t))
    steps_finite = torch.stack(finite).tolist()
    if not all(steps_finite):
        first = steps_finite.index(False) + 1
        raise not_finite(f"the latents after step {first} of {len(steps_finite)} are")
    return latents


def sync_steps(
    settings: SyncSettings | None, parts: int, views_per_step: Sequence[Sequence[View]]
) -> list[SyncStep | None]:
    """Return what synchronises each step, None where all windows are anchors."""
    if settings is None:
        return [None] * len(views_per_step)
    counts = enumerate(map(len, views_per_step))
    return [settings.at(k) if count > parts else None for k, count in counts]


def predict(
    denoise: Denoiser, t: Tensor, x: Tensor, views: Sequence[View]
) -> tuple[Tensor, Tensor]:
    """Predict the noise in windows, and leave them as they are."""
    return x, denoise(x, t, views)


class Batches:
    """Update windows some at a time, and fewer at a time once memory ran out.

    Attributes:
        size: windows at a time.
        save_memory: see `PerceptualGradient`.
    """

    def __init__(self, size: int, save_memory: Callable[[], bool] = keep_memory) -> None:
        self.size = size
        self.save_memory = save_memory

    def map(self, update: Update, cut: Cut, views: Sequence[View]) -> Tensor:
        """Update the windows of N views.

        Returns:
            The windows and the noise in them, (N, 2C, h, w).

        Raises:
            torch.OutOfMemoryError: there is too little memory for a single window.
        """
        results: list[Tensor] = []
        done = 0
        while done < len(views):
            batch = views[done : done + self.size]
            try:
                results.append(torch.cat(update(cut(batch), batch), 1))
            except torch.OutOfMemoryError:
                if not self._make_room(len(batch)):
                    raise
                continue
            done += len(batch)
        return torch.cat(results)

    def _make_room(self, count: int) -> bool:
        """Reduce memory use below that of `count` windows. Return False if that is impossible."""
        if self.save_memory():
            logger.warning(
                "not enough memory for the gradient of %d windows: turning checkpointing on", count
            )
            return True
        self.size = count // 2
        if self.size:
            logger.warning(
                "not enough memory for %d windows at once: continuing with %d", count, self.size
            )
        return self.size > 0
