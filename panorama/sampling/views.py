"""Layouts: where the windows of each denoising step lie on a canvas."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd
from typing import ClassVar, Protocol

from panorama.sampling.canvas import Canvas, View

MIN_SPACING = 8  # cells; the smallest stride, and the smallest spacing used for equal coverage


class Layout(Protocol):
    """Place windows on a canvas."""

    wraps: ClassVar[bool]  # views span the closed axis, so convolutions have to wrap around it

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the views of each step, of windows with the model's own side in latent cells.

        Raises:
            ValueError: the canvas cannot be covered.
        """
        ...


@dataclass(frozen=True)
class Spanning:
    """Cover the canvas with one view, as a stock pipeline does."""

    wraps: ClassVar[bool] = True

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the same single view for every step."""
        return [(View(0, 0, canvas.height, canvas.width),)] * steps


@dataclass(frozen=True)
class Sliding:
    """Cover the canvas with overlapping windows, at most `stride` latent cells apart.

    The UNet pads a window's edges with zeros, which leaves a faint step in the latents. Where the
    edges stay in place, the steps add up and show. On a ring the windows therefore turn from step
    to step, so that the edges visit every column, to within one denoising step equally often.

    Attributes:
        stride: the widest distance between neighbouring windows, latent cells.
    """

    stride: int = 16
    wraps: ClassVar[bool] = False

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the views of each step; see `Layout`."""
        views = sliding_views(canvas, window, self.stride)
        if not canvas.closed:
            return [views] * steps
        along_x = canvas.closed == "x"
        count = len({view.left if along_x else view.top for view in views})
        gap = ceil((canvas.width if along_x else canvas.height) / count)
        # Start half a gap on: the first step, which synchronising moves most, has no edge at 0.
        offsets = golden_offsets(gap, gap // 2)
        turned = [
            tuple(turn_view(view, offset, along_x) for view in views) for offset in offsets[:steps]
        ]
        return [turned[step % len(turned)] for step in range(steps)]


@dataclass(frozen=True)
class Disjoint:
    """Cover the canvas with windows that overlap as little as possible, elsewhere at each step.

    Based on SpotDiffusion (arXiv 2407.15507), with three changes. Windows move by golden sections
    of a window rather than at random, so that the edges of nearby steps lie apart. On a flat axis
    the first and the last window stay at the canvas's edges and overlap their neighbours. At the
    last step windows overlap by half and are feathered, because no later step smooths their edges.
    """

    wraps: ClassVar[bool] = False

    def __call__(self, canvas: Canvas, window: int, steps: int) -> Sequence[Sequence[View]]:
        """Return the views of each step; see `Layout`."""
        rows = disjoint_starts(canvas.height, window, steps, canvas.closed == "y")
        columns = disjoint_starts(canvas.width, window, steps, canvas.closed == "x")
        return [
            tuple(
                View(top, left, window, window, feathered=step == steps - 1)
                for top in tops
                for left in lefts
            )
            for step, (tops, lefts) in enumerate(zip(rows, columns, strict=True))
        ]


def sliding_views(canvas: Canvas, window: int, stride: int) -> tuple[View, ...]:
    """Cover a canvas with square windows, rows first.

    Args:
        canvas: at least one window high and wide.
        window: side of a window, latent cells.
        stride: the widest distance between neighbouring windows, 1 to `window` cells; less than
            `window` on a closed axis.

    Returns:
        The views. For a flat canvas whose sides are multiples of `stride`, they are the list of
        the published SyncDiffusion code (`get_views`), in its order.

    Raises:
        ValueError: a window does not fit, or the stride leaves gaps.
    """
    tops = starts(canvas.height, window, stride, ring=canvas.closed == "y")
    lefts = starts(canvas.width, window, stride, ring=canvas.closed == "x")
    return tuple(View(top, left, window, window) for top in tops for left in lefts)


def starts(length: int, window: int, stride: int, *, ring: bool) -> tuple[int, ...]:
    """Return the starts of windows along one axis, see `sliding_views`."""
    return (ring_starts if ring else flat_starts)(length, window, stride)


def flat_starts(length: int, window: int, stride: int) -> tuple[int, ...]:
    """Return the multiples of `stride` at which a window fits and, if needed, a last start."""
    check_fit(length, window, stride)
    found = list(range(0, length - window + 1, stride))
    if found[-1] != length - window:
        found.append(length - window)
    return tuple(found)


def ring_starts(length: int, window: int, stride: int) -> tuple[int, ...]:
    """Return starts spread evenly around a ring, at most `stride` apart.

    A spacing that divides both the ring and the window covers every cell equally often. The widest
    such spacing from 8 cells to `stride` is taken. If there is none, the gaps, and the number of
    windows over a cell, differ by at most one.
    """
    check_fit(length, window, stride)
    if stride >= window:
        raise ValueError(
            f"stride={stride}: must be less than the window's {window} latent cells on a ring, "
            f"or too few windows close it; try {window // 2}"
        )
    common = gcd(length, window)
    spacings = [d for d in range(MIN_SPACING, stride + 1) if common % d == 0]
    return even_starts(length, length // spacings[-1] if spacings else ceil(length / stride))


def disjoint_starts(length: int, window: int, steps: int, ring: bool) -> list[tuple[int, ...]]:
    """Return the starts of each step along one axis, see `Disjoint`."""
    moved = moved_starts(length, window, ring)
    apart = [moved[step % len(moved)] for step in range(steps - 1)]
    return [*apart, half_overlapping_starts(length, window, ring)]


def moved_starts(length: int, window: int, ring: bool) -> tuple[tuple[int, ...], ...]:
    """Return the ways to cover a length with as little overlap as possible.

    On a ring the first way has an edge at the seam, which keeps the edges of the next ones away
    from it. Synchronised windows that do not overlap can differ at their edges, and more so at
    later steps.
    """
    check_fit(length, window, window)
    if ring:
        first = even_starts(length, ceil(length / window))
        gap = ceil(length / len(first))
        return tuple(tuple(start + offset for start in first) for offset in golden_offsets(gap))
    last = length - window
    offsets = golden_offsets(window) if last else (0,)
    return tuple(tuple(sorted({0, *range(offset, last, window), last})) for offset in offsets)


def half_overlapping_starts(length: int, window: int, ring: bool) -> tuple[int, ...]:
    """Return evenly spread starts of windows that overlap by half or more."""
    half, last = window // 2, length - window
    if ring:
        return even_starts(length, ceil(length / half))
    return (*even_starts(last, ceil(last / half)), last)


def golden_offsets(gap: int, first: int = 0) -> tuple[int, ...]:
    """Return every offset below `gap` once, each about a golden section after the one before."""
    section = gap * (5**0.5 - 1) / 2
    step = min((n for n in range(gap) if gcd(n, gap) == 1), key=lambda n: abs(n - section))
    return tuple((first + index * step) % gap for index in range(gap))


def even_starts(length: int, count: int) -> tuple[int, ...]:
    """Return `count` starts around a ring whose gaps differ by at most one cell."""
    return tuple(index * length // count for index in range(count))


def turn_view(view: View, offset: int, along_x: bool) -> View:
    """Move a view by `offset` cells along x, or else along y."""
    if along_x:
        return replace(view, left=view.left + offset)
    return replace(view, top=view.top + offset)


def check_fit(length: int, window: int, stride: int) -> None:
    """Raise ValueError unless windows of `window` cells can cover `length` cells at `stride`."""
    if length < window:
        raise ValueError(
            f"a canvas of {length} latent cells is smaller than a window; try {window} cells"
        )
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride={stride}: must be 1 to the window's {window} latent cells; try {window // 2}"
        )
