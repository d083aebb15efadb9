"""Parts of a canvas: stretches along its longer side that have prompts of their own."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from panorama.sampling.canvas import Canvas, View

TRANSITION = 0.5
"""Length of the change from one part to the next, as a fraction of a part."""


def part_weights(canvas: Canvas, parts: int, views: Sequence[View]) -> Tensor:
    """Return the weight of each of P parts in each of N views, (N, P), rows of sum 1.

    The parts divide the longer side evenly. A view whose middle lies in the middle half of a part
    shows that part alone. Between these the weight changes linearly from one part to the next. If
    the longer side closes, the last part is followed by the first. Otherwise the first and the
    last part extend to the ends.
    """
    places = torch.tensor([float(part_position(canvas, parts, view)) for view in views])  # (N,)
    apart = (places[:, None] - torch.arange(parts) - 0.5).abs()  # (N, P)
    apart = torch.minimum(apart, parts - apart)  # around a ring; flat, this changes no weight
    weights = (0.5 + (0.5 - apart) / TRANSITION).clamp(0, 1)
    return weights / weights.sum(1, keepdim=True)


def part_position(canvas: Canvas, parts: int, view: View) -> Fraction:
    """Return the position of a view's middle among the parts, from p to p + 1 within part p."""
    along_x = canvas.width >= canvas.height
    length = canvas.width if along_x else canvas.height
    start, size = (view.left, view.width) if along_x else (view.top, view.height)
    position = Fraction((2 * start + size) * parts, 2 * length)
    if canvas.closed == ("x" if along_x else "y"):
        return position % parts
    half = Fraction(1, 2)
    return min(max(position, half), parts - half)


def split_anchors(
    canvas: Canvas, parts: int, views: Sequence[View]
) -> tuple[list[View], list[View]]:
    """Take the anchor of each part out of views, in the order of the parts.

    The anchor is the middle one of the views that belong to the part, which for a single part is
    index N // 2 of all.

    Returns:
        The anchors, one for each part, and all other views.
    """
    # Fractions are exact: windows that are at most one part apart always put one in every part.
    belongs = [int(part_position(canvas, parts, view)) for view in views]
    members = [[k for k, part in enumerate(belongs) if part == p] for p in range(parts)]
    middles = [indices[len(indices) // 2] for indices in members]
    others = [view for index, view in enumerate(views) if index not in middles]
    return [views[index] for index in middles], others
