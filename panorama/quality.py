"""Measures of an image's seam, windows and details, and warnings."""

import logging
from collections.abc import Callable, Iterator, Mapping
from math import inf, isfinite, nan
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from panorama.jobs import MODES, Job, Stage
from panorama.pipeline import Pipeline, Settings
from panorama.request import INPUTS, ModeSettings, ResolvedRequest
from panorama.sampling.canvas import Axis, Canvas
from panorama.sampling.views import even_starts

BAND = 64  # rows that are measured at once
MAX_SEAM = 1.5
"""A seam shows if its ratio and its contrast are above this."""

T = TypeVar("T")
Range = tuple[float, float]
"""The least and the greatest of values."""

logger = logging.getLogger(__name__)


def column_steps(images: Tensor) -> Tensor:
    """Return the mean step across the left of each column of images, (W,), in float64.

    The first is the step across the seam of a ring.

    Args:
        images: (N, C, H, W) of any type and range; a few rows at a time become floats.
    """
    count, channels, height, width = images.shape
    total = torch.zeros(width, dtype=torch.float64, device=images.device)
    for top in range(0, height, BAND):
        band = images[..., top : top + BAND, :].float()
        total += (band - band.roll(1, -1)).abs().sum((0, 1, 2))
    return total / (count * channels * height)


def seam_ratio(image: Tensor, closed: Axis = "x") -> float:
    """Return the step across the seam of (1, C, H, W) over the mean step between columns.

    Where top and bottom meet, rows take the place of columns.
    """
    steps = column_steps(image.mT if closed == "y" else image)
    return float(steps[0] / steps[1:].mean())


def seam_contrast(image: Tensor, closed: Axis = "x") -> float:
    """Return the step across the seam of (1, C, H, W) over the mean of the steps on its two sides.

    An edge of the scene that happens to lie at the seam is some columns wide, so that its steps are
    all large.
    """
    columns = (image.mT if closed == "y" else image)[..., [-2, -1, 0, 1]].double()
    before, seam, after = columns.diff(dim=-1).abs().mean((0, 1, 2))
    return float(2 * seam / (before + after))


def edge_ratio(image: Tensor, pipeline: Pipeline, settings: Settings, steps: int) -> float:
    """Return the step at window edges over that between any latent cells, in the upper third.

    Both are means over pairs of neighbouring columns. The edges are those of all windows of all
    denoising steps. They lie between latent cells, where a decoder makes larger steps than
    elsewhere, so only columns at the borders of cells are compared. A ratio above 1 means that
    windows show as panels. In an image that is higher than wide, rows take the place of columns,
    over its whole width.

    Args:
        image: (1, C, H, W).
        pipeline: the pipeline that made it.
        settings: its settings, with windows.
        steps: the denoising steps that were made, at least 1.
    """
    canvas, factor, window = pipeline.canvas(settings), pipeline.base.factor, pipeline.base.window
    axis, length = ("x", canvas.width) if wide(image) else ("y", canvas.height)
    ring = canvas.closed == axis
    row = Canvas(window, length, "x" if ring else "")  # windows move along both axes alike
    edges = [
        edge % length
        for views in settings.layout(row, window, steps)
        for view in views
        for edge in (view.left, view.left + window)
        if ring or 0 < edge < length
    ]
    between = column_steps(image[..., : image.shape[-2] // 3, :] if wide(image) else image.mT)
    cells = between[::factor]  # (length,), across the left of a latent cell
    return float(cells[edges].mean() / cells[0 if ring else 1 :].mean())


def sharpness(images: Tensor) -> float:
    """Return the mean step between neighbouring pixels of (N, C, H, W), in their own range."""
    return float((column_steps(images)[1:].mean() + column_steps(images.mT)[1:].mean()) / 2)


def disjoint_windows(image: Tensor, side: int, *, ring: bool = False) -> Iterator[Tensor]:
    """Yield the windows (1, C, side, side) of an image (1, C, H, W) that do not overlap.

    As many as fit are spread evenly along the longer side. On a flat image the outermost ones touch
    the ends. Along the shorter side they are centred.
    """
    across, length = sorted(image.shape[-2:])
    count, last = length // side, length - side
    starts = even_starts(length, count) if ring else (*even_starts(last, count - 1), last)
    along_x = image if wide(image) else image.mT
    top = (across - side) // 2
    for start in starts:
        window = along_x[..., top : top + side, start : start + side]
        yield window if wide(image) else window.mT


def wide(image: Tensor) -> bool:
    """Return True for an image (..., H, W) that is at least as wide as high."""
    return image.shape[-1] >= image.shape[-2]


def intra_lpips(perceptual: Any, windows: Iterator[Tensor], scale: int = 1) -> float:
    """Return the mean perceptual distance of all pairs of windows.

    Args:
        perceptual: an `LPIPS`.
        windows: at least two of one size, (1, 3, h, w), uint8.
        scale: squares of so many pixels a side are averaged first.
    """
    levels = (F.avg_pool2d(window.to(perceptual.device).float(), scale) for window in windows)
    return float(perceptual.mean_distance(each / 127.5 - 1 for each in levels))


def measure(job: Job, pipeline: Pipeline, stage: Stage, image: Image.Image) -> dict[str, float]:
    """Measure a finished image, and leave it as it is.

    A measure that fails, for example because memory runs out, is logged and left out.

    Args:
        job: what the image was made from.
        pipeline: made it.
        stage: the last of the job.
        image: in RGB.

    Returns:
        Those of the measures in docs/quality.md that the image has, by name.
    """
    levels = attempt("the image", lambda: torch.from_numpy(np.array(image)))  # (H, W, 3), uint8
    if levels is None:
        return {}
    pixels = levels.permute(2, 0, 1)[None]  # (1, 3, H, W)
    base, settings, scale = pipeline.base, stage.settings, job.request.upscale
    side = base.window * base.factor * scale
    windows = disjoint_windows(pixels, side, ring=bool(settings.closed))
    compares = MODES[job.request.mode].synchronised and base.perceptual is not None
    measures: Mapping[str, tuple[bool, Callable[[], float]]] = {
        "seam_ratio": (bool(settings.closed), lambda: seam_ratio(pixels, settings.closed)),
        "seam_contrast": (bool(settings.closed), lambda: seam_contrast(pixels, settings.closed)),
        "intra_lpips": (
            compares and max(image.size) >= 2 * side,
            lambda: intra_lpips(base.perceptual, windows, scale),
        ),
        "edge_ratio": (
            not settings.layout.wraps and stage.steps > 0,
            lambda: edge_ratio(pixels, pipeline, settings, stage.steps),
        ),
        "sharpness": (True, lambda: sharpness(pixels)),
    }
    found = {name: attempt(name, find) for name, (applies, find) in measures.items() if applies}
    return {n: float(f"{x:.4g}") for n, x in found.items() if x is not None and isfinite(x)}


def attempt(name: str, find: Callable[[], T]) -> T | None:
    """Return what a function returns, or None, with a line in the log, if it fails."""
    try:
        return find()
    except Exception as error:
        logger.warning("%s was not measured: %s: %s", name, type(error).__name__, error)
        return None


def unusual(
    quality: Mapping[str, float], request: ResolvedRequest, usual: Range | None
) -> list[str]:
    """Return a sentence for each measure of an image that is far from good, with what helps.

    Args:
        quality: from `measure`.
        request: what the image was made from.
        usual: the least and the greatest usual intra_lpips in its family and mode, None if unknown.
            They hold for images of one prompt that start from noise.
    """
    found, drawn = [], request.image is None
    if seam_shows(quality):
        found.append(
            f"seam_ratio={quality['seam_ratio']:.3g}, above {MAX_SEAM}: the seam shows where the "
            f"panorama closes; try {'another seed' if drawn else 'an image whose edges meet'}"
        )
    distance = quality.get("intra_lpips", nan)
    if usual and drawn and len(request.parts) == 1 and distance > 2 * usual[1] - usual[0]:
        stronger = INPUTS["sync_weight"].default
        found.append(
            f"intra_lpips={distance:.3g}, in this family usually {usual[0]:g} to {usual[1]:g}: "
            "the windows do not match; try another seed"
            + (f", or sync_weight={stronger:g}" if request.sync_weight < stronger else "")
        )
    return found


def seam_shows(quality: Mapping[str, float]) -> bool:
    """Return True if a panorama closes with a step that no edge of the scene explains."""
    ratio = quality.get("seam_ratio", nan)
    return ratio > MAX_SEAM and quality.get("seam_contrast", inf) > MAX_SEAM


def badness(quality: Mapping[str, float]) -> tuple[bool, float, float]:
    """Return a sort key that puts the best of several images of one request first.

    An image whose seam shows loses against any other. Otherwise the lower intra_lpips wins, and
    where there is none, the lower seam_ratio.
    """
    ratio, distance = (quality.get(name, inf) for name in ("seam_ratio", "intra_lpips"))
    return seam_shows(quality), distance, ratio


def can_compare(request: ResolvedRequest, settings: ModeSettings) -> bool:
    """Return True if the images of a request have a seam or windows by which to compare them."""
    longer = max(request.width, request.height)
    return bool(request.closed_axis or (settings.window and longer >= 2 * settings.smallest))
