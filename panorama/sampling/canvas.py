"""A canvas of latents, the windows on it, and their mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Axis = Literal["", "x", "y"]
"""The axis along which a canvas closes: "x" joins left and right, "y" top and bottom."""
Index = tuple[Any, ...]
"""An index of a tensor (..., H, W)."""


@dataclass(frozen=True)
class Canvas:
    """The shape of what is denoised, in latent cells."""

    height: int
    width: int
    closed: Axis = ""  # the axis that closes into a ring

    def moving_axes(self, window: int) -> str:
        """Return the axes, "", "x", "y" or "xy", along which windows of a side can move."""
        sides = (("x", self.width), ("y", self.height))
        return "".join(axis for axis, side in sides if axis == self.closed or side > window)


@dataclass(frozen=True)
class View:
    """A window on a canvas, in latent cells.

    On a closed axis rows or columns are taken modulo the canvas. On a flat axis a view may hang
    over an end by at most the length of the canvas.
    """

    top: int
    left: int
    height: int
    width: int
    feathered: bool = False  # counts less in the mean of windows towards its edges


def crop(latents: Tensor, views: Sequence[View], closed: Axis = "") -> Tensor:
    """Cut windows of one size out of a canvas.

    Where a view hangs over a flat end, the latents are mirrored there.

    Args:
        latents: (1, C, H, W).
        views: N views of one height h and width w.
        closed: the axis of the canvas that closes.

    Returns:
        The windows, (N, C, h, w).
    """
    height, width = latents.shape[-2:]
    windows = []
    for view in views:
        rows = cells(view.top, view.height, height, closed == "y", latents.device)
        columns = cells(view.left, view.width, width, closed == "x", latents.device)
        windows.append(latents[..., rows, :][..., columns])
    return torch.cat(windows)


class Fusion:
    """Average windows over a canvas, added a batch at a time.

    The weights of the mean are 1, or fall towards the edges of feathered views. What hangs over a
    flat end is left out. Source: MultiDiffusion (arXiv 2302.08113), equation 5.
    """

    def __init__(self, canvas: Tensor, views: Sequence[View], closed: Axis = "") -> None:
        """Start an empty mean over a canvas (1, C, H, W), to which all `views` will be added."""
        self.closed = closed
        self.total = torch.zeros_like(canvas)
        self.weight = torch.zeros_like(canvas[:, :1])
        for view in views:
            place, part = self._overlap(view)
            self.weight[place] += view_weight(view, canvas.device)[part]

    def add(self, windows: Tensor, views: Sequence[View]) -> None:
        """Add windows (N, C, h, w) at their views."""
        for window, view in zip(windows, views, strict=True):
            place, part = self._overlap(view)
            self.total[place] += (window * view_weight(view, window.device))[part]

    def mean(self) -> Tensor:
        """Return the mean (1, C, H, W). Every cell must have been covered."""
        return self.total / self.weight

    def _overlap(self, view: View) -> tuple[Index, Index]:
        """Index what a view covers: cells of the canvas (..., H, W), and of the window."""
        height, width = self.total.shape[-2:]
        device = self.total.device
        rows, top = overlap(view.top, view.height, height, self.closed == "y", device)
        columns, left = overlap(view.left, view.width, width, self.closed == "x", device)
        return (..., rows, columns), (..., top, left)


def overlap(
    start: int, size: int, length: int, wraps: bool, device: torch.device
) -> tuple[slice | Tensor, slice]:
    """Return the cells of an axis that a window covers, and the part of the window on them."""
    if wraps:
        return cells(start, size, length, wraps, device), slice(None)
    before, after = max(-start, 0), max(start + size - length, 0)
    return slice(start + before, start + size - after), slice(before, size - after)


def cells(start: int, size: int, length: int, wraps: bool, device: torch.device) -> slice | Tensor:
    """Return the cells (size,) of an axis that a window shows, wrapped or mirrored at the ends.

    Within the ends they are a slice, which copies several times as fast.
    """
    begin = start % length if wraps else start
    if begin >= 0 and begin + size <= length:
        return slice(begin, begin + size)
    places = torch.arange(start, start + size, device=device)
    if wraps:
        return places % length
    places = torch.where(places < 0, -1 - places, places)
    return torch.where(places >= length, 2 * length - 1 - places, places)


def view_weight(view: View, device: torch.device) -> Tensor:
    """Return the weight of each cell of a view in the mean, (h, w), float32."""
    if not view.feathered:
        return torch.ones(view.height, view.width, device=device)
    return edge_distance(view.height, device)[:, None] * edge_distance(view.width, device)


def edge_distance(size: int, device: torch.device) -> Tensor:
    """Return the distance (size,) of cell centres from the nearer end, as a fraction of size."""
    places = torch.arange(size, device=device)
    return (torch.minimum(places, places.flip(0)) + 0.5) / size
