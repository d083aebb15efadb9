"""A canvas of latents, the windows on it, and their mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["", "x", "y"]
"""The axis along which a canvas closes: "x" joins left and right, "y" top and bottom."""


@dataclass(frozen=True)
class Canvas:
    """The shape of what is denoised, in latent cells."""

    height: int
    width: int
    closed: Axis = ""  # the axis that closes into a ring


@dataclass(frozen=True)
class View:
    """A window on a canvas, in latent cells. Rows and columns are taken modulo the canvas."""

    top: int
    left: int
    height: int
    width: int
    feathered: bool = False  # counts less in the mean of windows towards its edges


def crop(latents: Tensor, views: Sequence[View]) -> Tensor:
    """Cut windows of one size out of a canvas.

    Args:
        latents: (1, C, H, W).
        views: N views of one height h and width w.

    Returns:
        The windows, (N, C, h, w).
    """
    return torch.cat([latents[(..., *window_index(view, latents))] for view in views])


class Fusion:
    """Average windows over a canvas, added a batch at a time.

    The weights of the mean are 1, or fall towards the edges of feathered views. Source:
    MultiDiffusion (arXiv 2302.08113), equation 5.
    """

    def __init__(self, canvas: Tensor, views: Sequence[View]) -> None:
        """Start an empty mean over a canvas (1, C, H, W), to which all `views` will be added."""
        self.total = torch.zeros_like(canvas)
        self.weight = torch.zeros_like(canvas[:, :1])
        for view in views:
            self.weight[(..., *window_index(view, canvas))] += view_weight(view, canvas.device)

    def add(self, windows: Tensor, views: Sequence[View]) -> None:
        """Add windows (N, C, h, w) at their views."""
        for window, view in zip(windows, views, strict=True):
            weight = view_weight(view, window.device)
            self.total[(..., *window_index(view, self.total))] += window * weight

    def mean(self) -> Tensor:
        """Return the mean (1, C, H, W). Every cell must have been covered."""
        return self.total / self.weight


def window_index(view: View, canvas: Tensor) -> tuple[slice, slice] | tuple[Tensor, Tensor]:
    """Index the rows and columns of a view on a canvas (..., H, W).

    A view that wraps needs index tensors, (h, 1) and (1, w). Any other gets slices, which copy
    several times as fast.
    """
    height, width = canvas.shape[-2:]
    top, left = view.top % height, view.left % width
    bottom, right = top + view.height, left + view.width
    if bottom <= height and right <= width:
        return slice(top, bottom), slice(left, right)
    rows = torch.arange(top, bottom, device=canvas.device) % height
    columns = torch.arange(left, right, device=canvas.device) % width
    return rows[:, None], columns[None]


def view_weight(view: View, device: torch.device) -> Tensor:
    """Return the weight of each cell of a view in the mean, (h, w), float32."""
    if not view.feathered:
        return torch.ones(view.height, view.width, device=device)
    return edge_distance(view.height, device)[:, None] * edge_distance(view.width, device)


def edge_distance(size: int, device: torch.device) -> Tensor:
    """Return the distance (size,) of cell centres from the nearer end, as a fraction of size."""
    places = torch.arange(size, device=device)
    return (torch.minimum(places, places.flip(0)) + 0.5) / size
