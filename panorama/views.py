"""Windows on a canvas of latents: where they lie, how they are cut out, how they are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd

import torch
from torch import Tensor

MIN_SPACING = 8  # cells; the smallest stride, and how far a ring narrows it for equal coverage


@dataclass(frozen=True)
class View:
    """A window on a canvas, in latent cells; rows and columns are taken modulo the canvas.

    Where it fades it counts less in the mean of windows, the nearer a cell is to its sides.
    """

    top: int
    left: int
    size: int
    fades: bool = False


def make_views(
    height: int, width: int, size: int, stride: int, *, ring_x: bool = False, ring_y: bool = False
) -> tuple[View, ...]:
    """Lays square windows over a canvas so that every cell is covered.

    Args:
        height: of the canvas, latent cells, at least `size`.
        width: of the canvas, latent cells, at least `size`.
        size: of a window, latent cells.
        stride: the widest gap between neighbouring windows' starts, 1 to `size` cells.
        ring_x: whether the canvas wraps from right to left.
        ring_y: whether it wraps from bottom to top.

    Returns:
        The views, rows first. For sizes that are multiples of `stride`, a flat canvas has exactly
        the list of the published SyncDiffusion code (`get_views`), in its order.

    Raises:
        ValueError: a window does not fit, the stride leaves gaps, or does not close a ring.
    """
    tops = ring_starts(height, size, stride) if ring_y else flat_starts(height, size, stride)
    lefts = ring_starts(width, size, stride) if ring_x else flat_starts(width, size, stride)
    return tuple(View(top, left, size) for top in tops for left in lefts)


def step_views(
    height: int, width: int, size: int, stride: int, *, ring_x: bool = False, ring_y: bool = False
) -> tuple[tuple[View, ...], ...]:
    """Lays the windows of each step: as `make_views`, but turned on a ring from step to step.

    A window's edge leaves a faint step in what is denoised, for the UNet sees zeros beyond it.
    Where the edges always lie at the same places the steps add up and show, a ring's seam among
    them. Turned windows spread them over all columns, evenly to within one step of the sampler.

    Args:
        height: of the canvas, latent cells, at least `size`.
        width: of the canvas, latent cells, at least `size`.
        size: of a window, latent cells.
        stride: as for `make_views`.
        ring_x: whether the canvas wraps from right to left.
        ring_y: whether it wraps from bottom to top.

    Returns:
        One list for each step, to begin again with when they are used up. A flat canvas has one
        list; a ring has as many as there are cells in the gap between two windows.

    Raises:
        ValueError: as `make_views`.
    """
    views = make_views(height, width, size, stride, ring_x=ring_x, ring_y=ring_y)
    rows, columns = {view.top for view in views}, {view.left for view in views}
    gaps = ceil(height / len(rows)) if ring_y else 1, ceil(width / len(columns)) if ring_x else 1
    # From half a gap on: the first step is synchronised most, and has no edge on a ring's seam.
    down, right = (turns(gap, gap // 2) for gap in gaps)
    return tuple(
        tuple(View(view.top + dy, view.left + dx, size) for view in views)
        for dy in down
        for dx in right
    )


def disjoint_views(
    height: int, width: int, size: int, steps: int, *, ring_x: bool = False, ring_y: bool = False
) -> tuple[tuple[View, ...], ...]:
    """Lays as few windows as cover a canvas, elsewhere at each step.

    SpotDiffusion (arXiv 2407.15507), but for three things. Windows are moved by golden sections of
    a window and not at random, so that edges of steps near to one another are apart. On a flat
    canvas no window goes beyond an edge: one that ends there covers what is left, and overlaps the
    one before. And at the last step windows overlap by half and fade, for no step comes after it
    that would smooth their edges.

    Args:
        height: of the canvas, latent cells, at least `size`.
        width: of the canvas, latent cells, at least `size`.
        size: of a window, latent cells.
        steps: how many there are.
        ring_x: whether the canvas wraps from right to left.
        ring_y: whether it wraps from bottom to top.

    Returns:
        One list for each step.

    Raises:
        ValueError: a window does not fit.
    """
    rows = disjoint_starts(height, size, steps, ring_y)
    columns = disjoint_starts(width, size, steps, ring_x)
    return tuple(
        tuple(View(top, left, size, fades=step == steps - 1) for top in tops for left in lefts)
        for step, (tops, lefts) in enumerate(zip(rows, columns, strict=True))
    )


def disjoint_starts(length: int, size: int, steps: int, ring: bool) -> list[tuple[int, ...]]:
    """For each step where windows start along one side: moved, and at the last overlapping."""
    moved = moved_starts(length, size, ring)
    apart = [moved[step % len(moved)] for step in range(steps - 1)]
    return [*apart, half_starts(length, size, ring)]


def moved_starts(length: int, size: int, ring: bool) -> tuple[tuple[int, ...], ...]:
    """For each step where windows start that cover a length and overlap as little as they can.

    The first begin on a ring's seam, for then the next ones' edges come away from it. Where windows
    that do not overlap are synchronised a picture may change from one to the next, and the later
    the step the more.
    """
    check_fit(length, size, size)
    if ring:
        starts = even_starts(length, ceil(length / size))
        gap = ceil(length / len(starts))
        return tuple(tuple(start + turn for start in starts) for turn in turns(gap))
    last = length - size
    moves = turns(size) if last else (0,)
    return tuple(tuple(sorted({0, *range(move, last, size), last})) for move in moves)


def half_starts(length: int, size: int, ring: bool) -> tuple[int, ...]:
    """Where windows start that overlap by half, or by more where that is not to be had."""
    half, last = size // 2, length - size
    if ring:
        return even_starts(length, ceil(length / half))
    return (*even_starts(last, ceil(last / half)), last)


def turns(gap: int, first: int = 0) -> tuple[int, ...]:
    """Every offset below `gap` once, each about a golden section of it after the one before."""
    section = gap * (5**0.5 - 1) / 2
    stride = min((n for n in range(gap) if gcd(n, gap) == 1), key=lambda n: abs(n - section))
    return tuple((first + index * stride) % gap for index in range(gap))


def flat_starts(length: int, size: int, stride: int) -> tuple[int, ...]:
    """Every multiple of `stride` at which a window fits, and one more that ends at the edge."""
    check_fit(length, size, stride)
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] != length - size:
        starts.append(length - size)
    return tuple(starts)


def ring_starts(length: int, size: int, stride: int) -> tuple[int, ...]:
    """Starts all around a ring, evenly, no gap wider than `stride`.

    A spacing that divides both the ring and the window covers every cell equally often, so the
    widest such spacing from 8 cells to `stride` is taken. Where there is none, the gaps and the
    number of windows over a cell differ by one at most.
    """
    check_fit(length, size, stride)
    if stride >= size:
        raise ValueError(
            f"stride={stride}: must be less than the window's {size} latent cells on a ring, or "
            f"else there are too few windows to close it; {size // 2} would do"
        )
    common = gcd(length, size)
    spacings = [d for d in range(MIN_SPACING, stride + 1) if common % d == 0]
    count = length // spacings[-1] if spacings else ceil(length / stride)
    return even_starts(length, count)


def even_starts(length: int, count: int) -> tuple[int, ...]:
    """`count` starts around a ring, whose gaps differ by one cell at most."""
    return tuple(index * length // count for index in range(count))


def check_fit(length: int, size: int, stride: int) -> None:
    """Raises ValueError unless windows of `size` cells can cover `length` cells at `stride`."""
    if length < size:
        raise ValueError(
            f"a canvas of {length} latent cells is smaller than a window; {size} cells would do"
        )
    if not 1 <= stride <= size:
        raise ValueError(
            f"stride={stride}: must be 1 to the window's {size} latent cells; {size // 2} would do"
        )


def crop(latents: Tensor, views: Sequence[View]) -> Tensor:
    """Cuts windows out of a canvas.

    Args:
        latents: the canvas (1, C, H, W).
        views: N of them, of one size s.

    Returns:
        The windows (N, C, s, s).
    """
    return torch.cat([latents[(..., *cells(view, latents))] for view in views])


class Fusion:
    """The mean of windows over a canvas, gathered a batch at a time.

    MultiDiffusion (arXiv 2302.08113), equation 5, whose weights are equal but where windows fade.
    """

    def __init__(self, canvas: Tensor, views: Sequence[View]) -> None:
        """Begins with nothing.

        Args:
            canvas: (1, C, H, W), which gives shape, device and dtype.
            views: all that are going to be added, by whomever.
        """
        self.total = torch.zeros_like(canvas)
        self.weight = torch.zeros_like(canvas[:, :1])
        for view in views:
            self.weight[(..., *cells(view, canvas))] += weights(view, canvas.device)

    def add(self, windows: Tensor, views: Sequence[View]) -> None:
        """Adds windows (N, C, s, s) at their views."""
        for window, view in zip(windows, views, strict=True):
            self.total[(..., *cells(view, self.total))] += window * weights(view, window.device)

    def mean(self) -> Tensor:
        """The average (1, C, H, W) of what was added; every cell must be covered."""
        return self.total / self.weight


def cells(view: View, canvas: Tensor) -> tuple[slice, slice] | tuple[Tensor, Tensor]:
    """The rows and columns of a view on a canvas; (s, 1) and (1, s), modulo its size, if it wraps.

    Slices are several times as fast.
    """
    height, width = canvas.shape[-2:]
    top, left = view.top % height, view.left % width
    bottom, right = top + view.size, left + view.size
    if bottom <= height and right <= width:
        return slice(top, bottom), slice(left, right)
    rows = torch.arange(top, bottom, device=canvas.device) % height
    columns = torch.arange(left, right, device=canvas.device) % width
    return rows[:, None], columns[None]


def weights(view: View, device: torch.device) -> Tensor:
    """How much the cells of a view count in the mean, (s, s), float32."""
    side = inwards(view.size, device) if view.fades else torch.ones(view.size, device=device)
    return side[:, None] * side


def inwards(size: int, device: torch.device) -> Tensor:
    """How far the middles of cells in a row (size,) are from its nearer end, as parts of it."""
    places = torch.arange(size, device=device)
    return (torch.minimum(places, places.flip(0)) + 0.5) / size
